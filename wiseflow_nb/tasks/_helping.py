"""Blocking waits that hold up what they wait for, and what is done about it.

A worker of an executor that is not ours cannot be made up for while it waits. So it runs what it
waits for itself, as the workers of fork-join pools do: only that, since whatever else it took up
would have to return before it can go on, and might wait for this very task.

Who waits on a loop that runs already, as code in a notebook's cell does, stops it: that is no harm
as long as nothing that is waited for needs the loop.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from wiseflow_nb.errors import UsageError
from wiseflow_nb.tasks._job import Attempt, Effects, Job
from wiseflow_nb.tasks._lives import perform
from wiseflow_nb.tasks._loop import HostLoop
from wiseflow_nb.tasks._machine import FIRST_TERMINAL, PENDING

if TYPE_CHECKING:
    from wiseflow_nb.tasks._scheduler import Scheduler
    from wiseflow_nb.tasks.task import Task

#: So many calls may run inside one another's waits on one thread: each takes a dozen frames of its stack.
DEPTH = 20

_inside = threading.local()


class Bell:
    """Rung when the awaited task ends, and when something has changed since a look was taken."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        #: How many calls run inside one another's waits on this thread.
        self.depth: int = getattr(_inside, "depth", 0)
        self.event = threading.Event()
        #: What needs the loop that this wait stops.
        self.needed = ""

    def need(self, what: str) -> None:
        """Say that something needs the loop that is stopped."""
        self.needed = what
        self.event.set()

    def _ended(self, _: object) -> None:
        self.event.set()

    # What the standard library's futures tell those that watch them.
    add_result = add_exception = add_cancelled = _ended


class Path:
    """From a task along what it waits for, to one that waits for no other; each dependency is looked at once."""

    def __init__(self, job: Job, *, coroutines_too: bool) -> None:
        self._through = coroutines_too
        self._stack = [(job, iter(job.dependencies))]
        # Dependencies are for ever; what running code waits for is looked up anew each time.
        self._lasting = 1

    def end(self) -> Job:
        """The task at the end now, the lock being held; the first itself when it has ended."""
        stack = self._stack
        del stack[self._lasting :]
        while True:
            job, needed = stack[-1]
            if job.code >= FIRST_TERMINAL and len(stack) > 1:
                stack.pop()
                self._lasting = len(stack)
                continue
            if job.kind == "async" and not self._through:
                return job
            following = next((item for item in needed if item.code < FIRST_TERMINAL), None)
            if following is None:
                break
            stack.append((following, iter(following.dependencies)))
            self._lasting = len(stack)
        while self._through or job.kind != "async":
            following = next((item for item in job.waiting_on if item.code < FIRST_TERMINAL), None)
            following = following or next((item for item in job.dependencies if item.code < FIRST_TERMINAL), None)
            if following is None:
                break
            job = following
        return job


@contextlib.contextmanager
def _watching(scheduler: Scheduler, task: Task[Any]) -> Iterator[Bell]:
    bell = Bell()
    bells = scheduler.slots.bells
    # An interrupt may come between any two of these.
    try:
        with task._condition:
            task._waiters.append(bell)
        with scheduler.lock:
            bells.append(bell)
        if task.done():
            bell.event.set()
        yield bell
    finally:
        try:
            with scheduler.lock:
                if bell in bells:
                    bells.remove(bell)
        finally:
            with task._condition:
                if bell in task._waiters:
                    task._waiters.remove(bell)


# -- on a worker of somebody else's executor ------------------------------------------------------


def help_out(scheduler: Scheduler, task: Task[Any], waiting: Attempt) -> None:
    """Wait for a task, and run on this thread what it waits for.

    Raises
    ------
    UsageError
        If every worker of the executor waits, and this one may not take up a further call.
    """
    path = Path(task._job, coroutines_too=True)
    with _watching(scheduler, task) as bell:
        depth = bell.depth
        while not task.done():
            bell.event.clear()
            effects: Effects = []
            with scheduler.lock:
                job = path.end()
                attempt = None
                if job.code == PENDING and job.kind != "async":
                    if depth < DEPTH:
                        attempt = _take(scheduler, job, waiting)
                    elif _all_wait(scheduler, DEPTH):
                        raise UsageError(
                            f"{depth} calls wait inside one another and every worker of the executor waits; give it "
                            "more workers, or use a ThreadPoolManager, which makes up for those that wait"
                        )
                slots = scheduler.slots
                if attempt is None and slots.tickets and not slots.overdue and _all_wait(scheduler):
                    # No worker will come for now: nobody leaves a slot for one.
                    slots.overdue = True
                    scheduler._dispatch(effects)
            if attempt is None:
                perform(effects)
                if not task.done():
                    bell.event.wait()
                continue
            _inside.depth = depth + 1
            began = time.thread_time()
            try:
                # In a context of its own, as on a worker: its done-callbacks are not inside the task that waits.
                contextvars.Context().run(scheduler.runner.run_calls, attempt)
            finally:
                _inside.depth = depth
                waiting.lent_seconds += time.thread_time() - began
                with scheduler.lock:
                    _give_back(scheduler, job, waiting)


