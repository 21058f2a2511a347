"""Cleanup handlers: own ones first, then the manager's, last in first out, one failure hiding no other."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from wiseflow_nb.context import TaskContext
from wiseflow_nb.errors import TaskTimeoutError
from wiseflow_nb.futures import settle
from wiseflow_nb.pool._work import told, wants_context
from wiseflow_nb.tasks._loop import TaskLoop, logger
from wiseflow_nb.tasks._options import CLEANUP_SECONDS, TaskOptions


@dataclass(frozen=True, slots=True)
class Handler:
    """One call to make after an attempt; ``budget`` is seconds."""

    call: Callable[[], Any]
    name: str
    budget: float = CLEANUP_SECONDS


@dataclass(frozen=True, slots=True)
class Registered:
    """A handler of the manager's; ``always`` also after attempts that completed."""

    fn: Callable[..., Any]
    budget: float
    always: bool


def always(options: TaskOptions, shared: Sequence[Registered]) -> bool:
    """Whether there is something to clean up after an attempt that completed."""
    return options.cleanup_always or any(item.always for item in shared)


def collect(
    context: TaskContext, options: TaskOptions, shared: Sequence[Registered], *, completed: bool
) -> list[Handler]:
    """The handlers of one attempt in the order in which they run."""
    handlers = []
    for fn, args, kwargs in context.take_cleanups():
        if not completed:
            handlers.append(Handler(functools.partial(fn, *args, **kwargs), _name(fn)))
    if options.cleanup is not None and (options.cleanup_always or not completed):
        handlers.append(Handler(_call(options.cleanup, context), _name(options.cleanup), options.cleanup_budget))
    for item in reversed(shared):
        if item.always or not completed:
            handlers.append(Handler(_call(item.fn, context), _name(item.fn), item.budget))
    return handlers


def run_in_thread(
    handlers: Sequence[Handler], loop: TaskLoop, watch: Callable[[Handler], Callable[[], None]]
) -> list[str]:
    """Run the handlers on this thread (asynchronous ones on the loop); return what failed.

    ``watch`` is told before each plain handler and gives what to call after it: code on a thread
    cannot be stopped, so whoever watches goes on without it when its budget is spent.
    """
    failures: list[str] = []
    for handler in handlers:
        done = watch(handler)
        try:
            value = handler.call()
            if inspect.isawaitable(value):
                loop.run(_within(handler.budget, value), None)
        except BaseException as error:  # noqa: BLE001  user code: returned to be recorded, logged here
            failures.append(_told(handler, error))
        finally:
            done()
    return failures


async def run_on_loop(handlers: Sequence[Handler]) -> list[str]:
    """Run the handlers from the loop: asynchronous ones on it, plain ones never."""
    failures: list[str] = []
    for handler in handlers:
        try:
            call = handler.call
            if inspect.iscoroutinefunction(call):
                await _within(handler.budget, call())
                continue
            value = await _within(handler.budget, _in_own_thread(call))
            if inspect.isawaitable(value):
                await _within(handler.budget, value)
        except BaseException as error:  # noqa: BLE001  user code: returned to be recorded, logged here
            failures.append(_told(handler, error))
    return failures


def over_budget(handler: Handler) -> str:
    """What is recorded of a handler that did not return in time."""
    logger.error("the cleanup handler %s is over its budget of %g s", handler.name, handler.budget)
    return f"cleanup {handler.name} is over its {handler.budget:g} s and still runs"


async def _within(budget: float, value: Awaitable[Any]) -> Any:
    async def wait() -> Any:
        return await value

    waited = asyncio.ensure_future(wait())
    done, _ = await asyncio.wait([waited], timeout=budget)
    if not done:
        waited.cancel()
        raise TaskTimeoutError(f"stopped: over its budget of {budget:g} s; give it more, or less to do")
    return waited.result()


async def _in_own_thread(call: Callable[[], Any]) -> Any:
    # Not the pool: its workers may all be held by code that does not return.
    future: Future[Any] = Future()
    variables = contextvars.copy_context()

    def run() -> None:
        try:
            value = variables.run(call)
        except BaseException as error:  # noqa: BLE001  user code: handed to whoever awaits
            settle(future, error=error)
        else:
            settle(future, value)

    threading.Thread(target=run, name="wiseflow-cleanup", daemon=True).start()
    return await asyncio.wrap_future(future)


def _call(handler: Callable[..., Any], context: TaskContext) -> Callable[[], Any]:
    return functools.partial(handler, context) if wants_context(handler) else handler


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__


def _told(handler: Handler, error: BaseException) -> str:
    logger.error("the cleanup handler %s failed", handler.name, exc_info=error)
    return f"cleanup {handler.name} failed: {told(error)}"
