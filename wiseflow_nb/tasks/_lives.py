"""The lives of tasks: how an attempt ends, what that means for the others, and who lends whom a class.

Functions whose name begins with an underscore expect the lock to be held, and append to ``effects``
what must happen after it is released: settling futures (their callbacks are user code), starting
code, handing work to the pool.
"""

from __future__ import annotations

import functools
import logging
import random
import threading
import time
import weakref
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from wiseflow_nb.clock import Clock, SystemClock
from wiseflow_nb.errors import TaskCancelledError, TaskSkippedError, TaskTimeoutError, WorkerLostError
from wiseflow_nb.futures import settle
from wiseflow_nb.pool._crew import YIELDS
from wiseflow_nb.records import NAN, Priority, TaskRecord, TaskState
from wiseflow_nb.tasks import _cleanup, _output
from wiseflow_nb.tasks._admission import Admission
from wiseflow_nb.tasks._job import NO_CALL, Attempt, Effects, Job
from wiseflow_nb.tasks._later import Later
from wiseflow_nb.tasks._ledger import Ledger, OnMove
from wiseflow_nb.tasks._machine import CANCELLING, CODES, COMPLETED, FIRST_TERMINAL, PENDING, WAITING, Stop, outcome
from wiseflow_nb.tasks._retry import Retry
from wiseflow_nb.tasks._slots import Slots
from wiseflow_nb.tasks._texts import text_of_error, text_of_own
from wiseflow_nb.tasks._timer import Timers
from wiseflow_nb.tasks.task import FINISHED, Callbacks, Task, ending, interrupt_of, may_wait

logger = logging.getLogger("wiseflow_nb.tasks")


def give_way(lives: Lives) -> None:
    """Before the lock is acquired, which another thread seems to hold for a few steps: let that thread go on.

    Whoever queues for a lock is woken for it and then waits for the interpreter, while the other finds
    the lock taken and queues in turn: each step costs a change of threads.
    """
    for _ in range(YIELDS):
        time.sleep(0)
        if not lives.busy:
            return
        if lives.lock.acquire(False):  # who had it left by way of an error
            lives.busy = False
            lives.lock.release()
            return


