"""``Task``: the future of a submitted call, over all its attempts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from wiseflow_nb.errors import TaskCancelledError
from wiseflow_nb.records import TaskRecord, TaskState, text_of
from wiseflow_nb.tasks._machine import CANCELLING, RUNNING, STATES

if TYPE_CHECKING:
    from wiseflow_nb.tasks._job import Job
    from wiseflow_nb.tasks._scheduler import Scheduler

T = TypeVar("T")

Callbacks = list[Callable[[Any], object]]
#: Where the callbacks are made that hand an end to a loop: they wait for nothing.
BRIDGES = ("asyncio.futures", "wiseflow_nb.futures")

logger = logging.getLogger("wiseflow_nb.tasks")
# The standard library's own words for a future's state: ``wait`` and ``as_completed`` look for them.
_PENDING, _RUNNING, _CANCELLED, FINISHED = "PENDING", "RUNNING", "CANCELLED_AND_NOTIFIED", "FINISHED"
# Held for a few steps: while an end is written that nobody waits for, a condition is set by the first
# that does, or a callback is entered. Re-entrant, for a finaliser may come in between.
ending = threading.RLock()
_ending = threading.local()


class Task(Future[T]):
    """A submitted task; a ``concurrent.futures.Future`` that can also be awaited.

    ``result(timeout)`` blocks (seconds; default: for ever) and raises what the task raised, or
    ``TaskTimeoutError``, ``TaskCancelledError``, ``TaskSkippedError``, ``TaskAbandonedError``.
    ``as_completed`` and ``wait`` of the standard library take tasks. Made by ``TaskManager`` only.

    Examples
    --------
    >>> from wiseflow_nb.tasks import TaskManager
    >>> with TaskManager() as tasks:
    ...     task = tasks.submit(pow, 2, 10)
    ...     task.result(), task.state
    (1024, <TaskState.COMPLETED: 'completed'>)
    """

    # Most tasks are never waited for by a thread: what the standard library's future makes for each
    # (a condition, two lists) is made by the first that asks. As in the pool's future, once there is a
    # condition the end is written only while it is held, and those that watch are told before it is
    # released: ``wait`` and ``as_completed`` count on both. Until then ``ending`` stands in for it.
    _made: threading.Condition | None = None
    _watchers: list[Any] | None = None
    _callbacks: Callbacks | None = None
    #: The standard library's word for the end, empty until then.
    _end = ""
    #: The thread that is about to write the end and has begun to think of the next task; 0 if none is.
    _closing = 0
    _result: T | None = None
    _exception: BaseException | None = None

    _job: Job

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        made = self._made
        if made is None:
            fresh = threading.Condition()
            with ending:
                made = self._made
                if made is None:
                    made = self._made = fresh
        return made

    @property
    def _waiters(self) -> list[Any]:  # type: ignore[override]
        # Read by ``wait`` and ``as_completed`` of the standard library, under the condition.
        if self._watchers is None:
            self._watchers = []
        return self._watchers

    @property
    def _state(self) -> str:  # type: ignore[override]
        return self._end or (_RUNNING if self.running() else _PENDING)

    @property
    def id(self) -> str:
        """The task's id, unique within its manager."""
        return self._job.task_id

    @property
    def name(self) -> str:
        """The task's name: the option, else the function's."""
        return self._job.name

    @property
    def state(self) -> TaskState:
        """Where the task is in its life."""
        return STATES[self._job.code]

    def record(self) -> TaskRecord:
        """What is known of the task now."""
        return self._job.record

    def cancel(self, reason: str = "cancelled") -> bool:
        """Ask the task to stop; return False if it had ended otherwise.

        A task that is not running is cancelled at once, a coroutine is stopped. A running thread
        cannot be: the task is CANCELLING until its code returns. Asking again changes nothing.
        """
        return self._scheduler.cancel(self._job, text_of(reason))

    def running(self) -> bool:
        """Whether the task's code runs now (also while it was asked to stop)."""
        return self._job.code in (RUNNING, CANCELLING)

    def result(self, timeout: float | None = None) -> T:
        """Wait for the task and return its value; inside another task, that one's slot is free meanwhile.

        Raises
        ------
        UsageError
            On the loop that runs the manager's coroutines, unless it is a notebook's and nothing that is
            waited for needs it: ``await`` the task there.
        DependencyError
            If the task itself waits for the caller, which would never end.
        TimeoutError
            If it did not end within ``timeout`` seconds.
        """
        try:
            if not self._end:
                with self._scheduler.waiting(self, timeout):
                    self._wait(timeout)
            return self._value()
        except CancelledError:
            raise self._as_cancelled() from None

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the task and return what it raised, or None; waits like ``result``."""
        try:
            if not self._end:
                with self._scheduler.waiting(self, timeout):
                    self._wait(timeout)
            if self._end is _CANCELLED:
                raise CancelledError
            return self._exception
        except CancelledError:
            raise self._as_cancelled() from None

    def done(self) -> bool:
        """Whether the task has ended and its result can be had."""
        return bool(self._end)

    def cancelled(self) -> bool:
        """Whether the task ended CANCELLED."""
        return self._end is _CANCELLED

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Call ``fn(task)`` when the task has ended, at once if it has; on the thread that ends it.

        It may wait for other tasks, but not on the manager's loop, where coroutines end: what could begin
        was called for before. Whatever it raises is logged and counted (``TaskManager.callback_failures``);
        an interrupt that the main thread is sent in a callback is raised there, when all the others were called.
        """
        condition = self._condition
        with condition:
            with ending:
                if not self._end and self._closing in (0, threading.get_ident()):
                    if self._callbacks is None:
                        self._callbacks = []
                    self._callbacks.append(fn)
                    return
            while not self._end:  # that other thread's next step
                condition.wait()
        interrupt = _call(fn, self)
        if interrupt is not None:
            raise interrupt

    def _finish(self, value: Any, error: BaseException | None, cancelled: bool = False) -> Callbacks | None:
        # Once a task, by whoever made the last transition, without the manager's lock. Return what is to be
        # called then, after everybody was called for whom that may wait for.
        self._result, self._exception = value, error
        end = _CANCELLED if cancelled else FINISHED
        with ending:
            made = self._made
            if made is None:
                self._end = end
                return None
        with made:
            self._end = end
            for watcher in self._watchers or ():
                if cancelled:
                    watcher.add_cancelled(self)
                elif error is not None:
                    watcher.add_exception(self)
                else:
                    watcher.add_result(self)
            made.notify_all()
            callbacks, self._callbacks = self._callbacks, None
        return callbacks

    def _call_back(self, callbacks: Callbacks) -> None:
        interrupt: KeyboardInterrupt | None = None
        self._scheduler.timers.step_aside()
        before, _ending.scheduler = settling(), self._scheduler
        try:
            for fn in callbacks:
                interrupt = _call(fn, self) or interrupt
        finally:
            _ending.scheduler = before
        if interrupt is not None:
            raise interrupt

    def _value(self) -> T:
        # What the standard library's ``result`` does, for a task that has ended.
        if self._end is _CANCELLED:
            raise CancelledError
        if self._exception is not None:
            try:
                raise self._exception
            finally:
                # The traceback holds this frame, and with it the task and all its error's frames.
                del self
        return cast(T, self._result)

    def _release(self) -> None:
        # Waiting and ``done()`` go on working; the value is gone.
        self._result = None

    def __await__(self) -> Generator[Any, Any, T]:
        return self._scheduler.awaited(self).__await__()

    def _wait(self, timeout: float | None) -> None:
        condition = self._condition
        with condition:
            if not self._end:
                condition.wait(timeout)
        if not self._end:
            raise TimeoutError(f"task {self.name!r} ({self.id}) has not ended within {timeout} s")

    def _as_cancelled(self) -> BaseException:
        if not self.cancelled() and self._exception is not None:  # its own code raised it
            return self._exception
        reason = self._job.reason or "cancelled"
        return TaskCancelledError(f"task {self.name!r} ({self.id}) did not run to its end: {reason}")

    def __repr__(self) -> str:
        return f"<Task {self.id} {self.name!r} {self.state}>"


