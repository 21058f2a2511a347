"""What the manager keeps of a task while it lives; every field is guarded by the manager's lock."""

from __future__ import annotations

import asyncio
import contextvars
import random
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from tests.oracles.plain_tasks._machine import Stop
from tests.oracles.plain_tasks._options import TaskOptions
from tests.oracles.plain_tasks._timer import TimerHandle
from tests.oracles.plain_tasks.task import Task
from wiseflow_nb.context import TaskContext
from wiseflow_nb.errors import TaskSkippedError
from wiseflow_nb.records import NAN, Priority, TaskRecord, TaskState


class Attempt:
    """One run of a task's code, and what came of it."""

    __slots__ = (
        "asked",
        "asked_at",
        "context",
        "cpu_seconds",
        "cpu_source",
        "driver",
        "ended",
        "error",
        "number",
        "progress_at",
        "stop",
        "timer",
        "value",
        "wall_seconds",
    )

    def __init__(self, number: int, context: TaskContext) -> None:
        self.number = number
        self.context = context
        self.stop = Stop.NONE
        self.timer: TimerHandle | None = None
        self.driver: asyncio.Task[None] | None = None
        self.ended = False
        self.asked = False
        #: Seconds since the epoch; NaN: never.
        self.asked_at = NAN
        self.progress_at = NAN
        self.value: Any = None
        self.error: BaseException | None = None
        self.wall_seconds = NAN
        self.cpu_seconds = NAN
        self.cpu_source = "unknown"


class Job:
    """A task as the manager knows it. Its state is that of its record, and nowhere else."""

    __slots__ = (
        "args",
        "attempt",
        "deadline",
        "dependencies",
        "dependents",
        "fn",
        "grant",
        "history",
        "holds",
        "kwargs",
        "level",
        "number",
        "options",
        "ready_at",
        "record",
        "remaining",
        "retry_timer",
        "rng",
        "root_cause",
        "skipped",
        "takers",
        "takes",
        "task",
        "task_ref",
        "variables",
        "wait_depth",
        "waiters",
        "waiting_on",
    )

    def __init__(
        self,
        number: int,
        record: TaskRecord,
        options: TaskOptions,
        call: tuple[Any, tuple[Any, ...], dict[str, Any]],
        task: Task[Any],
        variables: contextvars.Context,
    ) -> None:
        self.number = number
        self.record = record
        self.options = options
        self.fn, self.args, self.kwargs = call
        # Held until settled; afterwards a result lives as long as somebody keeps the task.
        self.task: Task[Any] | None = task
        self.task_ref = weakref.ref(task)
        self.variables = variables
        #: Own class, or the highest class of those that wait for this task.
        self.level: Priority = options.priority
        self.remaining = 0
        #: Dependents that may still take the result, where it is not to be kept.
        self.takers = 0
        self.takes: list[Job] = []
        self.dependencies: list[Job] = []
        self.dependents: list[Job] = []
        self.waiters: list[Job] = []
        self.waiting_on: list[Job] = []
        self.wait_depth = 0
        self.grant: Future[None] | None = None
        self.holds = False
        self.ready_at = NAN
        self.attempt: Attempt | None = None
        self.deadline: TimerHandle | None = None
        self.retry_timer: TimerHandle | None = None
        self.rng = random.Random(options.retry.seed)
        self.root_cause: BaseException | None = None
        self.skipped: list[str] = []
        self.history: deque[str] = deque(maxlen=64)

    @property
    def task_id(self) -> str:
        return self.record.task_id

    @property
    def state(self) -> TaskState:
        return self.record.state

    @property
    def released(self) -> bool:
        """Whether the task completed and its value was not kept for those that come late."""
        return self.state is TaskState.COMPLETED and not self.options.keep_result

    @property
    def label(self) -> str:
        """The name and id, for messages."""
        return f"{self.record.name!r} ({self.record.task_id})"

    def cause(self) -> BaseException | None:
        """What the task ended with, as long as it is known; of a skipped one the first cause."""
        error = self.root_cause
        if error is None and (task := self.task_ref()) is not None and task.done() and not task.cancelled():
            error = Future.exception(task, 0)
        return error.root_cause if isinstance(error, TaskSkippedError) else error

    def __repr__(self) -> str:
        return f"<Job {self.label} {self.state}>"


#: What has to happen once the manager's lock is released.
Effects = list[Callable[[], object]]