def _take(scheduler: Scheduler, job: Job, waiting: Attempt) -> Attempt | None:
    if not scheduler.slots.take(job):
        return None
    # Until it has returned, the one below it on the stack cannot go on, whatever else becomes of its wait:
    # so a wait for that one, in there, is found to be a circle.
    waiter = waiting.job
    waiter.waiting_on += (job,)
    job.waiters += (waiter,)
    return scheduler._begin(job, scheduler._monotonic(), scheduler._time())


def _give_back(scheduler: Scheduler, job: Job, waiting: Attempt) -> None:
    waiter = waiting.job
    waiter.waiting_on = without(waiter.waiting_on, job)
    job.waiters = without(job.waiters, waiter)
    scheduler._lower(job, waiter.level)


def _all_wait(scheduler: Scheduler, depth: int = 0) -> bool:
    # Whether every worker waits, with so many calls inside one another.
    workers = getattr(scheduler.pool, "_max_workers", None)
    return isinstance(workers, int) and (
        len({bell.thread for bell in scheduler.slots.bells if bell.depth >= depth}) >= workers
    )


def without(jobs: tuple[Job, ...], gone: Job) -> tuple[Job, ...]:
    """The jobs less one: a task may wait for another several times at once."""
    at = jobs.index(gone)
    return jobs[:at] + jobs[at + 1 :]


# -- on a loop that runs already ------------------------------------------------------------------


def wait_on_loop(scheduler: Scheduler, host: HostLoop, task: Task[Any], timeout: float | None) -> None:
    """Wait for a task on the loop's own thread, as long as nothing that is waited for needs the loop.

    Raises
    ------
    UsageError
        As soon as something does.
    """
    path = Path(task._job, coroutines_too=False)
    clock = scheduler.clock
    deadline = None if timeout is None else clock.monotonic() + timeout
    with _watching(scheduler, task) as bell, host.stopped(bell.need):
        while not task.done():
            bell.event.clear()
            needed = bell.needed
            if not needed:
                with scheduler.lock:
                    needed = _needed(scheduler, path.end())
            if needed:
                raise UsageError(
                    f"waiting for {task!r} here would never end: it stops the loop that runs here, and {needed}; "
                    "write `await task` instead"
                )
            left = None if deadline is None else deadline - clock.monotonic()
            if (left is not None and left <= 0) or task.done():
                return
            clock.wait(bell.event, left)


def refuse_coroutines(scheduler: Scheduler, what: str) -> None:
    """Refuse a wait for every task on the loop's own thread while there are coroutines, which it would stop.

    Raises
    ------
    UsageError
        If there are any.
    """
    with scheduler.lock:
        jobs = scheduler.ledger.jobs.values()
        count = sum(job.code < FIRST_TERMINAL and job.kind == "async" for job in jobs)
    if count:
        raise UsageError(
            f"{what} here would never end: it stops the loop that runs here, which coroutines that have not ended "
            f"need ({count}); write `await asyncio.to_thread(tasks.{what})`, or `async with` for a block"
        )


def wait_for_all_on_loop(scheduler: Scheduler, host: HostLoop, what: str, deadline: float | None) -> None:
    """Wait for every task on the loop's own thread, until ``deadline`` (monotonic seconds) if any.

    Raises
    ------
    UsageError
        As soon as there are coroutines among them, or something else needs the loop.
    """
    clock = scheduler.clock
    while not scheduler.quiet.is_set():
        refuse_coroutines(scheduler, what)
        with scheduler.lock:
            jobs = scheduler.ledger.jobs.values()
            task = next((job.task for job in jobs if job.task is not None and job.code < FIRST_TERMINAL), None)
        left = None if deadline is None else deadline - clock.monotonic()
        if task is None or (left is not None and left <= 0):
            return
        wait_on_loop(scheduler, host, task, left)


def _needed(scheduler: Scheduler, job: Job) -> str:
    if job.code >= FIRST_TERMINAL:
        return ""
    if job.kind == "async":
        return f"the coroutine {job.label} needs it"
    slots = scheduler.slots
    if job.attempt is None and slots.held - slots.threads_held >= slots.limit:
        return f"all {slots.limit} that may run at once are coroutines, which need it"
    return ""