def share_names(kind: type[Any], names: str) -> None:
    """Make known, before there are instances, which names they will have: see ``_job``."""
    first: Any = object.__new__(kind)
    for name in names.split():
        setattr(first, name, None)


share_names(Task, "_scheduler _job _end _result _exception _made _watchers _callbacks")


def settling() -> Scheduler | None:
    """Whose task's done-callbacks this thread is calling, if any: the task counts as ended only after them."""
    return getattr(_ending, "scheduler", None)


def may_wait(callbacks: Callbacks | None) -> bool:
    """Whether there are callbacks that may take their time, or wait for other tasks."""
    # A function's own module: of any other object the name could be code of the user's.
    return bool(callbacks) and not all(type(fn) is FunctionType and fn.__module__ in BRIDGES for fn in callbacks or ())


def _call(fn: Callable[[Any], object], task: Task[Any]) -> KeyboardInterrupt | None:
    # Whatever it raises ends the callback and nothing else: the thread has tasks of others to go on with. An
    # interrupt of the main thread is meant for what that thread is at, so it is handed back.
    try:
        fn(task)
    except BaseException as error:  # the caller's callback: counted and logged, and the next one is called
        task._scheduler.callback_failures += 1
        logger.exception("a callback of %r failed", task)
        return interrupt_of(error)
    return None


def interrupt_of(error: BaseException) -> KeyboardInterrupt | None:
    """The error, if it is an interrupt that the main thread was sent; one on a thread of ours is no more than an error."""
    main = threading.current_thread() is threading.main_thread()
    return error if main and isinstance(error, KeyboardInterrupt) else None
