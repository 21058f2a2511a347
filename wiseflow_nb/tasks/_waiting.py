"""Waiting for a task inside a task: the slot is given up, and taken back before the code goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from wiseflow_nb.context import current_task
from wiseflow_nb.errors import DependencyError, UsageError
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.tasks._graph import find_path
from wiseflow_nb.tasks._helping import help_out, wait_on_loop, without
from wiseflow_nb.tasks._job import Attempt, Effects, Job
from wiseflow_nb.tasks._lives import perform
from wiseflow_nb.tasks._loop import HostLoop
from wiseflow_nb.tasks._lost import look_at_loop

if TYPE_CHECKING:
    from wiseflow_nb.tasks._scheduler import Scheduler
    from wiseflow_nb.tasks.task import Task


class Wait:
    """A wait of a task's own code for another task; of any other code, nothing."""

    __slots__ = ("attempt", "effects", "job", "lasts", "target")

    def __init__(self, target: Job) -> None:
        self.target = target
        self.job: Job | None = None
        self.attempt: Attempt | None = None
        #: Whether it has begun and is not over.
        self.lasts = False
        self.effects: Effects = []


@contextlib.contextmanager
def blocking(scheduler: Scheduler, task: Task[Any], timeout: float | None) -> Iterator[None]:
    """Wrap a blocking wait for a task.

    Raises
    ------
    UsageError
        On the loop that runs the manager's coroutines, where the wait would stop what is waited for;
        in a forked child; in a finaliser that holds the manager up.
    DependencyError
        If the task waits for the caller.
    """
    if task.done():
        yield
        return
    if scheduler.inside():
        raise UsageError(f"waiting for {task!r} in a finaliser would never end: it runs in the midst of a change")
    if scheduler.left_behind or scheduler.loop.over:
        _refuse_behind(scheduler, task)
        look_at_loop(scheduler)
    if scheduler.loop.current:
        if not isinstance(scheduler.loop, HostLoop) or attempt_here(scheduler) is not None:
            which = "runs it" if task._job.kind == "async" else "runs the manager's coroutines"
            raise UsageError(f"waiting for {task!r} here would stop the loop that {which}; write `await task` instead")
        wait_on_loop(scheduler, scheduler.loop, task, timeout)
        yield
        return
    pool = scheduler.pool
    with contextlib.ExitStack() as stack:
        ours = isinstance(pool, ThreadPoolManager)
        if isinstance(pool, ThreadPoolManager):
            stack.enter_context(pool.blocked())
        wait = Wait(task._job)
        whole = False
        try:
            try:
                _park(scheduler, task, wait)
                # With a bound it only waits: a call that was begun here could not be left when the time is over.
                if wait.attempt is not None and not ours and timeout is None and wait.attempt.job.kind != "async":
                    help_out(scheduler, task, wait.attempt)
                yield
            finally:
                grant = _unpark(scheduler, wait)
                if grant is not None:
                    grant.result()
                whole = True
        finally:
            if not whole:
                _give_up(scheduler, wait)


def starved(scheduler: Scheduler) -> str:
    """Why calls for workers may never be taken up, the lock being held; empty if nothing speaks for it."""
    if isinstance(scheduler.pool, ThreadPoolManager):  # it has a worker more for each that waits
        return ""
    jobs = scheduler.ledger.jobs.values()
    stuck = sum(job.wait_depth > 0 and job.attempt is not None and job.kind != "async" for job in jobs)
    if not stuck:
        return ""
    return (
        f"plain calls wait for a worker of the executor, and {stuck} that have one wait for other tasks; "
        "give it more workers, or use a ThreadPoolManager, which makes up for those that wait"
    )


