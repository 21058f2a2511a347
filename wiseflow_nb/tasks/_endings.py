"""How a manager ends that nobody shuts down: with the interpreter, in a forked child, or with its last user."""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
import time
import weakref
from concurrent.futures import wait
from typing import Any

from wiseflow_nb import context
from wiseflow_nb.pool._exit import Ends, Stopped, end_at_exit
from wiseflow_nb.tasks import _output, task
from wiseflow_nb.tasks._closing import abandon_all, cancel_all, stop_threads
from wiseflow_nb.tasks._job import Effects
from wiseflow_nb.tasks._later import Later
from wiseflow_nb.tasks._lives import perform
from wiseflow_nb.tasks._loop import HostLoop, LoopThread
from wiseflow_nb.tasks._lost import look_at_loop
from wiseflow_nb.tasks._scheduler import Scheduler
from wiseflow_nb.tasks._slots import Slots
from wiseflow_nb.tasks._timer import Timers

EXIT_REASON = "the interpreter ended"
#: Before the last moment, for writing down what did not stop.
ABANDON_SECONDS = 0.1


def watch_over(scheduler: Scheduler) -> None:
    """See to it that a scheduler ends well whatever becomes of its manager."""
    # Other loops are their makers', and on a clock of another kind the timers have no thread.
    loop = scheduler.loop if isinstance(scheduler.loop, (HostLoop, LoopThread)) else None
    timers = scheduler.timers if scheduler.machine_time else None
    if loop is not None or timers is not None:
        scheduler.last = weakref.finalize(scheduler, _let_go, os.getpid(), timers, loop)
        scheduler.last.atexit = False
    if isinstance(scheduler.loop, HostLoop):
        known = weakref.ref(scheduler)

        def over() -> None:
            if (still := known()) is not None:
                look_at_loop(still)

        scheduler.loop.when_over(over)
    if scheduler.machine_time:  # else nothing would happen by itself at the end
        end_at_exit(scheduler, ENDS)


# -- nobody refers to it any more ---------------------------------------------------------------


def _let_go(pid: int, timers: Timers | None, loop: HostLoop | LoopThread | None) -> None:
    # The collector calls this, in any thread and at any step: locks of these may be held there and then.
    if pid == os.getpid():
        with contextlib.suppress(RuntimeError):  # the interpreter is ending: they are daemon threads
            _thread.start_new_thread(_begin_stop, (timers, loop))


def _begin_stop(timers: Timers | None, loop: HostLoop | LoopThread | None) -> None:
    # On a thread that the threading module knows, else it would list this one for ever.
    with contextlib.suppress(RuntimeError):
        threading.Thread(target=_stop_both, args=(timers, loop), name="wiseflow-end", daemon=True).start()


def _stop_both(timers: Timers | None, loop: HostLoop | LoopThread | None) -> None:
    if timers is not None:
        timers.close()
    if loop is not None:
        loop.stop()


# -- the interpreter's end ----------------------------------------------------------------------


def _let_run(scheduler: Scheduler, until: float) -> None:
    if scheduler.left_behind:
        return
    host = scheduler.loop
    if isinstance(host, HostLoop):
        look_at_loop(scheduler, ended=not host.runs)
    with scheduler.lock:
        if not scheduler.slots.paused:
            waited = None
        else:  # nobody is left who could have the others begin
            waited = [job.task for job in scheduler.ledger.jobs.values() if job.attempt is not None]
    if waited is None:
        scheduler.quiet.wait(max(0.0, until - time.monotonic()))
    else:
        wait([item for item in waited if item is not None], max(0.0, until - time.monotonic()))


def _stop(scheduler: Scheduler) -> Stopped:
    effects: Effects = []
    with scheduler.lock:
        if not scheduler.closed:
            scheduler.closed = True
            scheduler.refusal = "the interpreter is ending, no further task can run; submit it earlier"
        jobs = () if scheduler.left_behind else scheduler.ledger.jobs.values()
        left = [job for job in jobs if not job.state.terminal]
        running = sum(job.attempt is not None for job in left)
        if left:
            cancel_all(scheduler, effects, running=True, reason=EXIT_REASON)
        scheduler._dispatch(effects)

    def finish(deadline: float) -> None:
        perform(effects)
        scheduler.quiet.wait(max(0.0, deadline - ABANDON_SECONDS - time.monotonic()))
        if not scheduler.quiet.is_set():
            abandon_all(scheduler, EXIT_REASON)
        if not scheduler.left_behind:
            stop_threads(scheduler)

    return Stopped(len(left) - running, running, finish)


# -- a forked child -----------------------------------------------------------------------------


def _leave_behind(scheduler: Scheduler) -> None:
    # The threads, the loop and the tasks are the parent's. Here it can be looked at, and takes no task.
    for lock in (scheduler.lock, task.ending, _output._lock, context._lock):
        _renew(lock)
    scheduler.busy = False
    scheduler.later = Later()
    scheduler.left_behind = scheduler.closed = True
    scheduler.refusal = "the task manager stayed with the process that this one was forked from; make a new one here"
    slots = scheduler.slots
    scheduler.slots = Slots(slots.limit, slots.room, slots.admission)
    scheduler.ledger.tell_nobody()
    scheduler.timers.forget()
    scheduler.quiet = type(scheduler.quiet)()
    scheduler.quiet.set()


def _renew(lock: Any) -> None:
    # As the standard library does with its own: another thread of the parent may hold it.
    lock._at_fork_reinit()


ENDS = Ends(_let_run, _stop, _leave_behind)
