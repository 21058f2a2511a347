"""One piece of pool work: its future, its figures, and how it is run."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from wiseflow_nb.context import TaskContext, enter_task, leave_task
from wiseflow_nb.errors import TaskCancelledError
from wiseflow_nb.records import NAN, Priority

if TYPE_CHECKING:
    import pandas as pd

    from wiseflow_nb.pool._crew import Crew

logger = logging.getLogger("wiseflow_nb.pool")
ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """What one piece of work cost. Durations are seconds; times are seconds since the epoch, UTC.

    ``state`` is completed, failed or cancelled. ``cpu_seconds`` is the worker thread's own CPU time
    (``cpu_source`` says so), or that of the process where the work ran; NaN when it never ran. The
    peak of memory is known of a process only.
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
    """Totals of a pool since it was made; durations are seconds, summed over finished work."""

    submitted: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    cancelling: int = 0
    queue_seconds: float = 0.0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    cleanup_failures: int = 0


class PoolFuture(Future[ValueT]):
    """The future of pool work; ``cancel()`` takes queued work out of the queue at once."""

    def __init__(self, pool: Crew) -> None:
        super().__init__()
        self._pool = pool
        self._work: Work | None = None

    def cancel(self) -> bool:
        """Cancel work that has not begun; return whether it will not run.

        Running work is asked to stop with ``pool.cancel_running(future)`` instead.
        """
        done = super().cancel()
        if done:
            self._pool._forget_queued(self)
        return done


class Work:
    """A queued call. Its references to the function and the arguments end with the run."""

    __slots__ = (
        "args",
        "cleanup",
        "context",
        "fn",
        "future",
        "key",
        "kwargs",
        "name",
        "priority",
        "queued_at",
        "submitted_seconds",
    )

    def __init__(
        self,
        key: int,
        future: PoolFuture[Any],
        call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]],
        *,
        name: str,
        priority: Priority,
        cleanup: Callable[..., Any] | None,
        now: float,
        epoch: float,
    ) -> None:
        self.key = key
        self.future: PoolFuture[Any] | None = future
        self.fn: Callable[..., Any] | None
        self.fn, self.args, self.kwargs = call
        self.name = name
        self.priority = priority
        self.cleanup = cleanup
        self.queued_at = now
        self.submitted_seconds = epoch
        self.context = TaskContext(f"p{key}", name)

    def release(self) -> None:
        """Let go of everything that could keep the caller's objects alive."""
        if self.future is not None:
            self.future._work = None
        self.future, self.fn, self.args, self.kwargs, self.cleanup = None, None, (), {}, None

    def cancelled_record(self) -> PoolRecord:
        """The record of work that never ran."""
        return PoolRecord(f"p{self.key}", self.name, self.priority, "cancelled", self.submitted_seconds)


def run_work(work: Work, monotonic: Callable[[], float], epoch: float) -> tuple[Any, BaseException | None, PoolRecord]:
    """Run the call on this thread; return its value, its error and its record. Never raises."""
    assert work.fn is not None
    value, error = None, None
    started = monotonic()
    cpu_started = time.thread_time_ns()
    token = enter_task(work.context)
    try:
        value = work.fn(*work.args, **work.kwargs)
    except BaseException as caught:  # noqa: BLE001  user code: handed to the future and counted
        error = caught
    cpu_seconds = (time.thread_time_ns() - cpu_started) / 1e9
    wall_seconds = monotonic() - started
    failures = 0
    if error is not None:
        failures = _run_cleanups(work)
    leave_task(token)
    remote = work.context.remote
    if remote is not None:
        failures += len(remote.cleanup_failures)
    state = "completed" if error is None else "cancelled" if isinstance(error, TaskCancelledError) else "failed"
    record = PoolRecord(
        f"p{work.key}",
        work.name,
        work.priority,
        state,
        work.submitted_seconds,
        epoch,
        started - work.queued_at,
        wall_seconds,
        cpu_seconds if remote is None else remote.cpu_seconds,
        "thread_time" if remote is None else remote.source,
        "" if error is None else f"{type(error).__name__}: {error}",
        failures,
        NAN if remote is None else remote.memory_peak_bytes,
        "unknown" if remote is None else remote.memory_source,
    )
    return value, error, record


def records_frame(rows: Sequence[PoolRecord]) -> pd.DataFrame:
    """The records as a frame, times in UTC."""
    import pandas as pd

    frame = pd.DataFrame([asdict(row) for row in rows], columns=[item.name for item in fields(PoolRecord)])
    frame["priority"] = [row.priority.name.lower() for row in rows]
    for column in ("started", "submitted"):
        values = frame.pop(f"{column}_seconds").astype("float64")
        frame.insert(4, column, pd.to_datetime(values, unit="s", utc=True))
    return frame


def wants_context(handler: Callable[..., Any]) -> bool:
    """Whether a cleanup handler takes the task's context: it has a required positional parameter."""
    try:
        parameters = inspect.signature(handler).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(item.kind in positional and item.default is item.empty for item in parameters)


def _run_cleanups(work: Work) -> int:
    handlers = work.context.take_cleanups()
    if work.cleanup is not None:
        handlers.append((work.cleanup, (work.context,) if wants_context(work.cleanup) else (), {}))
    failures = 0
    for handler, args, kwargs in handlers:
        try:
            outcome = handler(*args, **kwargs)
            if inspect.iscoroutine(outcome):
                asyncio.run(outcome)
        except Exception:  # user code: counted here, logged with its traceback, never masks the work's error
            failures += 1
            logger.exception("a cleanup handler of %r failed", work.name)
    return failures
