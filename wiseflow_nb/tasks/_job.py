"""What the manager keeps of a task while it lives; every field is guarded by the manager's lock.

Most fields of most tasks never leave their first value, so it is read from the class and an instance
holds only what is its own: a task is made in a microsecond and kept in a few hundred bytes. The table
of an instance's own names is shared by all, as long as a name was known before many instances were
made, and up to thirty names: an instance that needs another gets a dictionary of its own, which costs
more than the task. So the names that most tasks need are made known first (``share_names``).
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from wiseflow_nb.context import RemoteRun, TaskContext
from wiseflow_nb.errors import TaskSkippedError
from wiseflow_nb.records import NAN, Priority, TaskRecord, TaskState, text_of
from wiseflow_nb.tasks._machine import PENDING, STATES, Stop, decoded
from wiseflow_nb.tasks._options import TaskOptions
from wiseflow_nb.tasks._texts import NO_ERROR
from wiseflow_nb.tasks._timer import TimerHandle
from wiseflow_nb.tasks.task import Task, share_names


class Attempt(TaskContext):
    """One run of a task's code, as that code sees it, and what came of it."""

    stop = Stop.NONE
    timer: TimerHandle | None = None
    #: The asyncio task that drives this coroutine now.
    driver: asyncio.Task[Any] | None = None
    ended = False
    asked = False
    #: Seconds since the epoch; NaN: never.
    asked_at = NAN
    progress_at = NAN
    value: Any = None
    error: BaseException | None = None
    #: The error in words, made when the code has ended.
    told = NO_ERROR
    #: Whether the retry rule covers the error, or a time-out; told when the code has ended.
    covered = False
    timeout_covered = False
    started_at = NAN
    wall_seconds = NAN
    cpu_seconds = 0.0
    cpu_source = "unknown"
    #: CPU seconds that this attempt's thread spent on calls that it waited for: their own, not this one's.
    lent_seconds = 0.0
    memory_peak_bytes = NAN
    memory_source = "unknown"
    #: What failed of the cleanup inside a process.
    failures: tuple[str, ...] = ()
    coroutine: Any = None

    def __init__(self, job: Job, number: int, now: float) -> None:
        self.job = job
        self.attempt = number
        self.started_at = now

    @property
    def task_id(self) -> str:  # type: ignore[override]
        """The task's id."""
        return self.job.task_id

    @property
    def name(self) -> str:  # type: ignore[override]
        """The task's name."""
        return self.job.name

    @property
    def number(self) -> int:
        """Which attempt this is, from 1."""
        return self.attempt

    @property
    def context(self) -> TaskContext:
        """What the task's own code sees."""
        return self

    @property
    def output_tail(self) -> str:
        """The end of what the attempt has written."""
        return super().output_tail if self.remote is None else self.remote.output_tail

    def take_remote(self, remote: RemoteRun) -> None:
        """Take over what is known of code that ran in another process."""
        self.cpu_seconds, self.cpu_source = remote.cpu_seconds, remote.source
        self.memory_peak_bytes, self.memory_source = remote.memory_peak_bytes, remote.memory_source
        self.failures = remote.cleanup_failures
        # Here it may have been asked while its result was on the way.
        self.asked = remote.asked

    def progress(self, fraction: float, text: str = "") -> None:
        super().progress(fraction, text)
        task = self.job.task
        if task is not None:
            task._scheduler.progressed(self, float(fraction), text_of(text))


