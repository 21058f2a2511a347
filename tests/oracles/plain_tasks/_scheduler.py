"""The shell around the machine: what comes from outside, one function per happening.

Functions whose name begins with an underscore expect the lock to be held, and append to ``effects``
what must happen after it is released: settling futures (their callbacks are user code), starting
code, handing work to the pool.
"""

from __future__ import annotations

import contextvars
import functools
import threading
from collections.abc import Coroutine
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from tests.oracles.plain_tasks import _waiting
from tests.oracles.plain_tasks._job import Attempt, Effects, Job
from tests.oracles.plain_tasks._ledger import OnChange
from tests.oracles.plain_tasks._lives import Lives, described, perform, short
from tests.oracles.plain_tasks._machine import Stop
from tests.oracles.plain_tasks._options import TaskOptions
from tests.oracles.plain_tasks._runner import Runner
from tests.oracles.plain_tasks._timer import TimerHandle
from tests.oracles.plain_tasks.task import Task
from wiseflow_nb.clock import Clock
from wiseflow_nb.context import TaskContext
from wiseflow_nb.errors import (
    DependencyError,
    PoolClosedError,
    TaskAbandonedError,
    TaskCancelledError,
    TaskTimeoutError,
)
from wiseflow_nb.futures import settle
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.records import NAN, Priority, TaskRecord, TaskState
from wiseflow_nb.tasks import _output
from wiseflow_nb.tasks._admission import RECHECK_SECONDS, Admission
from wiseflow_nb.tasks._loop import TaskLoop

#: A pool of unknown size is taken to be as large as asked for.
UNBOUNDED = 1 << 30


class Scheduler(Lives):
    """Everything a manager does, without its public face."""

    def __init__(
        self,
        pool: Executor,
        *,
        clock: Clock,
        loop: TaskLoop,
        limit: int,
        admission: Admission,
        on_change: OnChange | None,
        id_prefix: str,
    ) -> None:
        super().__init__(
            clock=clock,
            limit=limit,
            thread_room=self._thread_room,
            admission=admission,
            on_change=on_change,
            id_prefix=id_prefix,
        )
        self.pool = pool
        self.loop = loop
        self._recheck: TimerHandle | None = None
        self.runner = Runner(self)
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
            if self.quiet.is_set():
                self.quiet.clear()
                _output.begin_routing(self)
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
            if isinstance(item, Task) and job.released:
                raise DependencyError(
                    f"{task_id} -> {job.task_id}: its result was released (keep_result=False); submit this before it ends"
                )
            parents[job.task_id] = job
        return list(parents.values())

    def stop_listening(self) -> None:
        """Let the pool forget this scheduler; calling again does no harm."""
        unlisten, self._unlisten = self._unlisten, None
        if unlisten is not None:
            unlisten()

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
        if self.slots.hold_reason and self._recheck is None:
            self._recheck = self.timers.at(self.clock.monotonic() + RECHECK_SECONDS, self._look_again)

    def _look_again(self) -> None:
        with self.lock:
            self._recheck = None
        self.wake()

    def _send_ticket(self, level: Priority, effects: Effects) -> None:
        # Called without the lock.
        taken = threading.Event()
        take = functools.partial(self._take_ticket, taken)
        try:
            if isinstance(self.pool, ThreadPoolManager):
                future = self.pool.options(priority=level, name="task").submit(take)
            else:
                future = self.pool.submit(take)
        except Exception as error:  # closed, broken, or no further thread to be had
            self._ticket_lost(error, effects)
        else:
            future.add_done_callback(functools.partial(self._ticket_done, taken))

    def _ticket_done(self, taken: threading.Event, future: Future[None]) -> None:
        if taken.is_set():
            return
        error: BaseException = PoolClosedError("the pool was shut down before the task began")
        if not future.cancelled() and (failed := future.exception()) is not None:
            error = failed
            # The standard library's pools tell of it with their lock held, which a submit would wait for.
            threading.Thread(target=self._give_up, args=(error,), daemon=True).start()
        else:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        effects: Effects = []
        self._ticket_lost(error, effects)
        perform(effects)

    def _ticket_lost(self, error: BaseException, effects: Effects) -> None:
        with self.lock:
            job = self.slots.redeem(self.clock.monotonic())
            if job is not None:
                attempt = self._begin(job)
                attempt.error, attempt.ended = error, True
                self._conclude(job, attempt, TaskState.FAILED, [], effects)
            self._dispatch(effects)

    def _take_ticket(self, taken: threading.Event) -> None:
        # Called without the lock, on a worker of the pool.
        taken.set()
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
            # Its code may have ended already, and only its cleanup still run.
            if job.attempt is attempt and job.state is TaskState.RUNNING and not attempt.ended:
                self._ask_to_stop(job, attempt, Stop.TIMEOUT, "timed out", effects)
        perform(effects)

    def deadline_due(self, job: Job) -> None:
        """A task should have ended by now."""
        effects: Effects = []
        with self.lock:
            if job.attempt is not None:
                if job.attempt.ended or job.attempt.stop is Stop.CANCEL:
                    return  # its end is settled, or was asked for by a person
                self._ask_to_stop(job, job.attempt, Stop.DEADLINE, "deadline passed", effects)
            elif not job.state.terminal:
                self.slots.discard(job)
                error = TaskTimeoutError(f"task {job.label} was not done by its deadline of {job.options.deadline:g} s")
                changes = described(error)
                self._finish(job, TaskState.TIMED_OUT, effects, reason="deadline passed", error=error, changes=changes)
                self._dispatch(effects)
        perform(effects)

    def progressed(self, job: Job, number: int, fraction: float, text: str) -> None:
        """A running attempt tells how far it is."""
        with self.lock:
            if job.record.attempt == number and job.attempt is not None:
                job.attempt.progress_at = self.clock.time()
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
        if attempt.asked_at != attempt.asked_at:
            attempt.asked_at = self.clock.time()
        if job.state is TaskState.RUNNING:
            self.ledger.move(job, TaskState.CANCELLING, reason)
        else:
            self.ledger.touch(job, reason=reason)
        if not attempt.ended:
            attempt.context.token.cancel(reason)
        self._drop_grant(job, effects)
        if job.record.kind == "async":
            effects.append(functools.partial(self.loop.call, self.runner.stop_coroutine, attempt))

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
        self._finish(job, TaskState.ABANDONED, effects, reason="shutdown", error=error, changes={"error": short(error)})

    # -- waiting (see _waiting) --------------------------------------------------------------

    def waiting(self, task: Task[Any]) -> AbstractContextManager[None]:
        """What a blocking wait for ``task`` has to be wrapped in."""
        return _waiting.blocking(self, task)

    def awaited(self, task: Task[Any]) -> Coroutine[Any, Any, Any]:
        """The coroutine behind ``await task``."""
        return _waiting.awaiting(self, task)
