"""The lives of tasks: how an attempt ends, what that means for the others, and who lends whom a class.

Functions whose name begins with an underscore expect the lock to be held, and append to ``effects``
what must happen after it is released: settling futures (their callbacks are user code), starting
code, handing work to the pool.
"""

from __future__ import annotations

import contextvars
import functools
import logging
import threading
import traceback
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from tests.oracles.plain_tasks import _cleanup
from tests.oracles.plain_tasks._job import Attempt, Effects, Job
from tests.oracles.plain_tasks._ledger import Ledger, OnChange
from tests.oracles.plain_tasks._machine import Stop, outcome
from tests.oracles.plain_tasks._slots import Slots
from tests.oracles.plain_tasks._timer import Timers
from tests.oracles.plain_tasks.task import Task
from wiseflow_nb.clock import Clock
from wiseflow_nb.errors import TaskCancelledError, TaskSkippedError, TaskTimeoutError
from wiseflow_nb.futures import settle
from wiseflow_nb.records import Priority, TaskRecord, TaskState
from wiseflow_nb.tasks import _output
from wiseflow_nb.tasks._admission import Admission

logger = logging.getLogger("wiseflow_nb.tasks")
#: Bound of a stored traceback, in characters; the end is what tells most.
TRACEBACK_KEPT = 8192


