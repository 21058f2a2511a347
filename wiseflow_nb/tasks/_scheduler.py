"""The shell around the machine: one lock, one function per happening.

Functions whose name begins with an underscore expect the lock to be held, and append to ``effects``
what must happen after it is released: settling futures (their callbacks are user code), starting
code, handing work to the pool.
"""

from __future__ import annotations

import contextvars
import functools
import threading
import traceback
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from wiseflow_nb.clock import Clock
from wiseflow_nb.context import TaskContext
from wiseflow_nb.errors import (
    DependencyError,
    PoolClosedError,
    TaskAbandonedError,
    TaskCancelledError,
    TaskSkippedError,
    TaskTimeoutError,
)
from wiseflow_nb.futures import settle
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.records import NAN, Priority, TaskRecord, TaskState
from wiseflow_nb.tasks import _waiting
from wiseflow_nb.tasks._job import Attempt, Effects, Job
from wiseflow_nb.tasks._ledger import Ledger, OnChange
from wiseflow_nb.tasks._loop import LoopThread
from wiseflow_nb.tasks._machine import Stop, outcome
from wiseflow_nb.tasks._options import TaskOptions
from wiseflow_nb.tasks._runner import Runner
from wiseflow_nb.tasks._slots import Slots
from wiseflow_nb.tasks._timer import Timers
from wiseflow_nb.tasks.task import Task

#: Bound of a stored traceback, in characters; the end is what tells most.
TRACEBACK_KEPT = 8192
#: A pool of unknown size is taken to be as large as asked for.
UNBOUNDED = 1 << 30


