"""Cleanup handlers: own ones first, then the manager's, last in first out, one failure hiding no other."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

from wiseflow_nb.context import TaskContext
from wiseflow_nb.futures import settle
from wiseflow_nb.pool._work import wants_context
from wiseflow_nb.tasks._loop import LoopThread, logger

#: What an asynchronous handler may take, in seconds; it is cancelled after that.
BUDGET_SECONDS = 30.0

Handler = Callable[[], Any]


def collect(
    context: TaskContext, own: Callable[..., Any] | None, shared: Sequence[Callable[..., Any]]
) -> list[Handler]:
    """The handlers of one attempt in the order in which they run."""
    handlers: list[Handler] = [functools.partial(fn, *args, **kwargs) for fn, args, kwargs in context.take_cleanups()]
    for handler in (*(() if own is None else (own,)), *reversed(shared)):
        handlers.append(functools.partial(handler, context) if wants_context(handler) else handler)
    return handlers


def run_in_thread(handlers: Sequence[Handler], loop: LoopThread) -> list[str]:
    """Run the handlers on this thread (asynchronous ones on the loop); return what failed."""
    failures: list[str] = []
    for handler in handlers:
        try:
            value = handler()
            if inspect.isawaitable(value):
                loop.run(_within_budget(value), None)
        except BaseException as error:  # noqa: BLE001  user code: returned to be recorded, logged here
            failures.append(_told(handler, error))
    return failures


async def run_on_loop(handlers: Sequence[Handler]) -> list[str]:
    """Run the handlers from the loop: asynchronous ones on it, plain ones never."""
    failures: list[str] = []
    for handler in handlers:
        try:
            value = handler() if _is_async(handler) else await _in_own_thread(handler)
            if inspect.isawaitable(value):
                await _within_budget(value)
        except BaseException as error:  # noqa: BLE001  user code: returned to be recorded, logged here
            failures.append(_told(handler, error))
    return failures


async def _within_budget(value: Any) -> Any:
    async def wait() -> Any:
        return await value

    return await asyncio.wait_for(wait(), BUDGET_SECONDS)


def _is_async(handler: Handler) -> bool:
    return inspect.iscoroutinefunction(handler)


async def _in_own_thread(handler: Handler) -> Any:
    # Not the pool: its workers may all be held by code that does not return.
    from concurrent.futures import Future

    future: Future[Any] = Future()
    variables = contextvars.copy_context()

    def run() -> None:
        try:
            value = variables.run(handler)
        except BaseException as error:  # noqa: BLE001  user code: handed to whoever awaits
            settle(future, error=error)
        else:
            settle(future, value)

    threading.Thread(target=run, name="wiseflow-cleanup", daemon=True).start()
    return await asyncio.wrap_future(future)


def _told(handler: Handler, error: BaseException) -> str:
    function = handler.func if isinstance(handler, functools.partial) else handler
    name = getattr(function, "__qualname__", type(function).__name__)
    logger.error("the cleanup handler %s failed", name, exc_info=error)
    return f"cleanup {name} failed: {type(error).__name__}: {error}"