class Lives:
    """One lock, the book, the slots, the timers, and what follows when a task's code has ended."""

    def __init__(
        self,
        *,
        clock: Clock,
        limit: int,
        thread_room: Callable[[], int],
        admission: Admission,
        on_change: OnChange | None,
        id_prefix: str,
    ) -> None:
        self.lock = threading.Lock()
        self.clock = clock
        self.ledger = Ledger(clock, on_change)
        self.slots = Slots(limit, thread_room, admission)
        self.timers = Timers(clock, "wiseflow-timer")
        self.handlers: list[_cleanup.Registered] = []
        self.cleanup_failures = 0
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

    def code_ended(self, job: Job, attempt: Attempt) -> bool:
        """The code of an attempt has ended; return whether cleanup has to run before it is concluded."""
        effects: Effects = []
        with self.lock:
            attempt.ended = True
            state = self._verdict(job, attempt)
            if state is not TaskState.COMPLETED or job.state.terminal or _cleanup.always(job.options, self.handlers):
                return True
            self._conclude(job, attempt, state, [], effects)
            self._dispatch(effects)
        perform(effects)
        return False

    def attempt_ended(self, job: Job, attempt: Attempt, failures: list[str]) -> None:
        """The code of an attempt has ended and its cleanup has run."""
        effects: Effects = []
        with self.lock:
            self.cleanup_failures += len(failures)
            # Judged again: a cancel during cleanup rules another attempt out.
            self._conclude(job, attempt, self._verdict(job, attempt), failures, effects)
            self._dispatch(effects)
        perform(effects)

    def cleanup_of(self, job: Job, attempt: Attempt) -> list[_cleanup.Handler]:
        """What is to run now that an attempt's code has stopped."""
        with self.lock:
            shared = list(self.handlers)
            completed = self._verdict(job, attempt) is TaskState.COMPLETED
        return _cleanup.collect(attempt.context, job.options, shared, completed=completed)

    def watch_cleanup(self, job: Job, attempt: Attempt, handler: _cleanup.Handler) -> Callable[[], None]:
        """Go on without a plain handler that is over its budget; call what is returned when it is done."""

        def overdue() -> None:
            self.attempt_ended(job, attempt, [_cleanup.over_budget(handler)])

        return self.timers.at(self.clock.monotonic() + handler.budget, overdue).cancel

    def running(self) -> list[tuple[TaskRecord, float, float]]:
        """Running tasks, each with its last progress and when it was asked to stop; the lock is held."""
        return [
            (job.record, job.attempt.progress_at, job.attempt.asked_at)
            for job in self.ledger.jobs.values()
            if job.attempt is not None
        ]

    def _verdict(self, job: Job, attempt: Attempt) -> TaskState:
        stop = attempt.stop if attempt.asked else Stop.NONE
        error = attempt.error
        if stop is Stop.TIMEOUT:
            error = TaskTimeoutError("timed out")
        may_retry = (
            self.retries_allowed
            and attempt.stop not in (Stop.CANCEL, Stop.DEADLINE)
            and attempt.number <= job.options.retry.times
            and job.options.retry.covers(error)
        )
        return outcome(stop, error, may_retry=may_retry)

    def _conclude(self, job: Job, attempt: Attempt, state: TaskState, failures: list[str], effects: Effects) -> None:
        if job.attempt is not attempt or job.state.terminal:
            return  # abandoned meanwhile
        job.attempt = None
        if attempt.timer is not None:
            attempt.timer.cancel()
        self.slots.release(job)
        reason = job.record.reason or str(attempt.stop)
        error = attempt.error
        if state is TaskState.TIMED_OUT or (state is TaskState.RETRY_WAIT and attempt.stop is Stop.TIMEOUT):
            limit = job.options.deadline if attempt.stop is Stop.DEADLINE else job.options.timeout
            error = TaskTimeoutError(f"task {job.label} was stopped: over its {limit:g} s; give it more, or less to do")
            error.__cause__ = attempt.error
        elif state is TaskState.CANCELLED:
            reason = reason or f"its own code raised {type(error).__name__}"
            error = TaskCancelledError(f"task {job.label} was cancelled: {reason}")
        changes = {
            "wall_seconds": attempt.wall_seconds,
            "cpu_seconds": attempt.cpu_seconds,
            "cpu_source": attempt.cpu_source,
            "output_tail": attempt.context.output_tail,
            **described(error if state is not TaskState.CANCELLED else attempt.error),
        }
        told = "; ".join([*([reason] if reason else []), *failures])
        if state is TaskState.RETRY_WAIT:
            delay = job.options.retry.delay(attempt.number, job.rng)
            told = "; ".join([f"attempt {attempt.number} failed, the next in {delay:.3g} s", *failures])
            self.ledger.move(job, state, told, **changes)
            due = self.clock.monotonic() + delay
            job.retry_timer = self.timers.at(due, functools.partial(self.retry_due, job))
            return
        if job.state is TaskState.RUNNING and state is TaskState.CANCELLED:
            self.ledger.move(job, TaskState.CANCELLING, reason)
        self._finish(job, state, effects, reason=told, value=attempt.value, error=error, changes=changes)

    def _finish(
        self,
        job: Job,
        state: TaskState,
        effects: Effects,
        *,
        reason: str = "",
        value: Any = None,
        error: BaseException | None = None,
        changes: dict[str, Any] | None = None,
    ) -> None:
        self._close_job(job, state, reason, value, error, changes or {}, effects)
        ended = deque([job])
        while ended:
            parent = ended.popleft()
            for child in parent.dependents:
                if child.state is not TaskState.WAITING:
                    continue
                if not parent.options.keep_result:
                    parent.takers += 1
                    child.takes.append(parent)
                if parent.state is TaskState.COMPLETED or child.options.trigger == "all_done":
                    child.remaining -= 1
                    if child.remaining == 0:
                        self._make_ready(child)
                else:
                    self._skip(child, parent, effects)
                    ended.append(child)
            parent.dependents.clear()

    def _skip(self, job: Job, parent: Job, effects: Effects) -> None:
        cause = parent.cause()
        told = f"its dependency {parent.label} ended {parent.state}"
        error = TaskSkippedError(
            f"task {job.label} was skipped: {told} ({short(cause) or parent.record.error or parent.record.reason}); retry {parent.task_id}",
            cause,
        )
        parent.skipped.append(job.task_id)
        self._close_job(job, TaskState.SKIPPED, told, None, error, {"error": short(error)}, effects)

    def _close_job(
        self,
        job: Job,
        state: TaskState,
        reason: str,
        value: Any,
        error: BaseException | None,
        changes: dict[str, Any],
        effects: Effects,
    ) -> None:
        self.ledger.move(job, state, reason, finished_seconds=self.clock.time(), **changes)
        job.root_cause = error
        for timer in (job.deadline, job.retry_timer):
            if timer is not None:
                timer.cancel()
        self._drop_grant(job, effects)
        for parent in job.dependencies:
            self._lower(parent, job.level)
        job.dependencies = []
        for parent in job.takes:
            parent.takers -= 1
            if not parent.takers:
                self._release(parent, effects)
        job.takes = []
        if hasattr(job.fn, "close") and job.record.attempt == 0 and isinstance(job.fn, Coroutine):
            effects.append(job.fn.close)  # never started: nothing will await it
        if state is TaskState.COMPLETED:
            job.fn, job.args, job.kwargs, job.variables = None, (), {}, contextvars.Context()
        task, job.task = job.task, None
        if task is not None:
            # Last of all: its callbacks may wait for what the other effects start.
            settle_it = functools.partial(self._settle, job, task, state, value, error)
            effects.append(functools.partial(effects.append, settle_it))

    def _settle(self, job: Job, task: Task[Any], state: TaskState, value: Any, error: BaseException | None) -> None:
        # Called without the lock: done-callbacks are user code.
        if state is TaskState.CANCELLED:
            Future.cancel(task)
            task.set_running_or_notify_cancel()
        else:
            settle(task, value, None if state is TaskState.COMPLETED else error)
        with self.lock:
            if state is TaskState.COMPLETED and not job.options.keep_result and not job.takers:
                task._release()
            # From here the task itself holds it: an exception's traceback holds every frame's locals,
            # and the book would hold them as long as the record.
            job.root_cause = None
            self._unsettled -= 1
            if not self._unsettled:
                self.quiet.set()
                _output.end_routing(self)

    def _release(self, job: Job, effects: Effects) -> None:
        # The value of a task that is not to keep it: all that were to take it have ended.
        task = job.task_ref()
        if task is not None:
            effects.append(task._release)

    def _make_ready(self, job: Job) -> None:
        job.ready_at = self.clock.monotonic()
        self.ledger.move(job, TaskState.PENDING, ready_seconds=self.clock.time())
        self.slots.push(job)

    def _drop_grant(self, job: Job, effects: Effects) -> None:
        grant = self.slots.let_through(job)
        if grant is not None:
            effects.append(functools.partial(settle, grant))

    # -- classes -----------------------------------------------------------------------------

    def _lend(self, job: Job, level: Priority) -> None:
        stack = [job]
        now = self.clock.monotonic()
        while stack:
            item = stack.pop()
            if item.level < level and not item.state.terminal:
                item.level = level
                self.slots.reprioritise(item, now)
                stack += item.dependencies
                stack += item.waiting_on

    def _lower(self, job: Job, level: Priority) -> None:
        # Only who lent the highest class can have been the one that holds it up.
        stack = [job]
        now = self.clock.monotonic()
        while stack:
            item = stack.pop()
            if item.state.terminal or item.level > level or item.level is item.options.priority:
                continue
            lenders = (other.level for other in (*item.dependents, *item.waiters) if not other.state.terminal)
            due = max((item.options.priority, *lenders))
            if due < item.level:
                item.level = due
                self.slots.reprioritise(item, now)
                stack += item.dependencies
                stack += item.waiting_on

    def reprioritise(self, job: Job, priority: Priority) -> bool:
        """Change a task's own class; return False if it has ended."""
        effects: Effects = []
        with self.lock:
            if job.state.terminal:
                return False
            before = job.level
            job.options = replace(job.options, priority=priority)
            self.ledger.touch(job, priority=priority)
            lenders = (other.level for other in (*job.dependents, *job.waiters) if not other.state.terminal)
            job.level = max((priority, *lenders))
            self.slots.reprioritise(job, self.clock.monotonic())
            for parent in (*job.dependencies, *job.waiting_on):
                if job.level > before:
                    self._lend(parent, job.level)
                else:
                    self._lower(parent, before)
            self._dispatch(effects)
        perform(effects)
        return True


def perform(effects: Effects) -> None:
    """Do what had to wait for the lock's release, whatever one raises; effects may append further ones."""
    for effect in effects:
        try:
            effect()
        except BaseException:
            logger.exception("what follows a change of a task failed")


def short(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"


def described(error: BaseException | None) -> dict[str, Any]:
    if error is None:
        return {"error": "", "traceback": ""}
    text = "".join(traceback.format_exception(error))
    return {"error": short(error), "traceback": text[-TRACEBACK_KEPT:]}
