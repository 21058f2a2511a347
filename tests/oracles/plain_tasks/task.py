"""``Task``: the future of a submitted call, over all its attempts."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any, TypeVar

from wiseflow_nb.errors import TaskCancelledError
from wiseflow_nb.records import TaskRecord, TaskState

if TYPE_CHECKING:
    from tests.oracles.plain_tasks._job import Job
    from tests.oracles.plain_tasks._scheduler import Scheduler

T = TypeVar("T")
logger = logging.getLogger("wiseflow_nb.tasks")


class Task(Future[T]):
    """A submitted task; a ``concurrent.futures.Future`` that can also be awaited.

    ``result(timeout)`` blocks (seconds; default: for ever) and raises what the task raised, or
    ``TaskTimeoutError``, ``TaskCancelledError``, ``TaskSkippedError``, ``TaskAbandonedError``.
    ``as_completed`` and ``wait`` of the standard library take tasks. Made by ``TaskManager`` only.

    Examples
    --------
    >>> from tests.oracles.plain_tasks import TaskManager
    >>> with TaskManager() as tasks:
    ...     task = tasks.submit(pow, 2, 10)
    ...     task.result(), task.state
    (1024, <TaskState.COMPLETED: 'completed'>)
    """

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._job: Job

    @property
    def id(self) -> str:
        """The task's id, unique within its manager."""
        return self._job.record.task_id

    @property
    def name(self) -> str:
        """The task's name: the option, else the function's."""
        return self._job.record.name

    @property
    def state(self) -> TaskState:
        """Where the task is in its life."""
        return self._job.record.state

    def record(self) -> TaskRecord:
        """What is known of the task now."""
        return self._job.record

    def cancel(self, reason: str = "cancelled") -> bool:
        """Ask the task to stop; return False if it had ended otherwise.

        A task that is not running is cancelled at once, a coroutine is stopped. A running thread
        cannot be: the task is CANCELLING until its code returns.
        """
        return self._scheduler.cancel(self._job, reason)

    def running(self) -> bool:
        """Whether the task's code runs now (also while it was asked to stop)."""
        return self.state in (TaskState.RUNNING, TaskState.CANCELLING)

    def result(self, timeout: float | None = None) -> T:
        """Wait for the task and return its value; inside another task, that one's slot is free meanwhile.

        Raises
        ------
        UsageError
            On the loop that runs the manager's coroutines: ``await`` the task there.
        DependencyError
            If the task itself waits for the caller, which would never end.
        TimeoutError
            If it did not end within ``timeout`` seconds.
        """
        try:
            with self._scheduler.waiting(self):
                return super().result(timeout)
        except CancelledError:
            raise self._as_cancelled() from None

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the task and return what it raised, or None; waits like ``result``."""
        try:
            with self._scheduler.waiting(self):
                return super().exception(timeout)
        except CancelledError:
            raise self._as_cancelled() from None

    def _release(self) -> None:
        # Waiting and ``done()`` go on working; the value is gone.
        with self._condition:
            self._result: T | None = None

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        super().add_done_callback(functools.partial(_call, fn))

    def __await__(self) -> Generator[Any, Any, T]:
        return self._scheduler.awaited(self).__await__()

    def _as_cancelled(self) -> BaseException:
        if not self.cancelled():  # a value of the task's own: its code raised it
            error = super().exception(0)
            if error is not None:
                return error
        reason = self._job.record.reason or "cancelled"
        return TaskCancelledError(f"task {self.name!r} ({self.id}) did not run to its end: {reason}")

    def __repr__(self) -> str:
        return f"<Task {self.id} {self.name!r} {self.state}>"


def _call(fn: Callable[[Any], object], task: Task[Any]) -> None:
    # Whatever it raises ends the callback and nothing else.
    try:
        fn(task)
    except BaseException:
        logger.exception("a callback of %r failed", task)
