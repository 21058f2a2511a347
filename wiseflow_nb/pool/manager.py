"""``ThreadPoolManager``: an executor whose size and order can be changed while it works."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from concurrent.futures.thread import BrokenThreadPool
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from wiseflow_nb.clock import SYSTEM_CLOCK, Clock
from wiseflow_nb.config import Settings
from wiseflow_nb.errors import PoolClosedError, UsageError
from wiseflow_nb.pool._crew import Crew
from wiseflow_nb.pool._process import ProcessWorkers, check_kind
from wiseflow_nb.pool._view import PoolView
from wiseflow_nb.pool._work import PoolFuture, PoolStats, Work, records_frame
from wiseflow_nb.records import PoolStatus, Priority

if TYPE_CHECKING:
    import pandas as pd

P = ParamSpec("P")
T = TypeVar("T")


class ThreadPoolManager(Crew, Executor):
    """A thread pool with priorities, a live size, and figures per task.

    Parameters
    ----------
    min_workers, max_workers
        The bounds of the size, at least 1. Default ``settings.min_thread_workers`` (2) and
        ``settings.max_thread_workers`` (8). Workers start when there is work for them.
    settings
        Where the default bounds come from; default ``Settings()``.
    thread_name_prefix
        Worker threads are called ``<prefix>-<number>``.
    initializer, initargs
        Called first in each worker. If it raises, the pool is broken: queued and later work fails
        with ``BrokenThreadPool``.
    clock
        What queue times and ageing go by.

    Notes
    -----
    Four classes of priority, first in first out within a class; queued work climbs one class per
    30 s, up to HIGH. Workers are daemon threads; at the interpreter's end they are waited for 2 s.

    Raises
    ------
    UsageError
        If the bounds do not fit.

    Examples
    --------
    >>> with ThreadPoolManager(max_workers=2) as pool:
    ...     pool.options(priority="high", name="sum").submit(sum, [1, 2]).result()
    3
    """

    def __init__(
        self,
        min_workers: int | None = None,
        max_workers: int | None = None,
        *,
        settings: Settings | None = None,
        thread_name_prefix: str = "wiseflow",
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        given = settings if settings is not None else Settings.model_validate({})
        high = max_workers if max_workers is not None else max(given.max_thread_workers, min_workers or 1)
        low = min_workers if min_workers is not None else min(given.min_thread_workers, high)
        _check_bounds(low, high)
        if initializer is not None and not callable(initializer):
            raise UsageError(f"initializer {initializer!r} cannot be called; give a function")
        super().__init__(low, high, clock, thread_name_prefix, initializer, initargs)
        self._listeners: list[Callable[[], None]] = []
        #: What ``options(kind="process")`` runs in; nothing is started before the first such call.
        self.processes = ProcessWorkers()

    # -- submitting -------------------------------------------------------------------------

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue ``fn(*args, **kwargs)`` at normal priority; return its future.

        Raises
        ------
        PoolClosedError
            After ``shutdown``.
        """
        return self._submit(fn, args, kwargs, Priority.NORMAL, "", None)

    def options(
        self,
        *,
        priority: Priority | str | int = Priority.NORMAL,
        name: str = "",
        cleanup: Callable[..., Any] | None = None,
        kind: str = "thread",
    ) -> PoolView:
        """Return a light executor that submits here with these options.

        Parameters
        ----------
        priority
            low, normal (default), high or critical.
        name
            Shown in records; default the function's own name.
        cleanup
            Called after work that failed or was cancelled while it ran; it is given the
            ``TaskContext`` if it has a required parameter.
        kind
            ``thread`` (default), or ``process``: each call has a worker process to itself while a
            worker of this pool waits for it. CPU time and peak memory are then exact, a running
            call can be stopped (``cancel_running``), and a crash is ``WorkerLostError`` for that
            call alone. Functions made in a notebook, closures and lambdas work; what goes in and
            comes back must pickle.

        Raises
        ------
        UsageError
            If the priority is none of the four, or the kind neither of the two.

        Examples
        --------
        >>> with ThreadPoolManager() as pool:
        ...     list(pool.options(priority="low").map(abs, [-1, -2]))
        [1, 2]
        """
        return PoolView(self, _priority(priority), name, cleanup, check_kind(kind))

    def _submit(
        self,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        priority: Priority,
        name: str,
        cleanup: Callable[..., Any] | None,
    ) -> Future[T]:
        future: PoolFuture[T] = PoolFuture(self)
        label = name or getattr(fn, "__qualname__", type(fn).__name__)
        with self._lock:
            if self._broken:
                raise BrokenThreadPool(self._broken)
            if self._closed:
                raise PoolClosedError("the pool has been shut down; make a new ThreadPoolManager")
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
        """Ask running work to stop; return whether it was running.

        The work's ``current_task().cancelled`` turns true. A thread cannot be stopped from outside:
        it keeps its worker until it returns. In a process, ``TaskCancelledError`` is raised in the
        code after 0.25 s, and after 0.5 s the process is killed with all that it started.
        """
        work = getattr(future, "_work", None)
        if not isinstance(work, Work):
            return False
        with self._lock:
            if self._running.get(work.key) is not work:
                return False
            work.context.token.cancel(reason)
            return True

    def resize(self, workers: int, reason: str = "") -> int:
        """Set how many workers there should be; return what it became, within the bounds.

        Running work is never interrupted: surplus workers end when they are free.

        Raises
        ------
        UsageError
            If ``workers`` is less than 1.
        """
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
        """Set the bounds live; the target follows where it is outside, or was at the old maximum.

        Raises
        ------
        UsageError
            If the bounds do not fit; nothing was changed.
        """
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
        """While a worker of this pool waits in this block for other work, one more worker may run.

        Called from any other thread it does nothing.
        """
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
            return replace(self._stats, cancelling=asked)

    def records(self) -> pd.DataFrame:
        """One row per finished work, the newest 10,000: queue, wall and CPU seconds, exit state.

        Times are UTC. pandas is imported by the first call.
        """
        with self._lock:
            rows = list(self._records)
        return records_frame(rows)

    # -- ending -----------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; let queued work run, or cancel it; wait for the workers if asked."""
        self._close(cancel_queued=cancel_futures)
        if wait:
            self._join(None)
        self.processes.close()

    def _add_listener(self, listener: Callable[[], None]) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _tell_listeners(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def __repr__(self) -> str:
        status = self.status()
        return (
            f"<ThreadPoolManager workers={status.workers} ({status.min_workers}-{status.max_workers}) "
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
