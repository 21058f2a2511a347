"""The tree of errors that wiseflow_nb raises; each message ends with a remedy.

``WiseflowError`` is the root. Below it, the class tells whose turn it is: ``ConfigurationError``
and ``UsageError`` are for the caller to mend, ``StoreError`` and ``RecorderError`` are about the
machine, the ``Task...`` family tells what became of a task.
"""

from __future__ import annotations

from concurrent.futures import CancelledError as _FutureCancelled


class WiseflowError(Exception):
    """Root of every error raised by wiseflow_nb."""


class ConfigurationError(WiseflowError, ValueError):
    """A setting is unknown or its value is not allowed; nothing was changed."""


class UsageError(WiseflowError, ValueError):
    """A call's arguments do not fit; nothing was changed."""


class DependencyError(UsageError):
    """A task names a dependency that is unknown, or that leads back to itself."""


class IllegalTransitionError(WiseflowError, RuntimeError):
    """A state machine was asked for a move its table does not have."""


class PoolClosedError(WiseflowError, RuntimeError):
    """Work was submitted to a pool or a manager that has been shut down."""


class MissingExtraError(WiseflowError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class StoreError(WiseflowError):
    """The session's file cannot be opened, read or written."""


class StoreVersionError(StoreError):
    """The session's file was written by a newer version; it was left untouched."""


class SessionNotFoundError(StoreError, LookupError):
    """No recorded session has the given id."""


class RecorderError(WiseflowError):
    """The flight recorder cannot be started or does not answer."""


class CommandError(WiseflowError):
    """A command sent to a session was refused, failed, or was not answered in time."""


class DashboardError(WiseflowError):
    """The dashboard cannot be served; the message says what to change."""


class TaskError(WiseflowError):
    """Root of what can become of a task besides its own exception."""


class TaskTimeoutError(TaskError, TimeoutError):
    """The task ran, or waited, longer than it was allowed to, and was stopped."""


class TaskCancelledError(TaskError, _FutureCancelled):
    """The task was cancelled; also raised inside a task by ``check_cancelled()``."""


class TaskSkippedError(TaskError):
    """A dependency did not complete, so the task never ran; ``root_cause`` is the first failure."""

    def __init__(self, message: str, root_cause: BaseException | None = None) -> None:
        super().__init__(message)
        self.root_cause = root_cause


class TaskAbandonedError(TaskError):
    """The task's code was still running when its manager had to close."""


class WorkerLostError(TaskError):
    """The worker process that ran the task died."""