class Job:
    """A task as the manager knows it. Its state is ``code``, and nowhere else."""

    code = PENDING
    # What a record tells, besides the fields set below.
    attempts = 0
    reason = ""
    ready_seconds = NAN
    started_seconds = NAN
    finished_seconds = NAN
    queue_seconds = NAN
    #: Wall and CPU seconds of the last attempt, and how the latter was measured.
    figures = (NAN, NAN, "unknown")
    memory_peak_bytes = NAN
    memory_source = "unknown"
    progress = NAN
    progress_text = ""
    error = ""
    traceback = ""
    output_tail = ""
    parents: tuple[str, ...] = ()
    retry_of = ""
    #: Whether it was queued once more because its worker was lost.
    rerun = False
    # How it stands with others.
    remaining = 0
    dependencies: tuple[Job, ...] = ()
    dependents: list[Job] | None = None
    waiters: tuple[Job, ...] = ()
    waiting_on: tuple[Job, ...] = ()
    wait_depth = 0
    grant: Future[None] | None = None
    #: Dependents that may still take the result, where it is not to be kept.
    takers = 0
    takes: tuple[Job, ...] = ()
    skipped: tuple[str, ...] = ()
    #: Of a skipped task, the id and label of the one that began it, and what became of that one.
    skipped_for: tuple[str, str, str] | None = None
    # Where it is.
    holds = False
    #: The class in whose queue it stands, -1 in none.
    place = -1
    ready_at = NAN
    attempt: Attempt | None = None
    deadline: TimerHandle | None = None
    retry_timer: TimerHandle | None = None
    rng: random.Random | None = None
    root_cause: BaseException | None = None
    dropped = False
    rev = 0
    been = 0
    row = -1
    _record: TaskRecord | None = None

    def __init__(
        self,
        number: int,
        task_id: str,
        name: str,
        kind: str,
        options: TaskOptions,
        call: tuple[Any, tuple[Any, ...], dict[str, Any]],
        task: Task[Any],
        variables: contextvars.Context,
        created_seconds: float,
    ) -> None:
        self.number = number
        self.task_id = task_id
        self.name = name
        self.kind = kind
        self.options = options
        self.call = call
        # Held until settled; afterwards a result lives as long as somebody keeps the task.
        self.task: Task[Any] | None = task
        self.task_ref = weakref.ref(task)
        self.variables: contextvars.Context | None = variables
        #: Own class, or the highest class of those that wait for this task.
        self.level: Priority = options.priority
        self.created_seconds = created_seconds

    @property
    def state(self) -> TaskState:
        """Where the task is in its life."""
        return STATES[self.code]

    @property
    def history(self) -> list[str]:
        """The states that it has been through, the last sixty-four."""
        return decoded(self.been)

    @property
    def released(self) -> bool:
        """Whether the task completed and its value was not kept for those that come late."""
        return self.state is TaskState.COMPLETED and not self.options.keep_result

    @property
    def label(self) -> str:
        """The name and id, for messages."""
        return f"{self.name!r} ({self.task_id})"

    @property
    def record(self) -> TaskRecord:
        """What is known of the task, as a value; made when it is asked for."""
        made, attempt = self._record, self.attempt
        if made is not None and made.rev == self.rev and attempt is None:
            return made
        # Read first: who asks may not hold the lock, and what changes meanwhile has a later revision.
        rev = self.rev
        made = TaskRecord(
            self.task_id,
            self.name,
            STATES[self.code],
            self.options.priority,
            self.kind,
            self.attempts,
            self.options.retry.times + 1,
            self.created_seconds,
            self.ready_seconds,
            self.started_seconds,
            self.finished_seconds,
            self.queue_seconds,
            *self.figures,
            self.memory_peak_bytes,
            self.memory_source,
            self.progress,
            self.progress_text,
            self.reason,
            self.error,
            self.traceback,
            self.output_tail if attempt is None else attempt.output_tail,
            self.parents,
            self.options.tags,
            self.retry_of,
            rev,
        )
        self._record = made
        return made

    def cause(self) -> BaseException | None:
        """What the task ended with, as long as it is known; of a skipped one the first cause."""
        error = self.root_cause
        if error is None and (task := self.task_ref()) is not None:
            error = task._exception
        return error.root_cause if isinstance(error, TaskSkippedError) else error

    def __repr__(self) -> str:
        return f"<Job {self.label} {self.state}>"


share_names(
    Job,
    "number task_id name kind options call task task_ref variables level created_seconds ready_at ready_seconds "
    "code been rev place holds attempt attempts started_seconds queue_seconds figures finished_seconds "
    "parents dependencies remaining dependents reason _record",
)
share_names(
    Attempt,
    "job attempt started_at ended asked wall_seconds cpu_seconds cpu_source value error driver coroutine "
    "_token _output _cleanups stop asked_at timer remote",
)

#: What is left of the call of a task that has completed.
NO_CALL: tuple[Any, tuple[Any, ...], dict[str, Any]] = (None, (), {})

#: What has to happen once the manager's lock is released.
Effects = list[Callable[[], object]]
