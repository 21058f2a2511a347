"""Helpers over ``concurrent.futures.Future`` shared by the pool and the task manager."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

ValueT = TypeVar("ValueT")


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


class _Arrivals:
    """Futures that have ended, on their way to one loop: the first wakes it, the others go along."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._lock = threading.Lock()
        self._ended: deque[tuple[asyncio.Future[Any], Future[Any]]] = deque()
        self._woken = False

    def add(self, target: asyncio.Future[Any], source: Future[Any]) -> None:
        with self._lock:
            self._ended.append((target, source))
            if self._woken:
                return
            self._woken = True
        loop = self._loop()
        try:
            if loop is None:
                raise RuntimeError("the loop is gone")
            loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:  # closed: nobody is left who could wait
            with self._lock:
                self._ended.clear()
                self._woken = False

    def _deliver(self) -> None:
        with self._lock:
            ended, self._ended = self._ended, deque()
            self._woken = False
        while ended:
            target, source = ended.popleft()
            _copy(source, target)


def _copy(source: Future[Any], target: asyncio.Future[Any]) -> None:
    if target.done():
        return
    if source.cancelled():
        target.cancel()
        return
    error = source.exception()
    if isinstance(error, StopIteration):
        # A loop's future refuses it: it would end the coroutine that awaits it as if by return.
        told = RuntimeError("the call raised StopIteration")
        told.__cause__ = error
        target.set_exception(told)
    elif error is not None:
        target.set_exception(error)
    else:
        target.set_result(source.result())


_arrivals: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Arrivals] = weakref.WeakKeyDictionary()
_arrivals_lock = threading.Lock()


def to_asyncio(future: Future[ValueT], loop: asyncio.AbstractEventLoop | None = None) -> asyncio.Future[ValueT]:
    """Return a future of ``loop`` (default: the running one) that ends as ``future`` does.

    Like ``asyncio.wrap_future``, and cancelling it cancels ``future`` likewise; but results that
    arrive in quick succession wake the loop once, not once each.

    Raises
    ------
    RuntimeError
        If there is neither a loop given nor one that runs.

    Examples
    --------
    >>> async def main():
    ...     future = Future()
    ...     future.set_result(42)
    ...     return await to_asyncio(future)
    >>> asyncio.run(main())
    42
    """
    if loop is None:
        loop = asyncio.get_running_loop()
    target: asyncio.Future[ValueT] = loop.create_future()
    if future.done():
        _copy(future, target)
        return target
    arrivals = _arrivals.get(loop)
    if arrivals is None:
        with _arrivals_lock:
            arrivals = _arrivals.setdefault(loop, _Arrivals(loop))

    def ended(source: Future[ValueT]) -> None:
        arrivals.add(target, source)

    def given_up(waiter: asyncio.Future[ValueT]) -> None:
        if waiter.cancelled():
            future.cancel()

    target.add_done_callback(given_up)
    future.add_done_callback(ended)
    return target