class Scheduler:
    """Everything a manager does, without its public face."""

    def __init__(self, pool: Executor, *, clock: Clock, limit: int, on_change: OnChange | None, id_prefix: str) -> None:
        self.lock = threading.Lock()
        self.clock = clock
        self.pool = pool
        self.ledger = Ledger(clock, on_change)
        self.slots = Slots(limit, self._thread_room)
        self.timers = Timers(clock, "wiseflow-timer")
        self.loop = LoopThread("wiseflow-tasks")
        self.runner = Runner(self)
        self.handlers: list[Callable[..., Any]] = []
        self.cleanup_failures = 0
        self.closed = False
        self.retries_allowed = True
        #: Set while every task submitted so far has been settled.
        self.quiet = threading.Event()
        self.quiet.set()
        self._unsettled = 0
        self._prefix = id_prefix
        self._numbers = 0
        self._unlisten = pool._add_listener(self.wake) if isinstance(pool, ThreadPoolManager) else None

    # -- submit ------------------------------------------------------------------------------

    def submit(
        self,
        call: tuple[Any, tuple[Any, ...], dict[str, Any]],
        options: TaskOptions,
        *,
        kind: str,
        name: str,
        needed: list[Task[Any]],
        retry_of: str = "",
    ) -> Task[Any]:
        """Enter a task; ``needed`` are the tasks among its arguments."""
        task: Task[Any] = Task(self)
        variables = contextvars.copy_context()
        effects: Effects = []
        with self.lock:
            if self.closed:
                raise PoolClosedError("the task manager has been shut down; make a new TaskManager")
            task_id = f"{self._prefix}{self._numbers + 1}"
            parents = self._parents(task_id, (*needed, *options.dependencies))
            self._numbers += 1
            now = self.clock.monotonic()
            failed = next((job for job in parents if job.state.terminal and job.state is not TaskState.COMPLETED), None)
            skip = failed if options.trigger == "all_completed" else None
            unfinished = [job for job in parents if not job.state.terminal]
            record = TaskRecord(
                task_id,
                name,
                TaskState.WAITING if unfinished or skip else TaskState.PENDING,
                options.priority,
                kind,
                max_attempts=options.retry.times + 1,
                created_seconds=self.clock.time(),
                dependencies=tuple(job.task_id for job in parents),
                tags=options.tags,
                retry_of=retry_of,
            )
            job = Job(self._numbers, record, options, call, task, variables)
            task._job = job
            self._unsettled += 1
            self.quiet.clear()
            if record.state is TaskState.PENDING:
                job.ready_at = now
                job.record = replace(record, ready_seconds=record.created_seconds)
            self.ledger.born(job)
            if skip is not None:
                self._skip(job, skip, effects)
            else:
                job.remaining = len(unfinished)
                job.dependencies = unfinished
                for parent in unfinished:
                    parent.dependents.append(job)
                    self._lend(parent, job.level)
                if options.deadline is not None:
                    job.deadline = self.timers.at(now + options.deadline, functools.partial(self.deadline_due, job))
                if not unfinished:
                    self.slots.push(job)
                self._dispatch(effects)
        perform(effects)
        return task

    def _parents(self, task_id: str, needed: tuple[Task[Any] | str, ...]) -> list[Job]:
        parents: dict[str, Job] = {}
        for item in needed:
            if isinstance(item, Task):
                if item._scheduler is not self:
                    raise DependencyError(f"{item!r} belongs to another manager; submit both to the same one")
                job: Job | None = item._job
            elif item == task_id:
                raise DependencyError(f"a task cannot depend on itself: {task_id} -> {task_id}; leave it out")
            else:
                job = self.ledger.jobs.get(item)
            if job is None:
                raise DependencyError(f"{task_id} -> {item}: there is no task {item!r}; give a Task or a known id")
            parents[job.task_id] = job
        return list(parents.values())

    # -- starting ----------------------------------------------------------------------------

    def wake(self) -> None:
        """Start what can be started now."""
        effects: Effects = []
        with self.lock:
            self._dispatch(effects)
        perform(effects)

    def _thread_room(self) -> int:
        return self.pool.target if isinstance(self.pool, ThreadPoolManager) else UNBOUNDED

    def _dispatch(self, effects: Effects) -> None:
        for grant in self.slots.grants():
            effects.append(functools.partial(settle, grant))
        while (job := self.slots.start_next(self.clock.monotonic())) is not None:
            if job.record.kind == "async":
                attempt = self._begin(job)
                effects.append(functools.partial(self.loop.call, self.runner.start_coroutine, job, attempt))
            else:
                effects.append(functools.partial(self._send_ticket, job.level, effects))

    def _send_ticket(self, level: Priority, effects: Effects) -> None:
        # Called without the lock.
        try:
            if isinstance(self.pool, ThreadPoolManager):
                future = self.pool.options(priority=level, name="task").submit(self._take_ticket)
            else:
                future = self.pool.submit(self._take_ticket)
        except RuntimeError as error:  # closed, broken, or no further thread to be had
            self._ticket_lost(error, effects)
        else:
            future.add_done_callback(self._ticket_done)

    def _ticket_done(self, future: Future[None]) -> None:
        if future.cancelled():
            effects: Effects = []
            self._ticket_lost(PoolClosedError("the pool was shut down before the task began"), effects)
            perform(effects)

    def _ticket_lost(self, error: BaseException, effects: Effects) -> None:
        with self.lock:
            job = self.slots.redeem(self.clock.monotonic())
            if job is not None:
                attempt = self._begin(job)
                attempt.error, attempt.ended = error, True
                self._conclude(job, attempt, TaskState.FAILED, [], effects)
            self._dispatch(effects)

    def _take_ticket(self) -> None:
        # Called without the lock, on a worker of the pool.
        effects: Effects = []
        with self.lock:
            job = self.slots.redeem(self.clock.monotonic())
            attempt = None if job is None else self._begin(job)
            if job is None:
                self._dispatch(effects)
        perform(effects)
        if job is not None and attempt is not None:
            self.runner.run_call(job, attempt)

    def _begin(self, job: Job) -> Attempt:
        number = job.record.attempt + 1
        now = self.clock.monotonic()
        progress = functools.partial(self.progressed, job, number)
        attempt = Attempt(number, TaskContext(job.task_id, job.record.name, number, on_progress=progress))
        job.attempt = attempt
        self.ledger.move(
            job,
            TaskState.RUNNING,
            attempt=number,
            started_seconds=self.clock.time(),
            queue_seconds=now - job.ready_at,
            progress=NAN,
            progress_text="",
        )
        if job.options.timeout is not None:
            due = now + job.options.timeout
            attempt.timer = self.timers.at(due, functools.partial(self.timeout_due, job, attempt))
        return attempt

    # -- ending ------------------------------------------------------------------------------

    def code_ended(self, job: Job, attempt: Attempt) -> bool:
        """The code of an attempt has ended; return whether cleanup has to run before it is concluded."""
        effects: Effects = []
        with self.lock:
            attempt.ended = True
            state = self._verdict(job, attempt)
            if state is not TaskState.COMPLETED or job.state.terminal:
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

    def cleanup_handlers(self) -> list[Callable[..., Any]]:
        """The manager's own cleanup handlers, in order of registration."""
        with self.lock:
            return list(self.handlers)

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
            **_described(error if state is not TaskState.CANCELLED else attempt.error),
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
                if parent.state is TaskState.COMPLETED or child.options.trigger == "all_done":
                    child.remaining -= 1
                    if child.remaining == 0:
                        self._make_ready(child)
                else:
                    self._skip(child, parent, effects)
                    ended.append(child)
            parent.dependents.clear()

    def _skip(self, job: Job, parent: Job, effects: Effects) -> None:
        cause = parent.root_cause
        told = f"its dependency {parent.label} ended {parent.state}"
        error = TaskSkippedError(
            f"task {job.label} was skipped: {told} ({_short(cause)}); retry {parent.task_id}", cause
        )
        parent.skipped.append(job.task_id)
        self._close_job(job, TaskState.SKIPPED, told, None, error, {"error": _short(error)}, effects)
        job.root_cause = cause

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
        if hasattr(job.fn, "close") and job.record.attempt == 0 and isinstance(job.fn, Coroutine):
            effects.append(job.fn.close)  # never started: nothing will await it
        if state is TaskState.COMPLETED:
            job.fn, job.args, job.kwargs = None, (), {}
        task, job.task = job.task, None
        if task is not None:
            effects.append(functools.partial(self._settle, task, state, value, error))

    def _settle(self, task: Task[Any], state: TaskState, value: Any, error: BaseException | None) -> None:
        # Called without the lock: done-callbacks are user code.
        if state is TaskState.CANCELLED:
            Future.cancel(task)
            task.set_running_or_notify_cancel()
        else:
            settle(task, value, None if state is TaskState.COMPLETED else error)
        with self.lock:
            self._unsettled -= 1
            if not self._unsettled:
                self.quiet.set()

    def _make_ready(self, job: Job) -> None:
        job.ready_at = self.clock.monotonic()
        self.ledger.move(job, TaskState.PENDING, ready_seconds=self.clock.time())
        self.slots.push(job)

    # -- time --------------------------------------------------------------------------------

    def retry_due(self, job: Job) -> None:
        """The wait before another attempt is over."""
        effects: Effects = []
        with self.lock:
            if job.state is TaskState.RETRY_WAIT:
                self._make_ready(job)
                self._dispatch(effects)
        perform(effects)

    def timeout_due(self, job: Job, attempt: Attempt) -> None:
        """An attempt has run as long as it may."""
        effects: Effects = []
        with self.lock:
            if job.attempt is attempt and job.state is TaskState.RUNNING:
                self._ask_to_stop(job, attempt, Stop.TIMEOUT, "timed out", effects)
        perform(effects)

    def deadline_due(self, job: Job) -> None:
        """A task should have ended by now."""
        effects: Effects = []
        with self.lock:
            if job.attempt is not None and not job.state.terminal:
                self._ask_to_stop(job, job.attempt, Stop.DEADLINE, "deadline passed", effects)
            elif not job.state.terminal:
                self.slots.discard(job)
                error = TaskTimeoutError(f"task {job.label} was not done by its deadline of {job.options.deadline:g} s")
                changes = _described(error)
                self._finish(job, TaskState.TIMED_OUT, effects, reason="deadline passed", error=error, changes=changes)
                self._dispatch(effects)
        perform(effects)

    def progressed(self, job: Job, number: int, fraction: float, text: str) -> None:
        """A running attempt tells how far it is."""
        with self.lock:
            if job.record.attempt == number and job.attempt is not None:
                self.ledger.touch(job, progress=fraction, progress_text=text)

    # -- cancel ------------------------------------------------------------------------------

    def cancel(self, job: Job, reason: str) -> bool:
        """Ask a task to stop; return whether it was, or has been, cancelled."""
        effects: Effects = []
        with self.lock:
            accepted = self._cancel(job, reason, effects)
            self._dispatch(effects)
        perform(effects)
        return accepted

    def _cancel(self, job: Job, reason: str, effects: Effects) -> bool:
        if job.state.terminal:
            return job.state is TaskState.CANCELLED
        if job.attempt is not None:
            self._ask_to_stop(job, job.attempt, Stop.CANCEL, reason, effects)
            return True
        self.slots.discard(job)
        error = TaskCancelledError(f"task {job.label} was cancelled: {reason}")
        self._finish(job, TaskState.CANCELLED, effects, reason=reason, error=error)
        return True

    def _ask_to_stop(self, job: Job, attempt: Attempt, stop: Stop, reason: str, effects: Effects) -> None:
        attempt.stop = stop
        if job.state is TaskState.RUNNING:
            self.ledger.move(job, TaskState.CANCELLING, reason)
        else:
            self.ledger.touch(job, reason=reason)
        if not attempt.ended:
            attempt.context.token.cancel(reason)
        self._drop_grant(job, effects)
        if job.record.kind == "async":
            effects.append(functools.partial(self.loop.call, self.runner.stop_coroutine, attempt))

    def _drop_grant(self, job: Job, effects: Effects) -> None:
        grant = self.slots.let_through(job)
        if grant is not None:
            effects.append(functools.partial(settle, grant))

    def _abandon(self, job: Job, effects: Effects) -> None:
        attempt = job.attempt
        if attempt is None:
            return
        if job.state is TaskState.RUNNING:
            self._ask_to_stop(job, attempt, Stop.CANCEL, "shutdown", effects)
        if attempt.timer is not None:
            attempt.timer.cancel()
        job.attempt = None
        self.slots.release(job)
        error = TaskAbandonedError(
            f"task {job.label} was still running when its manager closed; let it check_cancelled()"
        )
        self._finish(
            job, TaskState.ABANDONED, effects, reason="shutdown", error=error, changes={"error": _short(error)}
        )

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

    # -- waiting (see _waiting) --------------------------------------------------------------

    def waiting(self, task: Task[Any]) -> AbstractContextManager[None]:
        """What a blocking wait for ``task`` has to be wrapped in."""
        return _waiting.blocking(self, task)

    def awaited(self, task: Task[Any]) -> Coroutine[Any, Any, Any]:
        """The coroutine behind ``await task``."""
        return _waiting.awaiting(self, task)


def perform(effects: Effects) -> None:
    """Do what had to wait for the lock's release; effects may append further ones."""
    for effect in effects:
        effect()


def _short(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"


def _described(error: BaseException | None) -> dict[str, Any]:
    if error is None:
        return {"error": "", "traceback": ""}
    text = "".join(traceback.format_exception(error))
    return {"error": _short(error), "traceback": text[-TRACEBACK_KEPT:]}
