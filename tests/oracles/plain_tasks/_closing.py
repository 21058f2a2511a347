"""How a manager ends: let run, cancel, wait, abandon what is left, stop the threads."""

from __future__ import annotations

from tests.oracles.plain_tasks._job import Effects
from tests.oracles.plain_tasks._lives import perform
from tests.oracles.plain_tasks._scheduler import Scheduler

MODES = ("drain", "cancel_pending", "now")


def close_scheduler(scheduler: Scheduler, mode: str, deadline: float | None) -> None:
    """End a scheduler; what still runs at ``deadline`` (monotonic seconds) is ABANDONED."""
    effects: Effects = []
    with scheduler.lock:
        scheduler.closed = True
        scheduler.slots.paused = False
        if mode != "drain":
            _cancel_all(scheduler, effects, running=mode == "now")
        scheduler._dispatch(effects)
    perform(effects)
    scheduler.loop.drive()
    clock = scheduler.clock
    clock.wait(scheduler.quiet, None if deadline is None else max(0.0, deadline - clock.monotonic()))
    if not scheduler.quiet.is_set():
        effects = []
        with scheduler.lock:
            _cancel_all(scheduler, effects, running=False)
            for job in list(scheduler.ledger.jobs.values()):
                scheduler._abandon(job, effects)
        perform(effects)
    scheduler.stop_listening()
    scheduler.timers.close()
    scheduler.loop.stop()


def _cancel_all(scheduler: Scheduler, effects: Effects, *, running: bool) -> None:
    scheduler.retries_allowed = False
    # The newest first: a dependent is cancelled in its own right, not skipped.
    for job in sorted(scheduler.ledger.jobs.values(), key=lambda item: -item.number):
        if not job.state.terminal and (running or job.attempt is None):
            scheduler._cancel(job, "shutdown", effects)
