"""``ThreadPoolManager``: an executor whose size and order can be changed while it works."""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from wiseflow_nb.clock import SYSTEM_CLOCK, Clock
from wiseflow_nb.config import Settings
from wiseflow_nb.errors import UsageError
from wiseflow_nb.pool._crew import Crew
from wiseflow_nb.pool._future import PoolFuture
from wiseflow_nb.pool._process import ProcessWorkers, check_kind
from wiseflow_nb.pool._view import PoolView
from wiseflow_nb.pool._work import PoolStats, map_within, records_frame
from wiseflow_nb.records import PoolStatus, Priority

if TYPE_CHECKING:
    import pandas as pd

P = ParamSpec("P")
T = TypeVar("T")
_NORMAL = Priority.NORMAL


class ThreadPoolManager(Executor):
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
    30 s, up to HIGH. Workers are daemon threads; at the interpreter's end they are waited for 1.5 s.

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
        self._crew = Crew(low, high, clock, thread_name_prefix, initializer, initargs)
        self._crew.owned_by(self)
        self._listeners: list[weakref.WeakMethod[Callable[[], None]]] = []
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
        # Not by way of _submit: a call saved where it counts.
        crew = self._crew
        future = PoolFuture(crew, fn, args, kwargs, _NORMAL, _label(fn), None)
        crew.put(future)
        return future

    def map(
        self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[T]:
        """Submit ``fn`` for each tuple of items at once; return an iterator over the results, in order.

        Parameters
        ----------
        timeout
            Seconds from now until the last result must have come; default none.
        chunksize
            Without effect, as in every pool of threads.

        Raises
        ------
        TimeoutError
            By the iterator, when the time is over; calls that had not begun are cancelled.

        Examples
        --------
        >>> with ThreadPoolManager() as pool:
        ...     list(pool.map(pow, [2, 3], [3, 2], timeout=10))
        [8, 9]
        """
        if timeout is None:
            return super().map(fn, *iterables)
        return map_within(self, fn, zip(*iterables, strict=False), timeout)

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
            comes back must pickle. Workers are used again: what a call leaves behind in its process
            (environment, working directory, modules) the next one there finds.

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
        future = PoolFuture(self._crew, fn, args, kwargs, priority, name or _label(fn), cleanup)
        self._crew.put(future)
        return future

    # -- steering ---------------------------------------------------------------------------

    def reprioritise(self, future: Future[Any], priority: Priority | str | int) -> bool:
        """Change the class of queued work, keeping its age; return whether it was still queued."""
        wanted = _priority(priority)
        crew = self._crew
        if not isinstance(future, PoolFuture) or future._crew is not crew:
            return False
        with crew.lock:
            return crew.queue.reprioritise(future, wanted)

    def cancel_running(self, future: Future[Any], reason: str = "cancelled") -> bool:
        """Ask running work to stop; return whether it was running.

        The work's ``current_task().cancelled`` turns true. A thread cannot be stopped from outside:
        it keeps its worker until it returns. In a process, ``TaskCancelledError`` is raised in the
        code after 0.25 s, and after 0.5 s the process is killed with all that it started.
        """
        crew = self._crew
        if not isinstance(future, PoolFuture) or future._crew is not crew:
            return False
        return crew.stop_running(future, reason)

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
        crew = self._crew
        with crew.lock:
            low, high = crew.min_workers, crew.max_workers
            target = min(max(int(workers), low), high)
            crew.set_size(low, high, target, reason or "set by resize")
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
        crew = self._crew
        with crew.lock:
            wanted = max_workers if crew.target == crew.max_workers else crew.target
            target = min(max(wanted, min_workers), max_workers)
            crew.set_size(min_workers, max_workers, target, f"brought within the bounds {min_workers}-{max_workers}")
        self._tell_listeners()

    def release(self) -> None:
        """End the workers that have nothing to do, processes too; new ones start when there is work again."""
        self._crew.dismiss_idle()
        self.processes.release()

    def blocked(self) -> AbstractContextManager[None]:
        """While a worker of this pool waits in this block for other work, one more worker may run.

        Called from any other thread it does nothing.
        """
        return self._crew.blocked()

    # -- looking ----------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """How much work is queued or running."""
        crew = self._crew
        with crew.lock:
            return crew.queue.size + crew.busy

    @property
    def target(self) -> int:
        """How many workers there may be now, those made up for blocked ones not counted."""
        return self._crew.target

    @property
    def free_workers(self) -> int:
        """How many further calls could begin now; a worker that is not there yet counts."""
        crew = self._crew
        with crew.lock:
            return crew.room

    @property
    def _max_workers(self) -> int:
        # The name that dask looks for when it is handed an executor.
        return self._crew.max_workers

    def status(self) -> PoolStatus:
        """The pool at this moment; ``workers`` are threads that are really there."""
        crew = self._crew
        with crew.lock:
            stats = crew.stats()
            return PoolStatus(
                workers=crew.workers,
                busy=stats.running,
                queued=stats.queued,
                min_workers=crew.min_workers,
                max_workers=crew.max_workers,
                target=crew.target,
                reason=crew.reason,
                completed=stats.completed,
                failed=stats.failed,
            )

    def stats(self) -> PoolStats:
        """Totals since the pool was made."""
        return self._crew.stats()

    def records(self) -> pd.DataFrame:
        """One row per finished work, the newest 10,000: queue, wall and CPU seconds, exit state.

        Times are UTC. pandas is imported by the first call.
        """
        return records_frame(self._crew.records())

    # -- ending -----------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; let queued work run, or cancel it; wait for the workers if asked."""
        self._crew.close(cancel_queued=cancel_futures)
        if wait:
            self._crew.join(None)
        self.processes.close()

    def join(self, timeout: float | None = None) -> bool:
        """After ``shutdown``, wait for the workers to end, at most ``timeout`` seconds; return whether they have."""
        return self._crew.join(None if timeout is None else time.monotonic() + timeout)

    def _add_listener(self, listener: Callable[[], None]) -> Callable[[], None]:
        # A method, held weakly: whose it is may be dropped without a word, and the pool be used by others.
        remove = functools.partial(_remove, self._listeners)
        known = weakref.WeakMethod(listener, remove)
        self._listeners.append(known)
        return functools.partial(remove, known)

    def _tell_listeners(self) -> None:
        for known in tuple(self._listeners):
            if (listener := known()) is not None:
                listener()

    def __repr__(self) -> str:
        status = self.status()
        return (
            f"<ThreadPoolManager workers={status.workers} ({status.min_workers}-{status.max_workers}) "
            f"busy={status.busy} queued={status.queued}>"
        )


def _remove(listeners: list[Any], known: object) -> None:
    with contextlib.suppress(ValueError):
        listeners.remove(known)


def _label(fn: Callable[..., Any]) -> str:
    try:
        return fn.__qualname__
    except AttributeError:
        return type(fn).__name__


def _priority(value: Priority | str | int) -> Priority:
    try:
        return Priority.parse(value)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_bounds(low: int, high: int) -> None:
    if low < 1 or high < low:
        raise UsageError(f"bounds {low}-{high} do not fit; give 1 <= min_workers <= max_workers")
