"""Helpers over ``concurrent.futures.Future`` shared by the pool and the task manager."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from typing import Any


def settle(future: Future[Any], value: Any = None, error: BaseException | None = None) -> bool:
    """Give a future its result or error, once; return whether this call was the one that did.

    A future that was cancelled or settled meanwhile is left as it is: the loser of that race has
    nothing to undo.

    Examples
    --------
    >>> future = Future()
    >>> settle(future, 42), settle(future, 43), future.result()
    (True, False, 42)
    """
    try:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)
    except InvalidStateError:
        return False
    return True
