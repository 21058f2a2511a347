"""What code inside a task can ask about itself: the current task, its token, its progress.

The context travels in a ``contextvars.ContextVar``, so it is right in threads, in coroutines and
in whatever they await.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from wiseflow_nb.errors import TaskCancelledError, UsageError


class CancelToken:
    """A flag that is set once, with its reason.

    Examples
    --------
    >>> token = CancelToken()
    >>> token.cancel("no longer needed"), token.cancel("again")
    (True, False)
    >>> token.cancelled, token.reason
    (True, 'no longer needed')
    """

    __slots__ = ("_event", "_lock", "_told", "reason")

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._told: Callable[[str], None] | None = None
        self.reason = ""

    @property
    def cancelled(self) -> bool:
        """Whether the task was asked to stop."""
        return self._event.is_set()

    def cancel(self, reason: str = "cancelled") -> bool:
        """Ask the task to stop; return whether this call was the first to do so."""
        with self._lock:
            if self._event.is_set():
                return False
            self.reason = reason
            self._event.set()
            if self._told is not None:
                self._told(reason)
            return True

    def wait(self, timeout: float | None = None) -> bool:
        """Block until cancelled or until ``timeout`` seconds have passed; return ``cancelled``."""
        return self._event.wait(timeout)

    @contextlib.contextmanager
    def telling(self, told: Callable[[str], None]) -> Iterator[None]:
        """Inside the block, call ``told(reason)`` when this is cancelled; at once if it is already.

        It is called by whoever cancels, who may hold a lock: it should do no more than pass the
        word on. It is never called after the block.
        """
        with self._lock:
            self._told = told
            if self._event.is_set():
                told(self.reason)
        try:
            yield
        finally:
            with self._lock:
                self._told = None


@dataclass(frozen=True, slots=True)
class RemoteRun:
    """What is known of an attempt whose code ran in another process.

    ``source`` is how the CPU seconds were measured, ``memory_source`` how the peak was; ``asked``
    whether the code was asked to stop before it ended; ``forced`` whether its process was killed.
    """

    source: str = "unknown"
    cpu_seconds: float = math.nan
    memory_peak_bytes: float = math.nan
    output_tail: str = ""
    asked: bool = False
    forced: bool = False
    cleanup_failures: tuple[str, ...] = ()

    @property
    def memory_source(self) -> str:
        """How the peak was measured; ``unknown`` where the system does not tell it."""
        return "unknown" if math.isnan(self.memory_peak_bytes) else "process"


class TaskContext:
    """The running attempt, as its own code sees it through ``current_task()``."""

    __slots__ = ("_cleanups", "_on_progress", "attempt", "name", "remote", "task_id", "token")

    def __init__(
        self,
        task_id: str,
        name: str,
        attempt: int = 1,
        token: CancelToken | None = None,
        on_progress: Callable[[float, str], None] | None = None,
    ) -> None:
        self.task_id = task_id
        self.name = name
        self.attempt = attempt
        self.token = token if token is not None else CancelToken()
        self._on_progress = on_progress
        #: Set when this attempt's code ran in another process and has ended.
        self.remote: RemoteRun | None = None
        self._cleanups: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    @property
    def cancelled(self) -> bool:
        """Whether this attempt was asked to stop (by a cancel, a time-out or a shutdown)."""
        return self.token.cancelled

    @property
    def forced(self) -> bool:
        """For cleanup handlers: whether the code was killed, so that nothing inside it cleaned up."""
        return self.remote is not None and self.remote.forced

    def check_cancelled(self) -> None:
        """Raise ``TaskCancelledError`` if this attempt was asked to stop."""
        if self.token.cancelled:
            raise TaskCancelledError(f"task {self.name!r} was asked to stop: {self.token.reason}")

    def progress(self, fraction: float, text: str = "") -> None:
        """Tell how far the task is: a fraction of 0-1 and a short text.

        Raises
        ------
        UsageError
            If the fraction is not within 0 and 1.
        """
        if not 0.0 <= fraction <= 1.0:
            raise UsageError(f"progress {fraction!r} is not within 0 and 1; divide by the total")
        if self._on_progress is not None:
            self._on_progress(float(fraction), text)

    def push_cleanup(self, handler: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        """Run ``handler(*args, **kwargs)`` after this attempt's code has stopped without completing.

        Handlers run last in, first out, exactly once per attempt.
        """
        self._cleanups.append((handler, args, kwargs))

    def take_cleanups(self) -> list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
        """Return the pushed handlers, last in first out, and forget them."""
        taken, self._cleanups = self._cleanups[::-1], []
        return taken


_current: contextvars.ContextVar[TaskContext | None] = contextvars.ContextVar("wiseflow_nb_task", default=None)


def current_task() -> TaskContext | None:
    """Return the context of the task this code runs in, or None outside of tasks.

    Examples
    --------
    >>> current_task() is None
    True
    """
    return _current.get()


def check_cancelled() -> None:
    """Raise ``TaskCancelledError`` if the current task was asked to stop; outside of tasks, do nothing.

    Call it in long loops: a running thread cannot be stopped from outside.
    """
    context = _current.get()
    if context is not None:
        context.check_cancelled()


def enter_task(context: TaskContext) -> contextvars.Token[TaskContext | None]:
    """Make ``context`` the current one; give the returned token to ``leave_task``."""
    return _current.set(context)


def leave_task(token: contextvars.Token[TaskContext | None]) -> None:
    """Undo ``enter_task``."""
    _current.reset(token)
