"""``TaskManager``: the public face of the tasks."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Executor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar, overload

from wiseflow_nb.clock import SYSTEM_CLOCK, Clock
from wiseflow_nb.config import Settings
from wiseflow_nb.errors import UsageError
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.records import Priority, TaskRecord, text_of
from wiseflow_nb.tasks._admission import Admission
from wiseflow_nb.tasks._cleanup import Registered
from wiseflow_nb.tasks._closing import MODES, close_pool, close_scheduler, refuse_inside, wait_for_all
from wiseflow_nb.tasks._endings import watch_over
from wiseflow_nb.tasks._frame import TaskFrame
from wiseflow_nb.tasks._graph import swapped
from wiseflow_nb.tasks._job import Job
from wiseflow_nb.tasks._ledger import OnChange, OnMove, with_records
from wiseflow_nb.tasks._loop import TaskLoop, chosen_loop
from wiseflow_nb.tasks._options import CLEANUP_SECONDS, TaskOptions
from wiseflow_nb.tasks._replay import retry_plan
from wiseflow_nb.tasks._scheduler import Scheduler
from wiseflow_nb.tasks._stalled import StalledTask, find_stalled
from wiseflow_nb.tasks._views import TaskFunction, TaskResults, TaskView
from wiseflow_nb.tasks._waiting import starved
from wiseflow_nb.tasks.task import Task

if TYPE_CHECKING:
    import pandas as pd

P = ParamSpec("P")
T = TypeVar("T")

DEFAULTS = TaskOptions()
#: What ``shutdown("now")`` gives running code to stop, in seconds, when it is not told.
NOW_SECONDS = 5.0


class TaskManager:
    """Runs tasks: coroutines on a loop thread of its own, plain callables on a pool or in processes.

    Parameters
    ----------
    pool
        Where plain callables run; any executor. Default: a ``ThreadPoolManager`` of its own, which
        is closed with the manager.
    settings
        Where the default of ``max_concurrent`` comes from; default ``Settings()``.
    max_concurrent
        Tasks that run at once, at least 1; default ``settings.max_concurrent_tasks`` (4).
    clock
        What time-outs, retries and ageing go by.
    on_change
        Called with each new record and its transition (None for progress), in order, under the
        manager's lock: it should do no more than append.
    on_move
        Likewise, but given what has the ``task_id`` and gives the newest ``record`` when it is asked,
        instead of a record: making one takes longer than most of what the manager does for a task.
    id_prefix
        Task ids are this and a number.
    loop
        Where coroutines run: ``own`` (default), a thread that goes on while a cell runs; ``kernel``,
        the loop that runs here now, for code bound to it; or a ``wiseflow_nb.testing.ManualLoop``.
    memory_available
        Gives the bytes of memory that are free now, for tasks with ``memory=``; default unknown,
        which holds nothing back.
    pressure
        Gives ``none``, ``warning`` or ``critical``: at critical no task starts, but one of class
        critical at a time.

    Notes
    -----
    A result lives as long as somebody keeps the ``Task``; of the finished ones the manager keeps
    the last 100,000 records. When the interpreter ends, what is left has 1.2 s to run and is then
    cancelled, with a warning on the log. In a forked child it takes no task.

    Raises
    ------
    UsageError
        If ``max_concurrent`` is less than 1, or ``loop`` is none of these.

    Examples
    --------
    >>> with TaskManager() as tasks:
    ...     one = tasks.submit(pow, 2, 3)
    ...     tasks.options(priority="high", retry=2).submit(sum, [one, 1]).result()
    9
    """

    def __init__(
        self,
        pool: Executor | None = None,
        *,
        settings: Settings | None = None,
        max_concurrent: int | None = None,
        clock: Clock = SYSTEM_CLOCK,
        on_change: OnChange | None = None,
        on_move: OnMove | None = None,
        id_prefix: str = "t",
        loop: str | TaskLoop = "own",
        memory_available: Callable[[], float] | None = None,
        pressure: Callable[[], str] | None = None,
    ) -> None:
        given = settings if settings is not None else Settings.model_validate({})
        limit = _limit(given.max_concurrent_tasks if max_concurrent is None else max_concurrent)
        chosen = chosen_loop(loop)
        self._own_pool: ThreadPoolManager | None = None
        if pool is None:
            wanted = max(given.max_thread_workers, max_concurrent or 1)
            pool = self._own_pool = ThreadPoolManager(max_workers=wanted, settings=given, clock=clock)
        self._scheduler = Scheduler(
            pool,
            clock=clock,
            loop=chosen,
            limit=limit,
            admission=Admission(clock, memory_available, pressure),
            on_move=on_move if on_change is None else with_records(on_change, on_move),
            id_prefix=id_prefix,
        )
        watch_over(self._scheduler)
        self._clock = clock
        self._frame = TaskFrame()
        self._frame_lock = threading.Lock()

    # -- submitting --------------------------------------------------------------------------

    @overload
    def submit(self, fn: Callable[P, Coroutine[Any, Any, T]], /, *args: Any, **kwargs: Any) -> Task[T]: ...
    @overload
    def submit(self, fn: Callable[P, T], /, *args: Any, **kwargs: Any) -> Task[T]: ...
    @overload
    def submit(self, fn: Coroutine[Any, Any, T], /) -> Task[T]: ...
    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Task[Any]:
        """Submit a call (or a coroutine object) with default options; return its task.

        Tasks among the arguments, also one level deep in a list, tuple or dict, are dependencies
        and are replaced by their results.

        Raises
        ------
        PoolClosedError
            After ``shutdown``.
        DependencyError
            If a dependency is unknown, the task's own, or another manager's.
        """
        return self._scheduler.submit(fn, args, kwargs, DEFAULTS)

    def options(self, **options: Any) -> TaskView:
        """Return a light view that submits with these options.

        Parameters
        ----------
        name
            Default: the function's own.
        priority
            low, normal (default), high or critical.
        dependencies
            Tasks or ids that must end first, besides those among the arguments.
        retry
            A ``Retry`` or a number of further attempts; default 0.
        timeout
            Seconds that an attempt may run; default none.
        deadline
            Seconds from now within which the task must have ended, waits included; default none.
        cleanup
            Called after an attempt that did not complete; given the ``TaskContext`` if it has a
            required parameter; plain or asynchronous.
        cleanup_always
            Call it after an attempt that completed as well; default False.
        cleanup_budget
            Seconds that it may take; default 30. An asynchronous one is cancelled then, a plain one
            is waited for no longer.
        tags
            Words to find the task by.
        trigger
            ``all_completed`` (default), or ``all_done``: run whatever became of the dependencies;
            one that did not complete is then handed over as the ``Task`` itself.
        memory
            Bytes, or a text such as ``"2GB"``: the task starts only when so much is available.
        keep_result
            False: the value goes to the tasks submitted with it until then and is dropped;
            ``result()`` waits and gives None. Default True: it lives as long as the ``Task``.
        kind
            ``auto`` (default: ``async`` for a coroutine function, else ``thread``), ``thread``,
            ``async``, or ``process``: a worker process to itself, with exact CPU time and peak
            memory. A cancel or a time-out stops it: ``TaskCancelledError`` is raised in the code
            after 0.25 s, and after 0.5 s the process is killed with all that it started. If the
            process dies, that task alone fails with ``WorkerLostError``.
        idempotent
            With True a task whose worker process was lost is run once more; default not.

        Raises
        ------
        UsageError
            If an option is unknown or does not fit.

        Examples
        --------
        >>> with TaskManager() as tasks:
        ...     tasks.options(name="three", timeout=10).submit(sum, [1, 2]).result()
        3
        """
        return TaskView(self, TaskOptions().changed(options))

    @overload
    def task(self, which: str, /) -> Task[Any] | None: ...
    @overload
    def task(self, which: Callable[P, Any], /) -> TaskFunction[P]: ...
    @overload
    def task(self, which: None = None, /, **options: Any) -> Callable[[Callable[P, Any]], TaskFunction[P]]: ...
    def task(self, which: Any = None, /, **options: Any) -> Any:
        """Decorate a function; or, given an id, return that task.

        Calling a decorated function submits it with the options and returns the ``Task``; the plain
        function stays at hand as ``.fn``. For an id the answer is None if the task is unknown, or
        has ended and nobody keeps it.

        Examples
        --------
        >>> with TaskManager() as tasks:
        ...     @tasks.task(retry=1)
        ...     def double(x):
        ...         return 2 * x
        ...     eight = double(4)
        ...     eight.result(), double.fn(4), tasks.task(eight.id) is eight
        (8, 8, True)
        """
        if isinstance(which, str):
            job = self._find(which)
            return None if job is None else job.task_ref()
        view = self.options(**options)
        if which is not None:
            return TaskFunction(view, which)
        return functools.partial(TaskFunction, view)

    @overload
    def map(
        self, fn: Callable[..., Any], /, *iterables: Iterable[Any], outstanding: None = None
    ) -> list[Task[Any]]: ...
    @overload
    def map(self, fn: Callable[..., Any], /, *iterables: Iterable[Any], outstanding: int) -> TaskResults: ...
    def map(
        self, fn: Callable[..., Any], /, *iterables: Iterable[Any], outstanding: int | None = None
    ) -> list[Task[Any]] | TaskResults:
        """Submit ``fn`` once for each item (or tuple of items).

        Parameters
        ----------
        outstanding
            None (default): submit all at once and return the tasks in order. A number: return an
            iterator over the results in order (``for`` or ``async for``) that draws on the
            iterables as it goes and keeps at most so many tasks ahead of what was taken; they may
            be endless.

        Raises
        ------
        UsageError
            If ``outstanding`` is less than 1.

        Examples
        --------
        >>> import itertools
        >>> with TaskManager() as tasks, tasks.map(abs, itertools.count(-3), outstanding=4) as results:
        ...     [next(results) for _ in range(5)]
        [3, 2, 1, 0, 1]
        """
        return TaskView(self, TaskOptions()).map(fn, *iterables, outstanding=outstanding)

    def _submit(
        self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: TaskOptions, retry_of: str = ""
    ) -> Task[Any]:
        return self._scheduler.submit(fn, args, kwargs, options, retry_of)

    # -- steering ----------------------------------------------------------------------------

    def cancel(self, task_id: str, reason: str = "cancelled") -> bool:
        """Ask a task to stop; return False if it is unknown or had ended otherwise."""
        job = self._find(task_id)
        return job is not None and self._scheduler.cancel(job, text_of(reason))

    def reprioritise(self, task_id: str, priority: Priority | str | int) -> bool:
        """Change a task's class; return False if it is unknown or has ended."""
        wanted: Priority = TaskOptions().changed({"priority": priority}).priority
        job = self._find(task_id)
        return job is not None and self._scheduler.reprioritise(job, wanted)

    def retry(self, task_id: str) -> Task[Any]:
        """Submit an ended task anew, and whatever was skipped because of it; return the new task.

        Raises
        ------
        UsageError
            If there is no such task, or it has not ended, completed, was skipped, or was a
            coroutine object (which runs only once).
        """
        with self._scheduler.lock:
            plan = retry_plan(self._scheduler.ledger.jobs, task_id)
        renewed: dict[str, Task[Any]] = {}

        def renew(task: Task[Any]) -> Task[Any]:
            return renewed.get(task.id, task)

        for job in plan:
            fn, args, kwargs = job.call
            args, kwargs = swapped(args, kwargs, renew)
            needed = tuple(
                renew(item) if isinstance(item, Task) else renewed.get(item, item) for item in job.options.dependencies
            )
            options = replace(job.options, dependencies=needed)
            renewed[job.task_id] = self._submit(fn, args, kwargs, options, retry_of=job.task_id)
        return renewed[task_id]

    def set_max_concurrent(self, count: int) -> None:
        """Set how many tasks may run at once; those that run go on.

        Raises
        ------
        UsageError
            If it is less than 1.
        """
        limit = _limit(count)
        self._scheduler.set_limit(limit)

    @property
    def max_concurrent(self) -> int:
        """How many tasks may run at once."""
        return self._scheduler.slots.limit

    def pause(self) -> None:
        """Start no further task until ``resume``; those that run go on."""
        self._scheduler.set_paused(True)

    def resume(self) -> None:
        """Undo ``pause``."""
        self._scheduler.set_paused(False)

    @property
    def paused(self) -> bool:
        """Whether no further task starts."""
        return self._scheduler.slots.paused

    def register_resource_cleanup_handler(
        self, handler: Callable[..., Any], *, budget: float = CLEANUP_SECONDS, always: bool = False
    ) -> Callable[[], None]:
        """Call ``handler`` after every attempt that did not complete, when its code has stopped.

        Handlers run last registered first, after the task's own. A handler with a required
        parameter is given the ``TaskContext``; it may be asynchronous. A failing one is recorded in
        the task's reason and masks nothing.

        Parameters
        ----------
        budget
            Seconds that it may take, default 30; an asynchronous one is cancelled then, a plain one
            is waited for no longer, and said so.
        always
            Call it after attempts that completed as well; default False.

        Returns
        -------
        callable
            Call it to remove the handler.

        Raises
        ------
        UsageError
            If it cannot be called, or the budget is no time.
        """
        if not callable(handler):
            raise UsageError(f"cleanup handler {handler!r} cannot be called; give a function")
        TaskOptions().changed({"cleanup_budget": budget, "cleanup_always": always})
        entry = Registered(handler, float(budget), always)
        with self._scheduler.lock:
            self._scheduler.handlers.append(entry)

        def remove() -> None:
            with self._scheduler.lock:
                # By identity: the same function may be registered twice.
                self._scheduler.handlers[:] = [item for item in self._scheduler.handlers if item is not entry]

        return remove

    # -- looking -----------------------------------------------------------------------------

    @property
    def pool(self) -> Executor:
        """Where plain callables run."""
        return self._scheduler.pool

    @property
    def rev(self) -> int:
        """The revision of the newest change."""
        return self._scheduler.ledger.rev

    def records(self, since_rev: int = 0) -> tuple[TaskRecord, ...]:
        """The records that changed after ``since_rev``, in order of ``rev``."""
        with self._scheduler.lock:
            return self._scheduler.ledger.since(since_rev)

    def counts(self) -> dict[str, int]:
        """How many tasks are in each state, every state named; the records of the oldest may not be kept any more."""
        with self._scheduler.lock:
            return {state.value: count for state, count in self._scheduler.ledger.counts_over_all.items()}

    @property
    def dropped_rev(self) -> int:
        """The last change of any task whose record is no longer kept; 0 while all are."""
        return self._scheduler.ledger.dropped_rev

    def get(self, task_id: str) -> TaskRecord | None:
        """The record of a task, or None."""
        job = self._find(task_id)
        return None if job is None else job.record

    @property
    def pending_thread_tasks(self) -> int:
        """Ready plain calls that have a free slot but no worker yet (those the pool has are in its ``pending``)."""
        with self._scheduler.lock:
            slots = self._scheduler.slots
            return max(0, min(slots.ready_threads, slots.limit - slots.held) - slots.tickets)

    @property
    def hold_reason(self) -> str:
        """Why ready tasks do not start though there is a slot; empty if nothing holds them back."""
        with self._scheduler.lock:
            slots = self._scheduler.slots
            if slots.paused:
                return "paused: no task starts until resume"
            waiting = min(slots.tickets, slots.ready_threads) if slots.held < slots.limit else 0
            reason = slots.hold_reason
            if waiting:
                reason = "; ".join(filter(None, (starved(self._scheduler), reason)))
        pool = self.pool
        if waiting and isinstance(pool, ThreadPoolManager) and not pool.free_workers:
            busy = f"plain calls wait for a worker: all of the pool's {pool.target} are busy with other work"
            return "; ".join(filter(None, (busy, reason)))
        return reason

    def stalled(self, now_seconds: float | None = None) -> list[StalledTask]:
        """Running tasks that need a look, the longest first.

        Those far over the usual time of their name, those that told progress once and not for
        long, and those that were asked to stop and have not.

        Parameters
        ----------
        now_seconds
            The moment to judge by, since the epoch; default now.

        Examples
        --------
        >>> with TaskManager() as tasks:
        ...     tasks.stalled()
        []
        """
        now = self._clock.time() if now_seconds is None else now_seconds
        with self._scheduler.lock:
            return find_stalled(self._scheduler.running(), self._scheduler.ledger.usual.usual, now)

    @property
    def cleanup_failures(self) -> int:
        """How many cleanup handlers have failed."""
        return self._scheduler.cleanup_failures

    @property
    def callback_failures(self) -> int:
        """How often a task's done-callback, or ``on_change`` or ``on_move``, has raised."""
        return self._scheduler.callback_failures + self._scheduler.ledger.callback_failures

    def frame(self) -> pd.DataFrame:
        """One row a task, in order of creation, indexed by ``task_id``; times are UTC, durations seconds.

        pandas is imported by the first call.
        """
        with self._frame_lock:
            with self._scheduler.lock:
                jobs = self._scheduler.ledger.jobs
                changed = [*self._scheduler.ledger.changed(self._frame.rev)][::-1]
                records = [job.record for job in changed]
                count = len(jobs)
                # The ids are needed where some have gone; else their number says that all are there.
                new = sorted((job.number, job.task_id) for job in changed if not self._frame.has(job.task_id))
                known = jobs.keys() if len(self._frame) + len(new) == count else set(jobs)
            return self._frame.patched(records, [task_id for _, task_id in new], known, count)

    def _find(self, task_id: str) -> Job | None:
        return self._scheduler.ledger.jobs.get(task_id)

    # -- ending ------------------------------------------------------------------------------

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until every task submitted so far has ended, without closing; return whether they have.

        Parameters
        ----------
        timeout
            Seconds; default none.

        Raises
        ------
        UsageError
            Inside one of the manager's own tasks or their done-callbacks, which would wait for itself; on
            the loop that its coroutines run on, while there are any.

        Examples
        --------
        >>> with TaskManager() as tasks:
        ...     task = tasks.submit(int)
        ...     tasks.drain(), task.done()
        (True, True)
        """
        deadline = None if timeout is None else self._clock.monotonic() + timeout
        return wait_for_all(self._scheduler, "drain", deadline)

    def shutdown(self, mode: str = "drain", timeout: float | None = None) -> None:
        """Take no more tasks and end; may be called again, also with a stronger mode.

        Parameters
        ----------
        mode
            ``drain`` (default) lets everything run, ``cancel_pending`` what runs already, ``now``
            asks that to stop as well.
        timeout
            Seconds until what still runs is ABANDONED; default none, with ``now`` 5. A cleanup handler
            that is over its budget and still runs is waited for 2 s more, and left behind with a warning.

        Raises
        ------
        UsageError
            If the mode is unknown, or it is called inside one of the manager's own tasks or their
            done-callbacks, or on the loop that its coroutines run on while there are any.
        """
        if mode not in MODES:
            raise UsageError(f"shutdown mode {mode!r} is unknown; give one of {', '.join(MODES)}")
        if timeout is None and mode == "now":
            timeout = NOW_SECONDS
        deadline = None if timeout is None else self._clock.monotonic() + timeout
        close_scheduler(self._scheduler, mode, deadline)
        if self._own_pool is not None:
            close_pool(self._scheduler, self._own_pool, deadline)

    def refuse_inside(self, what: str) -> None:
        """Refuse what waits for all tasks where that would wait for itself.

        Raises
        ------
        UsageError
            Inside one of the manager's tasks, a done-callback of one, or on the loop of its own; or in a
            finaliser that runs in the midst of a change.
        """
        refuse_inside(self._scheduler, what)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        # Off the caller's loop: a task may need it in order to end.
        await asyncio.to_thread(self.shutdown, "drain")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.shutdown("drain")
        except UsageError as refused:
            if error is None:
                raise
            error.add_note(f"the task manager was left open: {refused}")

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {state}" for state, count in self.counts().items() if count)
        return f"<TaskManager {counts or 'empty'}; at most {self.max_concurrent} at once>"


def _limit(count: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(f"max_concurrent {count!r} lets nothing run; give 1 or more")
    return count