class Lives:
    """One lock, the book, the slots, the timers, and what follows when a task's code has ended."""

    #: Why a closed one takes no task.
    refusal = "the task manager has been shut down; make a new TaskManager"
    #: Whether this is the copy in a forked child: its tasks are the parent's.
    left_behind = False
    #: What is done when nobody refers to it any more; nothing is left to do once it was shut down.
    last: weakref.finalize[..., Any] | None = None

    def __init__(
        self,
        *,
        clock: Clock,
        limit: int,
        room: int,
        admission: Admission,
        on_move: OnMove | None,
        id_prefix: str,
    ) -> None:
        # Re-entrant, for a finaliser may ask for something in the midst of a change. One that wants to
        # change something itself is put off (``inside``, ``later``).
        self.lock = threading.RLock()
        #: Whether somebody is probably at one of the frequent changes: looked at before queueing for the lock.
        self.busy = False
        self.inside: Callable[[], bool] = self.lock._is_owned  # type: ignore[attr-defined]
        self.later = Later()
        self.clock = clock
        # Without the clock's own wrapper, where it is the machine's: both are read several times a task.
        self.machine_time = isinstance(clock, SystemClock)
        self._monotonic: Callable[[], float] = time.monotonic if self.machine_time else clock.monotonic
        self._time: Callable[[], float] = time.time if self.machine_time else clock.time
        self.ledger = Ledger(clock, on_move)
        self.slots = Slots(limit, room, admission)
        self.timers = Timers(clock, "wiseflow-timer")
        self.handlers: list[_cleanup.Registered] = []
        #: Plain handlers that are over their budget and have not returned.
        self.overdue: list[_cleanup.Handler] = []
        self.cleanup_failures = 0
        #: Done-callbacks that raised.
        self.callback_failures = 0
        self.closed = False
        self.retries_allowed = True
        #: Set while every task submitted so far has been settled.
        self.quiet = threading.Event()
        self.quiet.set()
        self._unsettled = 0
        self._prefix = id_prefix
        self._numbers = 0

    @abstractmethod
    def _dispatch(self, effects: Effects) -> None: ...

    @abstractmethod
    def retry_due(self, job: Job) -> None: ...

    # -- ending ------------------------------------------------------------------------------

    def attempt_ended(self, attempt: Attempt, failures: list[str]) -> None:
        """The code of an attempt has ended and its cleanup has run."""
        effects: Effects = []
        with self.lock:
            self.cleanup_failures += len(failures)
            # Judged again: a cancel during cleanup rules another attempt out.
            self._conclude(attempt, self._verdict(attempt), failures, effects)
            self._dispatch(effects)
        perform(effects)

    def settled(self, count: int) -> None:
        """So many tasks have been settled whose end is not counted yet."""
        with self.lock:
            self._settled(count)

    def cleanup_of(self, attempt: Attempt) -> list[_cleanup.Handler]:
        """What is to run now that an attempt's code has stopped."""
        # Before the lock is taken: the error, and the types that a rule names, may bring code of their own.
        attempt.told = text_of_error(attempt.error)
        retry = attempt.job.options.retry
        if retry.times:
            attempt.covered = _covers(retry, attempt.error)
            attempt.timeout_covered = _covers(retry, TaskTimeoutError("timed out"))
        with self.lock:
            shared = list(self.handlers)
            completed = self._verdict(attempt) is TaskState.COMPLETED
        return _cleanup.collect(attempt, attempt.job.options, shared, completed=completed)

    def watch_cleanup(self, attempt: Attempt, handler: _cleanup.Handler) -> Callable[[], None]:
        """Go on without a plain handler that is over its budget; call what is returned when it is done."""

        def overdue() -> None:
            with self.lock:
                self.overdue.append(handler)
            self.attempt_ended(attempt, [_cleanup.over_budget(handler)])

        def returned() -> None:
            timer.cancel()
            with self.lock:
                self.overdue[:] = [item for item in self.overdue if item is not handler]

        timer = self.timers.at(self.clock.monotonic() + handler.budget, overdue)
        return returned

    def running(self) -> list[tuple[TaskRecord, float, float]]:
        """Running tasks, each with its last progress and when it was asked to stop; the lock is held."""
        found: list[tuple[TaskRecord, float, float]] = []
        left = self.ledger.running
        # The newest first: what runs is seldom far behind, and the search ends with the last of them.
        for job in reversed(self.ledger.jobs.values()):
            if not left:
                break
            if job.attempt is not None:
                left -= 1
                found.append((job.record, job.attempt.progress_at, job.attempt.asked_at))
        return found

    def _code_ended(self, attempt: Attempt, now: float, wall: float, effects: Effects) -> Task[Any] | None:
        # The common end, in one go: completed, nothing to clean up. Return the task to settle; what
        # else has to follow is left to ``attempt_ended``, after cleanup. ``now`` is monotonic, ``wall`` epoch.
        job = attempt.job
        options = job.options
        wall_seconds = now - attempt.started_at
        remote = attempt.remote
        if (
            attempt.error is not None
            or attempt.asked
            or job.attempt is not attempt
            or options.cleanup_always
            or (self.handlers and _cleanup.always(options, self.handlers))
            or (remote is not None and attempt.failures)
        ):
            attempt.ended = True
            attempt.wall_seconds = wall_seconds
            return None
        # As ``_leave``, ``_finish`` and ``_close_job`` do, for the end that is nearly every task's.
        job.attempt = None
        if attempt.timer is not None:
            attempt.timer.cancel()
        if job.holds:
            job.holds = False
            self.slots.held -= 1
            if job.kind != "async":
                self.slots.threads_held -= 1
        job.figures = (wall_seconds, attempt.cpu_seconds, attempt.cpu_source)
        job.finished_seconds = wall
        if remote is not None:
            job.memory_peak_bytes, job.memory_source = attempt.memory_peak_bytes, attempt.memory_source
            job.output_tail = attempt.output_tail
        elif attempt._output is not None or job.attempts > 1:
            job.output_tail = attempt.output_tail
        self.ledger.move(job, COMPLETED, job.reason)
        if job.dependencies:
            # All of them have ended: nobody is left who could have lent them a class.
            job.dependencies = ()
        if job.deadline is not None or job.retry_timer is not None or job.takes:
            self._let_go(job, effects)
        job.call, job.variables = NO_CALL, None
        children = job.dependents
        if children is not None:
            job.dependents = None
            kept = options.keep_result
            for child in children:
                if child.code == WAITING:
                    if not kept:
                        self._one_less(child, job)
                    elif child.remaining > 1:
                        child.remaining -= 1
                    else:
                        child.remaining = 0
                        child.ready_at = now
                        child.ready_seconds = wall
                        self.ledger.move(child, PENDING)
                        self.slots.push(child)
        task, job.task = job.task, None
        if task is not None:
            # Under the lock, so that those that depend on it find the value. Where somebody may wait, the
            # end is written when that one is told, which follows.
            task._result = attempt.value
            with ending:
                if task._made is None:
                    task._end = FINISHED
                elif not may_wait(task._callbacks):
                    task._closing = threading.get_ident()
        return task

    def _verdict(self, attempt: Attempt) -> TaskState:
        job = attempt.job
        retry = job.options.retry
        stop = attempt.stop if attempt.asked else Stop.NONE
        error = attempt.error
        may_retry = (
            self.retries_allowed
            and attempt.stop not in (Stop.CANCEL, Stop.DEADLINE)
            and attempt.number - job.rerun <= retry.times
            and (attempt.timeout_covered if stop is Stop.TIMEOUT else attempt.covered)
        )
        may_rerun = (
            self.retries_allowed
            and job.options.idempotent is True
            and not job.rerun
            and attempt.stop is Stop.NONE
            and isinstance(error, WorkerLostError)
        )
        return outcome(stop, error, may_retry=may_retry, may_rerun=may_rerun)

    def _leave(self, attempt: Attempt) -> None:
        # The attempt is over: its slot is free, its figures are the task's.
        job = attempt.job
        job.attempt = None
        if attempt.timer is not None:
            attempt.timer.cancel()
        self.slots.release(job)
        cpu_seconds = NAN if attempt.cpu_source == "unknown" else attempt.cpu_seconds
        job.figures = (attempt.wall_seconds, cpu_seconds, attempt.cpu_source)
        job.finished_seconds = self.clock.time()
        if job.kind == "process":
            job.memory_peak_bytes, job.memory_source = attempt.memory_peak_bytes, attempt.memory_source
        if attempt._output is not None or attempt.remote is not None or job.attempts > 1:
            job.output_tail = attempt.output_tail

    def _conclude(self, attempt: Attempt, state: TaskState, failures: list[str], effects: Effects) -> None:
        job = attempt.job
        if job.attempt is not attempt or job.code >= FIRST_TERMINAL:
            return  # abandoned meanwhile
        self._leave(attempt)
        job.finished_seconds = NAN
        reason = job.reason or str(attempt.stop)
        error, told = attempt.error, attempt.told
        if state is TaskState.TIMED_OUT or (state is TaskState.RETRY_WAIT and attempt.stop is Stop.TIMEOUT):
            limit = job.options.deadline if attempt.stop is Stop.DEADLINE else job.options.timeout
            error = TaskTimeoutError(f"task {job.label} was stopped: over its {limit:g} s; give it more, or less to do")
            error.__cause__ = attempt.error
            told = text_of_own(error, told)
        elif state is TaskState.CANCELLED:
            reason = reason or f"its own code raised {told.kind}"
            error = TaskCancelledError(f"task {job.label} was cancelled: {reason}")
        job.error, job.traceback = told.line(reason if state is TaskState.CANCELLED else ""), told.traceback
        why = "; ".join([*([reason] if reason else []), *failures])
        if state is TaskState.PENDING:
            job.rerun, job.ready_at = True, self._monotonic()
            why = "; ".join(["its worker process was lost, it runs once more", *failures])
            job.ready_seconds = self._time()
            self.ledger.move(job, PENDING, why)
            self.slots.push(job)
            return
        if state is TaskState.RETRY_WAIT:
            if job.rng is None:
                job.rng = random.Random(job.options.retry.seed)
            delay = job.options.retry.delay(attempt.number - job.rerun, job.rng)
            why = "; ".join([f"attempt {attempt.number} failed, the next in {delay:.3g} s", *failures])
            self.ledger.move(job, CODES[state], why)
            due = self.clock.monotonic() + delay
            job.retry_timer = self.timers.at(due, functools.partial(self.retry_due, job))
            return
        if job.state is TaskState.RUNNING and state is TaskState.CANCELLED:
            self.ledger.move(job, CANCELLING, reason)
        self._finish(job, state, effects, reason=why, value=attempt.value, error=error)

    def _finish(
        self,
        job: Job,
        state: TaskState,
        effects: Effects,
        *,
        reason: str = "",
        value: Any = None,
        error: BaseException | None = None,
    ) -> None:
        self._close_job(job, state, reason, value, error, effects)
        ended = deque([job])
        while ended:
            parent = ended.popleft()
            anyway = parent.code == COMPLETED
            children, parent.dependents = parent.dependents, None
            for child in children or ():
                if child.code != WAITING:
                    continue
                if anyway or child.options.trigger == "all_done":
                    self._one_less(child, parent)
                else:
                    self._skip(child, parent, effects)
                    ended.append(child)

    def _one_less(self, child: Job, parent: Job) -> None:
        if not parent.options.keep_result:
            parent.takers += 1
            child.takes += (parent,)
        child.remaining -= 1
        if not child.remaining:
            self._make_ready(child)

    def _skip(self, job: Job, parent: Job, effects: Effects) -> None:
        root = parent.skipped_for or (parent.task_id, parent.label, parent.error or parent.reason)
        root_id, root_label, root_text = job.skipped_for = root
        told = f"its dependency {parent.label} ended {parent.state}"
        if root_id != parent.task_id:
            told += f" because of {root_label}"
        error = TaskSkippedError(f"task {job.label} was skipped: {told} ({root_text}); retry {root_id}", parent.cause())
        parent.skipped += (job.task_id,)
        job.error = text_of_own(error).line()
        self._close_job(job, TaskState.SKIPPED, told, None, error, effects)

    def _close_job(
        self, job: Job, state: TaskState, reason: str, value: Any, error: BaseException | None, effects: Effects
    ) -> None:
        # Before the move: whoever mends what an interrupt cut off finds it there.
        job.root_cause = error
        job.finished_seconds = self.clock.time()
        self.ledger.move(job, CODES[state], reason)
        self._end_job(job, state, value, error, effects)

    def _end_job(self, job: Job, state: TaskState, value: Any, error: BaseException | None, effects: Effects) -> None:
        # Once more, if an interrupt came in between.
        self._let_go(job, effects)
        if job.attempts == 0 and isinstance(job.call[0], Coroutine):
            effects.append(job.call[0].close)  # never started: nothing will await it
        # The code may have run in them, and left there what leads to its error.
        job.variables = None
        task = job.task
        if state is TaskState.COMPLETED:
            job.call = NO_CALL
            if task is not None:
                task._result = value  # those that depend on it may begin before it is settled
        if task is not None:
            effects.append(Settling(self._settle, job, task, state, value, error, effects, [job]))
            job.task = None  # not before: it tells whether this was done

    def _let_go(self, job: Job, effects: Effects) -> None:
        for timer in (job.deadline, job.retry_timer):
            if timer is not None:
                timer.cancel()
        self._drop_grant(job, effects)
        parents, job.dependencies = job.dependencies, ()
        for parent in parents:
            if parent.code < FIRST_TERMINAL:
                self._lower(parent, job.level)
        taken = job.takes
        if taken:
            job.takes = ()
        for parent in taken:
            parent.takers -= 1
            task = parent.task_ref()
            if not parent.takers and task is not None and task.done():
                task._release()

    def _settle(
        self,
        job: Job,
        task: Task[Any],
        state: TaskState,
        value: Any,
        error: BaseException | None,
        effects: Effects,
        due: list[Job],
    ) -> None:
        # Called without the lock; once more, if an interrupt came in between.
        callbacks = None
        if not task._end:
            raised = None if state is TaskState.COMPLETED else error
            callbacks = task._finish(value, raised, state is TaskState.CANCELLED)
        if callbacks:
            effects.append(Calling(self._call_back, job, task, callbacks, due))
        else:
            self._told(job, task, due)

    def _call_back(self, job: Job, task: Task[Any], callbacks: Callbacks, due: list[Job]) -> None:
        try:
            task._call_back(callbacks)
        finally:
            self._told(job, task, due)

    def _told(self, job: Job, task: Task[Any], due: list[Job]) -> None:
        with self.lock:
            self._after_settling(job, task)
            if due:
                # Counted once, in steps between which no interrupt comes.
                del due[0]
                self._unsettled -= 1
            self._all_quiet()

    def _after_settling(self, job: Job, task: Task[Any]) -> None:
        if job.released and not job.takers:
            task._release()
        # From here the task itself holds it: an exception's traceback holds every frame's locals,
        # and the book would hold them as long as the record.
        job.root_cause = None

    def _settled(self, count: int) -> None:
        self._unsettled -= count
        if count:
            self._all_quiet()

    def _all_quiet(self) -> None:
        if not self._unsettled:
            self.quiet.set()
            _output.end_routing(self)

    def _make_ready(self, job: Job) -> None:
        job.ready_at = self._monotonic()
        job.ready_seconds = self._time()
        self.ledger.move(job, PENDING)
        self.slots.push(job)

    def _drop_grant(self, job: Job, effects: Effects) -> None:
        # A task that wants its slot again goes on without: it is to unwind.
        if job.grant is not None:
            effect = functools.partial(settle, job.grant)
            self.slots.returning.remove(job)
            job.grant = None
            effects.append(effect)

    # -- classes -----------------------------------------------------------------------------

    def _lend(self, job: Job, level: Priority) -> None:
        if job.level >= level:
            return
        stack = [job]
        now = self.clock.monotonic()
        while stack:
            item = stack.pop()
            if item.level < level and item.code < FIRST_TERMINAL:
                item.level = level
                self.slots.reprioritise(item, now)
                stack += item.dependencies
                stack += item.waiting_on

    def _lower(self, job: Job, level: Priority) -> None:
        # Only who lent the highest class can have been the one that holds it up.
        if job.code >= FIRST_TERMINAL or job.level is job.options.priority:
            return
        stack = [job]
        now = self.clock.monotonic()
        while stack:
            item = stack.pop()
            if item.code >= FIRST_TERMINAL or item.level > level or item.level is item.options.priority:
                continue
            due = max((item.options.priority, *lenders(item)))
            if due < item.level:
                item.level = due
                self.slots.reprioritise(item, now)
                stack += item.dependencies
                stack += item.waiting_on


