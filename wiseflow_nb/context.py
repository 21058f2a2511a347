"""What code inside a task can ask about itself: the current task, its token, its progress.

The context travels in a ``contextvars.ContextVar``, so it is right in threads, in coroutines and
in whatever they await.
"""

from __future__ import annotations

import contextvars
import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from wiseflow_nb.errors import TaskCancelledError, UsageError
from wiseflow_nb.records import text_of

#: Bound of a task's kept output, in characters; the end is what tells most.
OUTPUT_KEPT = 8192

Cleanup = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
# One for all: it is held for a few assignments, and a lock for each task would cost more than the task.
# Re-entrant, for a finaliser that cancels a task may come in between.
_lock = threading.RLock()


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

    __slots__ = ("_event", "_told", "cancelled", "reason")

    def __init__(self) -> None:
        # Most tokens are never waited for: the event is made by the first that does.
        self._event: threading.Event | None = None
        self._told: Callable[[str], None] | None = None
        #: Whether the task was asked to stop; set by ``cancel`` only.
        self.cancelled = False
        self.reason = ""

    def cancel(self, reason: str = "cancelled") -> bool:
        """Ask the task to stop; return whether this call was the first to do so."""
        with _lock:
            if self.cancelled:
                return False
            self.reason = reason
            self.cancelled = True
            event = self._event
            if self._told is not None:
                self._told(reason)
        if event is not None:
            event.set()
        return True

    def wait(self, timeout: float | None = None) -> bool:
        """Block until cancelled or until ``timeout`` seconds have passed; return ``cancelled``."""
        with _lock:
            if self.cancelled:
                return True
            if self._event is None:
                self._event = threading.Event()
            event = self._event
        return event.wait(timeout)

    def telling(self, told: Callable[[str], None]) -> AbstractContextManager[None]:
        """Inside the block, call ``told(reason)`` when this is cancelled; at once if it is already.

        It is called by whoever cancels, who may hold a lock: it should do no more than pass the
        word on. It is never called after the block.
        """
        return _Telling(self, told)


class _Telling:
    # A generator would cost three times as much, at each call in a process.
    __slots__ = ("_token", "_told")

    def __init__(self, token: CancelToken, told: Callable[[str], None]) -> None:
        self._token, self._told = token, told

    def __enter__(self) -> None:
        token, told = self._token, self._told
        with _lock:
            token._told = told
            if token.cancelled:
                told(token.reason)

    def __exit__(self, *_: object) -> None:
        with _lock:
            self._token._told = None


class OutputTail:
    """The last ``limit`` characters of what was written to it.

    Examples
    --------
    >>> tail = OutputTail(limit=5)
    >>> tail.write("epoch 1, "); tail.write("epoch 2")
    >>> tail.text()
    'och 2'
    """

    __slots__ = ("_kept", "_limit", "_parts")

    def __init__(self, limit: int = OUTPUT_KEPT) -> None:
        self._limit = limit
        self._parts: list[str] = []
        self._kept = 0

    def write(self, text: str) -> None:
        """Take the text in; what is over the bound is forgotten."""
        self._parts.append(text[-self._limit :])
        self._kept += min(len(text), self._limit)
        if self._kept > 4 * self._limit:
            kept = self.text()
            self._parts, self._kept = [kept], len(kept)

    def text(self) -> str:
        """What is kept."""
        return "".join(self._parts)[-self._limit :]


class RemoteRun(NamedTuple):
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

    # Made on demand, and read from the class until then: a context is made for every task.
    _token: CancelToken | None = None
    _on_progress: Callable[[float, str], None] | None = None
    _output: OutputTail | None = None
    _cleanups: list[Cleanup] | None = None
    #: Set when this attempt's code ran in another process and has ended.
    remote: RemoteRun | None = None

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
        if token is not None:
            self._token = token
        if on_progress is not None:
            self._on_progress = on_progress

    @property
    def token(self) -> CancelToken:
        """What is set when this attempt is asked to stop; code may wait for it."""
        token = self._token
        if token is None:
            with _lock:
                token = self._token = self._token or CancelToken()
        return token

    @property
    def cancelled(self) -> bool:
        """Whether this attempt was asked to stop (by a cancel, a time-out or a shutdown)."""
        token = self._token
        return token is not None and token.cancelled

    @property
    def forced(self) -> bool:
        """For cleanup handlers: whether the code was killed, so that nothing inside it cleaned up."""
        return self.remote is not None and self.remote.forced

    def check_cancelled(self) -> None:
        """Raise ``TaskCancelledError`` if this attempt was asked to stop."""
        if self.cancelled:
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
            self._on_progress(float(fraction), text_of(text))

    def push_cleanup(self, handler: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        """Run ``handler(*args, **kwargs)`` after this attempt's code has stopped without completing.

        Handlers run last in, first out, exactly once per attempt.
        """
        if self._cleanups is None:
            self._cleanups = []
        self._cleanups.append((handler, args, kwargs))

    def take_cleanups(self) -> list[Cleanup]:
        """Return the pushed handlers, last in first out, and forget them."""
        taken, self._cleanups = self._cleanups, None
        return [] if taken is None else taken[::-1]

    def write_output(self, text: str) -> None:
        """Keep the tail of what this attempt's code wrote."""
        if self._output is None:
            self._output = OutputTail()
        self._output.write(text)

    @property
    def output_tail(self) -> str:
        """The end of what this attempt's code wrote to stdout and to ``logging``, 8,192 characters at most."""
        return "" if self._output is None else self._output.text()


class HasContext(Protocol):
    """Work that makes its context when it is first asked for: most work never asks."""

    def task_context(self) -> TaskContext: ...


Held = TaskContext | HasContext | None
_current: contextvars.ContextVar[Held] = contextvars.ContextVar("wiseflow_nb_task", default=None)


def current_task() -> TaskContext | None:
    """Return the context of the task this code runs in, or None outside of tasks.

    Examples
    --------
    >>> current_task() is None
    True
    """
    held = _current.get()
    return held if held is None or isinstance(held, TaskContext) else held.task_context()


def check_cancelled() -> None:
    """Raise ``TaskCancelledError`` if the current task was asked to stop; outside of tasks, do nothing.

    Call it in long loops: a running thread cannot be stopped from outside.
    """
    context = current_task()
    if context is not None:
        context.check_cancelled()


def enter_task(context: TaskContext | HasContext) -> contextvars.Token[Held]:
    """Make ``context``, or what makes one on demand, the current one; give the token to ``leave_task``."""
    return _current.set(context)


def leave_task(token: contextvars.Token[Held]) -> None:
    """Undo ``enter_task``."""
    _current.reset(token)