async def awaiting(scheduler: Scheduler, task: Task[Any]) -> Any:
    """Await a task from any loop; inside a task its slot is free meanwhile."""
    if task.done():
        return task.result()
    if scheduler.left_behind or scheduler.loop.over:
        _refuse_behind(scheduler, task)
        look_at_loop(scheduler)
    wait = Wait(task._job)
    try:
        _park(scheduler, task, wait)
        return await asyncio.wrap_future(task)
    except asyncio.CancelledError:
        me = asyncio.current_task()
        if task.cancelled() and not (me is not None and me.cancelling()):
            # The awaited task was cancelled, not the one that awaits it.
            raise task._as_cancelled() from None
        raise
    finally:
        grant = _unpark(scheduler, wait)
        if grant is not None:
            await _granted(grant)


def _refuse_behind(scheduler: Scheduler, task: Task[Any]) -> None:
    """Refuse to wait for what no one will tell of here.

    Raises
    ------
    UsageError
        In a forked child, of a task of the parent's.
    """
    if scheduler.left_behind:
        raise UsageError(f"{task!r} stayed with the process that this one was forked from; wait for it there")


async def _granted(grant: Future[None]) -> None:
    # A time-out around the wait may strike here. The code goes on all the same, to handle it, and needs
    # its slot for that: so it is waited for, and the time-out raised then. Whoever is asked to stop by
    # the manager is let through without.
    late: asyncio.CancelledError | None = None
    while not grant.done():
        try:
            await asyncio.shield(asyncio.wrap_future(grant))
        except asyncio.CancelledError as caught:
            late = caught
    if late is not None:
        raise late


def attempt_here(scheduler: Scheduler) -> tuple[Job, Attempt] | None:
    """The task whose code this is, and its attempt; None outside of the manager's tasks."""
    context = current_task()
    job = None if context is None else scheduler.ledger.jobs.get(context.task_id)
    attempt = None if job is None else job.attempt
    return None if job is None or attempt is None or attempt.context is not context else (job, attempt)


def _park(scheduler: Scheduler, task: Task[Any], wait: Wait) -> None:
    with scheduler.lock:
        found = attempt_here(scheduler)
        target = wait.target
        if found is None or task._scheduler is not scheduler or target.state.terminal:
            return
        job, wait.attempt = found
        path = find_path(target, job, _unfinished)
        if path is not None:
            told = " -> ".join(item.task_id for item in [job, *path])
            raise DependencyError(f"waiting here would never end, each waits for the next: {told}; wait elsewhere")
        # Steps between which no interrupt comes.
        job.waiting_on += (target,)
        target.waiters += (job,)
        job.wait_depth += 1
        wait.job, wait.lasts = job, True
        scheduler._lend(target, job.level)
        scheduler.slots.release(job)
        # Another wait of the same task may be over and want the slot back: as long as one lasts, none has it.
        scheduler._drop_grant(job, wait.effects)
        scheduler._dispatch(wait.effects)
    perform(wait.effects)


def _unpark(scheduler: Scheduler, wait: Wait) -> Future[None] | None:
    job, attempt = wait.job, wait.attempt
    if job is None or attempt is None:
        return None
    grant: Future[None] | None = None
    with scheduler.lock:
        _end(scheduler, wait)
        # What was asked to stop unwinds without a slot: waiting for one would hold the stop up.
        if job.wait_depth == 0 and job.attempt is attempt and not attempt.context.cancelled:
            grant = scheduler.slots.want_back(job)
        scheduler._dispatch(wait.effects)
    perform(wait.effects)
    return grant


def _end(scheduler: Scheduler, wait: Wait) -> None:
    job, target = wait.job, wait.target
    if job is not None and wait.lasts:
        waits = without(job.waiting_on, target), without(target.waiters, job)
        # As above.
        job.waiting_on, target.waiters = waits
        job.wait_depth -= 1
        wait.lasts = False
        scheduler._lower(target, job.level)


def _give_up(scheduler: Scheduler, wait: Wait) -> None:
    # After an interrupt: the code is to unwind, and does without a slot.
    def step(effects: Effects) -> None:
        _end(scheduler, wait)
        if wait.job is not None:
            scheduler._drop_grant(wait.job, effects)

    scheduler.mend(wait.effects, step)


def _unfinished(job: Job) -> list[Job]:
    return [item for item in (*job.dependencies, *job.waiting_on) if not item.state.terminal]
