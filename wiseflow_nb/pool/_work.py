"""What pool work leaves behind: its record, the totals, and its cleanup."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

from wiseflow_nb.context import TaskContext
from wiseflow_nb.records import NAN, Priority

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
logger = logging.getLogger("wiseflow_nb.pool")


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """What one piece of work cost. Durations are seconds; times are seconds since the epoch, UTC.

    ``state`` is completed, failed or cancelled. ``cpu_seconds`` is the worker thread's own CPU time
    (``cpu_source`` says so), or that of the process where the work ran; NaN when it never ran. A
    thread's is at most 0.25 ms over what it was and never more than ``wall_seconds``. The peak of
    memory is known of a process only.
    """

    work_id: str
    name: str
    priority: Priority
    state: str
    submitted_seconds: float
    started_seconds: float = NAN
    queue_seconds: float = NAN
    wall_seconds: float = NAN
    cpu_seconds: float = NAN
    cpu_source: str = "unknown"
    error: str = ""
    cleanup_failures: int = 0
    memory_peak_bytes: float = NAN
    memory_source: str = "unknown"


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Totals of a pool since it was made; durations are seconds, summed over finished work.

    At any moment ``submitted`` is the sum of completed, failed, cancelled, queued and running;
    ``cancelling`` is how many of those that run were asked to stop.
    """

    submitted: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    cancelling: int = 0
    queue_seconds: float = 0.0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    cleanup_failures: int = 0
    queued: int = 0
    running: int = 0


def records_frame(rows: Sequence[PoolRecord]) -> pd.DataFrame:
    """The records as a frame, times in UTC."""
    import pandas as pd

    names = [item.name for item in fields(PoolRecord)]
    read = attrgetter(*names)
    frame = pd.DataFrame([read(row) for row in rows], columns=names)
    frame["priority"] = [row.priority.name.lower() for row in rows]
    for column in ("started", "submitted"):
        values = frame.pop(f"{column}_seconds").astype("float64")
        frame.insert(4, column, pd.to_datetime(values, unit="s", utc=True))
    return frame


def map_within(
    executor: Executor, fn: Callable[..., T], calls: Iterable[tuple[Any, ...]], timeout: float
) -> Iterator[T]:
    """What ``Executor.map`` does with a time-out, which says whose time is over; the calls are made at once."""
    due = time.monotonic() + timeout
    futures = [executor.submit(fn, *args) for args in calls]
    futures.reverse()
    count = len(futures)

    def results() -> Iterator[T]:
        try:
            while futures:
                if not futures[-1].done() and not wait((futures[-1],), max(0.0, due - time.monotonic())).done:
                    name = getattr(fn, "__qualname__", type(fn).__name__)
                    raise TimeoutError(
                        f"map of {name!r} was over its timeout of {timeout:g} s with {count - len(futures)} of {count} "
                        "results given; calls that had not begun were cancelled, give it more time or none"
                    )
                yield futures.pop().result()
        finally:
            for future in futures:
                future.cancel()

    return results()


def told(error: BaseException | None) -> str:
    """An error as one line; never raises, whatever the error's own ``__str__`` does."""
    if error is None:
        return ""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: BLE001  user code: an error that cannot be shown is still named
        return f"{type(error).__name__} (its text could not be made)"


def wants_context(handler: Callable[..., Any]) -> bool:
    """Whether a cleanup handler takes the task's context: it has a required positional parameter."""
    try:
        parameters = inspect.signature(handler).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(item.kind in positional and item.default is item.empty for item in parameters)


def run_cleanups(context: TaskContext, own: Callable[..., Any] | None, name: str) -> int:
    """Run what work that did not complete had registered, last in first out; return how many failed."""
    handlers = context.take_cleanups()
    if own is not None:
        handlers.append((own, (context,) if wants_context(own) else (), {}))
    failures = 0
    for handler, args, kwargs in handlers:
        try:
            outcome = handler(*args, **kwargs)
            if inspect.iscoroutine(outcome):
                asyncio.run(outcome)
        except BaseException:
            failures += 1
            logger.exception("a cleanup handler of %r failed", name)
    return failures
