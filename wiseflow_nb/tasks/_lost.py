"""What becomes of coroutines whose loop is gone: they end CANCELLED, with the reason, and are cleaned up.

Only a loop that belongs to somebody else can go before its manager. One that is *over* takes no
further coroutine, and what runs there is asked to stop; once it is closed, or will not run again,
nothing ends by itself any more.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from typing import TYPE_CHECKING

from wiseflow_nb.tasks._job import Attempt, Effects
from wiseflow_nb.tasks._lives import perform
from wiseflow_nb.tasks._loop import logger
from wiseflow_nb.tasks._machine import Stop

if TYPE_CHECKING:
    from wiseflow_nb.tasks._scheduler import Scheduler

REASON = "the loop that it was to run on has ended"


def call_runners(scheduler: Scheduler, called: list[int]) -> None:
    """Call for so many runners, without the lock; ``coming`` counts them already. See ``Runner.start``."""
    if scheduler.loop.over or not scheduler.loop.call(scheduler.runner.start, called):
        with scheduler.lock:
            scheduler.slots.coming -= called.pop() if called else 0
        look_at_loop(scheduler)


def look_at_loop(scheduler: Scheduler, *, ended: bool = False) -> None:
    """Before a wait that would never end: end the coroutines if their loop is over, or has ``ended`` for good."""
    if not (ended or scheduler.loop.over):
        return
    ended = ended or scheduler.loop.closed
    lost = 0
    effects: Effects = []
    with scheduler.lock:
        if ended:
            scheduler.slots.coming = 0  # those that were called for will not come
        # The newest first: a dependent is cancelled in its own right, not skipped.
        for job in [*scheduler.ledger.jobs.values()][::-1]:
            if job.kind != "async" or job.state.terminal:
                continue
            attempt = job.attempt
            if attempt is None or attempt.stop is not Stop.CANCEL:
                lost += 1
                scheduler._cancel(job, REASON, effects)
            if attempt is not None and ended and not attempt.ended:
                attempt.asked = attempt.ended = True
                attempt.error = asyncio.CancelledError(REASON)
                attempt.wall_seconds = scheduler.clock.monotonic() - attempt.started_at
                attempt.cpu_source = "coroutine_steps"
                effects.append(functools.partial(_clean_up, scheduler, attempt))
        scheduler._dispatch(effects)
    if lost:
        logger.warning("a loop that is not the manager's own has ended; coroutines cancelled for that: %d", lost)
    if ended:
        scheduler.runner.forget()
    perform(effects)


def _clean_up(scheduler: Scheduler, attempt: Attempt) -> None:
    # Cleanup may take its time, and whoever looks is about to wait for something else.
    variables = attempt.job.variables
    assert variables is not None
    clean = functools.partial(variables.run, _close, scheduler, attempt)
    try:
        threading.Thread(target=clean, name="wiseflow-cleanup", daemon=True).start()
    except RuntimeError:  # not to be had while the interpreter ends
        clean()


def _close(scheduler: Scheduler, attempt: Attempt) -> None:
    try:
        if attempt.coroutine is not None:
            attempt.coroutine.close()
    except BaseException:  # noqa: BLE001  user code: logged, and it is cancelled all the same
        logger.exception("closing the coroutine of %s failed", attempt.job.label)
    scheduler.runner._clean(attempt)
