"""The plain thread pool: one lock, one condition, heaps, and the standard library's future.

It is what the package's pool is compared with: the same suite runs on both, so that what was made
fast is still what was meant.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from concurrent.futures.thread import BrokenThreadPool
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import pandas as pd

from wiseflow_nb.clock import SYSTEM_CLOCK, Clock
from wiseflow_nb.context import TaskContext, enter_task, leave_task
from wiseflow_nb.errors import PoolClosedError, TaskCancelledError, UsageError
from wiseflow_nb.futures import settle
from wiseflow_nb.pool._queue import ClassQueue
from wiseflow_nb.pool._work import PoolRecord, PoolStats, logger, records_frame, run_cleanups, told
from wiseflow_nb.records import PoolStatus, Priority

P = ParamSpec("P")
T = TypeVar("T")
ValueT = TypeVar("ValueT")


class PlainFuture(Future[ValueT]):
    """The future of pool work; ``cancel()`` takes queued work out of the queue at once."""

    def __init__(self, pool: PlainCrew) -> None:
        super().__init__()
        self._pool = pool
        self._work: Work | None = None

    def cancel(self) -> bool:
        """Cancel work that has not begun; return whether it will not run."""
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
        future: PlainFuture[Any],
        call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]],
        *,
        name: str,
        priority: Priority,
        cleanup: Callable[..., Any] | None,
        now: float,
        epoch: float,
    ) -> None:
        self.key = key
        self.future: PlainFuture[Any] | None = future
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
    except BaseException as caught:
        error = caught
    cpu_seconds = (time.thread_time_ns() - cpu_started) / 1e9
    wall_seconds = monotonic() - started
    failures = 0
    if error is not None:
        failures = run_cleanups(work.context, work.cleanup, work.name)
    leave_task(token)
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
        cpu_seconds,
        "thread_time",
        told(error),
        failures,
    )
    return value, error, record


#: Records of finished work that are kept; the oldest are dropped.
RECORDS_KEPT = 10_000


class PlainCrew:
    """The threads, their queue and the book of what they did, all behind one lock."""

    def __init__(
        self,
        low: int,
        high: int,
        clock: Clock,
        prefix: str,
        initializer: Callable[..., object] | None,
        initargs: tuple[Any, ...],
    ) -> None:
        self._clock = clock
        self._prefix = prefix
        self._initializer, self._initargs = initializer, initargs
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._queue: ClassQueue[Work] = ClassQueue()
        self._workers: set[threading.Thread] = set()
        self._running: dict[int, Work] = {}
        self._blocked: dict[int, int] = {}
        self._idle = 0
        self._numbers = 0
        self._spawned = 0
        self._min_workers = low
        # The name that dask looks for when it is handed an executor.
        self._max_workers = high
        self._target = high
        self._reason = "as many as the bounds allow"
        self._closed = False
        self._broken = ""
        self._stats = PoolStats()
        self._records: deque[PoolRecord] = deque(maxlen=RECORDS_KEPT)

    def _close(self, *, cancel_queued: bool) -> None:
        with self._lock:
            self._closed = True
            queued = self._queue.items() if cancel_queued else []
            self._wake.notify_all()
        for work in queued:
            future = work.future
            if future is not None:
                future.cancel()

    def _join(self, deadline: float | None) -> None:
        with self._lock:
            workers = [item for item in self._workers if item is not threading.current_thread()]
        for worker in workers:
            worker.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    # -- workers (the lock is held where a name says so by its caller) -----------------------

    def _limit(self) -> int:
        return self._target + len(self._blocked)

    def _apply_size(self) -> None:
        # A refusal to start a thread must not undo the change of size: the next submit tries again.
        with contextlib.suppress(RuntimeError):
            self._staff()
        self._wake.notify_all()

    def _staff(self) -> None:
        # Idle workers that were woken and have not yet looked still count as idle, and each will
        # take one item: so compare with the whole queue, not with the item just pushed.
        self._wake.notify()
        while len(self._queue) > self._idle and len(self._workers) < self._limit():
            worker = threading.Thread(target=self._work_loop, name=f"{self._prefix}-{self._spawned}", daemon=True)
            self._spawned += 1
            self._idle += 1
            self._workers.add(worker)
            try:
                worker.start()
            except RuntimeError:
                self._idle -= 1
                self._workers.discard(worker)
                if not self._workers:
                    raise
                logger.warning("no further thread could be started; the pool goes on with %d", len(self._workers))
                return

    def _work_loop(self) -> None:
        # Counted as idle by whoever started this thread, until it has looked at the queue.
        if self._initializer is not None and not self._initialise():
            return
        with self._lock:
            self._idle -= 1
        while (work := self._next()) is not None:
            self._execute(work)
            del work

    def _initialise(self) -> bool:
        assert self._initializer is not None
        try:
            self._initializer(*self._initargs)
        except BaseException:
            logger.exception("the initializer of a worker failed; the pool is broken")
            with self._lock:
                self._idle -= 1
                self._workers.discard(threading.current_thread())
                self._broken = "the initializer of a worker raised an exception; mend it and make a new pool"
                failed = self._queue.items()
                for work in failed:
                    self._queue.discard(work.key)
                self._stats = replace(self._stats, failed=self._stats.failed + len(failed))
                self._wake.notify_all()
            for work in failed:
                future = work.future
                work.release()
                if future is not None and future.set_running_or_notify_cancel():
                    settle(future, error=BrokenThreadPool(self._broken))
            return False
        return True

    def _next(self) -> Work | None:
        with self._lock:
            while True:
                if len(self._workers) > self._limit():
                    break
                work = self._queue.pop(self._clock.monotonic())
                if work is not None:
                    self._running[work.key] = work
                    return work
                if self._closed or self._broken:
                    break
                self._idle += 1
                self._wake.wait()
                self._idle -= 1
            self._workers.discard(threading.current_thread())
            # Whoever waits may have to see that one worker fewer is there.
            self._wake.notify_all()
            return None

    def _execute(self, work: Work) -> None:
        future = work.future
        assert future is not None
        if not future.set_running_or_notify_cancel():
            # Cancelled after it left the queue: it never ran.
            self._account(work, work.cancelled_record())
            return
        value, error, record = run_work(work, self._clock.monotonic, self._clock.time())
        # First the figures, then the result: who has the result finds the figures.
        self._account(work, record)
        settle(future, value, error)

    def _account(self, work: Work, record: PoolRecord) -> None:
        with self._lock:
            self._running.pop(work.key, None)
            self._count(record)
        work.release()

    def _count(self, record: PoolRecord) -> None:
        self._records.append(record)
        total = self._stats
        ran = record.cpu_source != "unknown"
        self._stats = replace(
            total,
            completed=total.completed + (record.state == "completed"),
            failed=total.failed + (record.state == "failed"),
            cancelled=total.cancelled + (record.state == "cancelled"),
            queue_seconds=total.queue_seconds + (record.queue_seconds if ran else 0.0),
            wall_seconds=total.wall_seconds + (record.wall_seconds if ran else 0.0),
            cpu_seconds=total.cpu_seconds + (record.cpu_seconds if ran else 0.0),
            cleanup_failures=total.cleanup_failures + record.cleanup_failures,
        )

    def _forget_queued(self, future: PlainFuture[Any]) -> None:
        work = future._work
        if work is None:
            return
        with self._lock:
            if not self._queue.discard(work.key):
                return  # a worker has it, and will see that it was cancelled
            self._count(work.cancelled_record())
        work.release()
        future.set_running_or_notify_cancel()


class PlainView(Executor):
    """An executor that submits to a pool with fixed options; it owns nothing and closes nothing."""

    def __init__(self, pool: PlainPool, priority: Priority, name: str, cleanup: Callable[..., Any] | None) -> None:
        self._pool, self._priority, self._name, self._cleanup = pool, priority, name, cleanup

    @property
    def _max_workers(self) -> int:
        return self._pool._max_workers

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue ``fn(*args, **kwargs)`` with this view's options; return its future."""
        return self._pool._submit(fn, args, kwargs, self._priority, self._name, self._cleanup)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Do nothing: the pool belongs to whoever made it."""


class PlainPool(PlainCrew, Executor):
    """An executor like the package's, plainly."""

    def __init__(
        self,
        min_workers: int | None = None,
        max_workers: int | None = None,
        *,
        thread_name_prefix: str = "wiseflow",
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        low, high = min_workers or 2, max_workers or 8
        _check_bounds(low, high)
        if initializer is not None and not callable(initializer):
            raise UsageError(f"initializer {initializer!r} cannot be called; give a function")
        super().__init__(low, high, clock, thread_name_prefix, initializer, initargs)
        self._listeners: list[Callable[[], None]] = []

    # -- submitting -------------------------------------------------------------------------

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue ``fn(*args, **kwargs)`` at normal priority; return its future."""
        return self._submit(fn, args, kwargs, Priority.NORMAL, "", None)

    def options(
        self,
        *,
        priority: Priority | str | int = Priority.NORMAL,
        name: str = "",
        cleanup: Callable[..., Any] | None = None,
    ) -> PlainView:
        """Return a light executor that submits here with these options."""
        return PlainView(self, _priority(priority), name, cleanup)

    def _submit(
        self,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        priority: Priority,
        name: str,
        cleanup: Callable[..., Any] | None,
    ) -> Future[T]:
        future: PlainFuture[T] = PlainFuture(self)
        label = name or getattr(fn, "__qualname__", type(fn).__name__)
        with self._lock:
            if self._broken:
                raise BrokenThreadPool(self._broken)
            if self._closed:
                raise PoolClosedError("the pool has been shut down; make a new PlainPool")
            self._numbers += 1
            now = self._clock.monotonic()
            work = Work(
                self._numbers,
                future,
                (fn, args, kwargs),
                name=label,
                priority=priority,
                cleanup=cleanup,
                now=now,
                epoch=self._clock.time(),
            )
            future._work = work
            self._queue.push(work, work.key, priority, now)
            try:
                self._staff()
            except RuntimeError:
                self._queue.discard(work.key)
                raise
            self._stats = replace(self._stats, submitted=self._stats.submitted + 1)
        return future

    # -- steering ---------------------------------------------------------------------------

    def reprioritise(self, future: Future[Any], priority: Priority | str | int) -> bool:
        """Change the class of queued work, keeping its age; return whether it was still queued."""
        wanted = _priority(priority)
        work = getattr(future, "_work", None)
        if not isinstance(work, Work):
            return False
        with self._lock:
            if not self._queue.reprioritise(work.key, wanted, self._clock.monotonic()):
                return False
            work.priority = wanted
            return True

    def cancel_running(self, future: Future[Any], reason: str = "cancelled") -> bool:
        """Ask running work to stop; return whether it was running."""
        work = getattr(future, "_work", None)
        if not isinstance(work, Work):
            return False
        with self._lock:
            if self._running.get(work.key) is not work:
                return False
            work.context.token.cancel(reason)
            return True

    def resize(self, workers: int, reason: str = "") -> int:
        """Set how many workers there should be; return what it became, within the bounds."""
        if workers < 1:
            raise UsageError(f"a pool of {workers} workers does no work; give at least 1")
        with self._lock:
            self._target = min(max(int(workers), self._min_workers), self._max_workers)
            self._reason = reason or "set by resize"
            self._apply_size()
            target = self._target
        self._tell_listeners()
        return target

    def set_bounds(self, min_workers: int, max_workers: int) -> None:
        """Set the bounds live; the target follows where it is outside, or was at the old maximum."""
        _check_bounds(min_workers, max_workers)
        with self._lock:
            wanted = max_workers if self._target == self._max_workers else self._target
            self._min_workers, self._max_workers = min_workers, max_workers
            self._target = min(max(wanted, min_workers), max_workers)
            self._reason = f"brought within the bounds {min_workers}-{max_workers}"
            self._apply_size()
        self._tell_listeners()

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """While a worker of this pool waits in this block for other work, one more worker may run."""
        me = threading.get_ident()
        with self._lock:
            mine = threading.current_thread() in self._workers
            if mine:
                self._blocked[me] = self._blocked.get(me, 0) + 1
                self._apply_size()
        try:
            yield
        finally:
            if mine:
                with self._lock:
                    self._blocked[me] -= 1
                    if not self._blocked[me]:
                        del self._blocked[me]
                    self._wake.notify_all()

    # -- looking ----------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """How much work is queued or running."""
        with self._lock:
            return len(self._queue) + len(self._running)

    @property
    def target(self) -> int:
        """How many workers there may be now, those made up for blocked ones not counted."""
        return self._target

    def status(self) -> PoolStatus:
        """The pool at this moment; ``workers`` are threads that are really there."""
        with self._lock:
            return PoolStatus(
                workers=len(self._workers),
                busy=len(self._running),
                queued=len(self._queue),
                min_workers=self._min_workers,
                max_workers=self._max_workers,
                target=self._target,
                reason=self._reason,
                completed=self._stats.completed,
                failed=self._stats.failed,
            )

    def stats(self) -> PoolStats:
        """Totals since the pool was made."""
        with self._lock:
            asked = sum(work.context.cancelled for work in self._running.values())
            return replace(self._stats, cancelling=asked, queued=len(self._queue), running=len(self._running))

    def records(self) -> pd.DataFrame:
        """One row per finished work, the newest 10,000: queue, wall and CPU seconds, exit state."""
        with self._lock:
            rows = list(self._records)
        return records_frame(rows)

    # -- ending -----------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; let queued work run, or cancel it; wait for the workers if asked."""
        self._close(cancel_queued=cancel_futures)
        if wait:
            self._join(None)

    def _add_listener(self, listener: Callable[[], None]) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _tell_listeners(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def __repr__(self) -> str:
        status = self.status()
        return (
            f"<PlainPool workers={status.workers} ({status.min_workers}-{status.max_workers}) "
            f"busy={status.busy} queued={status.queued}>"
        )


def _priority(value: Priority | str | int) -> Priority:
    try:
        return Priority.parse(value)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_bounds(low: int, high: int) -> None:
    if low < 1 or high < low:
        raise UsageError(f"bounds {low}-{high} do not fit; give 1 <= min_workers <= max_workers")
