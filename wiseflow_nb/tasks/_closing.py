"""How a manager ends: let run, cancel, wait, abandon what is left, stop the threads."""

from __future__ import annotations

from wiseflow_nb.errors import UsageError
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.records import TaskState
from wiseflow_nb.tasks._helping import refuse_coroutines, wait_for_all_on_loop
from wiseflow_nb.tasks._job import Effects
from wiseflow_nb.tasks._lives import perform
from wiseflow_nb.tasks._loop import HostLoop, logger
from wiseflow_nb.tasks._lost import look_at_loop
from wiseflow_nb.tasks._scheduler import Scheduler
from wiseflow_nb.tasks._waiting import attempt_here
from wiseflow_nb.tasks.task import settling

MODES = ("drain", "cancel_pending", "now")
#: What cleanup that is over its budget is given to return when everything else has ended.
OVERDUE_SECONDS = 2.0


def refuse_inside(scheduler: Scheduler, what: str) -> None:
    """Refuse what waits for all tasks where that would wait for itself.

    Raises
    ------
    UsageError
        Inside one of the manager's tasks, a done-callback of one, or on the loop of its own; or in a
        finaliser that runs in the midst of a change.
    """
    ours = scheduler.loop.current and not isinstance(scheduler.loop, HostLoop)
    if settling() is scheduler or scheduler.inside() or ours or attempt_here(scheduler) is not None:
        raise UsageError(
            f"{what} inside a task, or a done-callback of one, would wait for that very task; call it elsewhere, "
            "for instance on a thread of its own"
        )


def wait_for_all(scheduler: Scheduler, what: str, deadline: float | None) -> bool:
    """Wait until every task has ended; return whether they have.

    Raises
    ------
    UsageError
        Where that would wait for itself, or for coroutines whose loop it stops.
    """
    refuse_inside(scheduler, what)
    if not scheduler.later.carry_out(None if deadline is None else deadline - scheduler.clock.monotonic()):
        return False
    look_at_loop(scheduler)
    return _quiet(scheduler, what, deadline)


def _quiet(scheduler: Scheduler, what: str, deadline: float | None) -> bool:
    if isinstance(scheduler.loop, HostLoop) and scheduler.loop.current:
        wait_for_all_on_loop(scheduler, scheduler.loop, what, deadline)
    clock = scheduler.clock
    return clock.wait(scheduler.quiet, None if deadline is None else max(0.0, deadline - clock.monotonic()))


def close_scheduler(scheduler: Scheduler, mode: str, deadline: float | None) -> None:
    """End a scheduler; what still runs at ``deadline`` (monotonic seconds) is ABANDONED.

    Raises
    ------
    UsageError
        Where that would wait for itself, or for coroutines whose loop it stops; nothing was changed.
    """
    refuse_inside(scheduler, "shutdown")
    if scheduler.left_behind:
        return
    look_at_loop(scheduler)
    if isinstance(scheduler.loop, HostLoop) and scheduler.loop.current:
        refuse_coroutines(scheduler, "shutdown")
    scheduler.later.carry_out(None if deadline is None else deadline - scheduler.clock.monotonic())

    def close(effects: Effects) -> None:
        scheduler.closed = True
        scheduler.slots.paused = False
        if mode != "drain":
            cancel_all(scheduler, effects, running=mode == "now")

    scheduler.change(close)
    scheduler.loop.drive()
    if not _quiet(scheduler, "shutdown", deadline):
        abandon_all(scheduler, "shutdown")
    stop_threads(scheduler)


def close_pool(scheduler: Scheduler, pool: ThreadPoolManager, deadline: float | None) -> None:
    """Close the manager's own pool; with a deadline its threads are given ``OVERDUE_SECONDS`` to end."""
    if scheduler.left_behind:
        return
    with scheduler.lock:
        overdue = [handler.name for handler in scheduler.overdue]
        abandoned = scheduler.ledger.counts[TaskState.ABANDONED]
    # A done-callback that has not returned by the deadline is waited for no more than a task's code.
    left = abandoned or not scheduler.quiet.is_set()
    wait = deadline is None and not overdue and not left
    pool.shutdown(wait=wait)
    if not wait and not left and not pool.join(OVERDUE_SECONDS) and overdue:
        logger.warning(
            "left behind on threads that end with the process: cleanup that is over its budget and still runs (%s)",
            ", ".join(overdue),
        )


def stop_threads(scheduler: Scheduler) -> None:
    """End the timer and the loop, and the processes if they are the manager's own."""
    if scheduler.last is not None:
        scheduler.last.detach()
    scheduler.stop_listening()
    if not isinstance(scheduler.pool, ThreadPoolManager):
        scheduler.processes.close()
    scheduler.timers.close()
    scheduler.loop.stop()


def abandon_all(scheduler: Scheduler, reason: str) -> None:
    """Cancel what has not begun, and wait no longer for what still runs: it is ABANDONED."""
    effects: Effects = []
    with scheduler.lock:
        cancel_all(scheduler, effects, running=False, reason=reason)
        for job in list(scheduler.ledger.jobs.values()):
            scheduler._abandon(job, effects)
    perform(effects)


def cancel_all(scheduler: Scheduler, effects: Effects, *, running: bool, reason: str = "shutdown") -> None:
    """Cancel what has not begun, and ask what runs to stop if ``running``; the lock is held."""
    scheduler.retries_allowed = False
    # The newest first: a dependent is cancelled in its own right, not skipped.
    for job in sorted(scheduler.ledger.jobs.values(), key=lambda item: -item.number):
        if not job.state.terminal and (running or job.attempt is None):
            scheduler._cancel(job, reason, effects)