class Settling(functools.partial[None]):
    """The end of a task, to be told."""


class Calling(functools.partial[None]):
    """The done-callbacks of a task, user code: called when all else that follows the change has been done."""


def lenders(job: Job) -> list[Priority]:
    """The classes of those that wait for a task."""
    return [other.level for other in (*(job.dependents or ()), *job.waiters) if other.code < FIRST_TERMINAL]


def perform(effects: Effects, *, raises: bool = True) -> None:
    """Do what had to wait for the lock's release; effects may append further ones.

    Done-callbacks come last: they may wait for what the others start. Each is done whatever another
    raises: it may be all that a task waits for. What was raised is logged, and an interrupt, which only
    the main thread is sent, is raised again at the end; not if ``raises`` is false, for those who hold
    what nobody else would go on with.
    """
    interrupt: KeyboardInterrupt | None = None
    for calling in (False, True):
        for at, effect in enumerate(effects):
            if (type(effect) is Calling) is calling:
                interrupt = _done(effect) or interrupt
                effects[at] = _nothing  # whoever is interrupted in between may begin anew
    if interrupt is not None and raises:
        raise interrupt


def _done(effect: Callable[[], object], *, again: bool = True) -> KeyboardInterrupt | None:
    try:
        effect()
    except BaseException as error:  # a pool, a coroutine or a loop of the caller's
        logger.exception("what follows a change of a task failed")
        interrupt = interrupt_of(error)
        if again and interrupt is not None and type(effect) is not Calling:
            # What it came in the midst of may not have been done; to do it twice does no harm.
            _done(effect, again=False)
        return interrupt
    return None


def _covers(retry: Retry, error: BaseException | None) -> bool:
    try:
        return retry.covers(error)
    except BaseException:  # user code: a rule that cannot tell covers nothing
        logger.exception("whether a retry covers %s could not be told", type(error).__name__)
        return False


def _nothing() -> None:
    pass
