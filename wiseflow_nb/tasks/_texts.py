"""The texts of errors, as the records of tasks tell them.

To make one is to call code of the user's, which may take its time, and a traceback's lines are read
from files: so it is done when the code has ended, before the manager's lock is taken.
"""

from __future__ import annotations

import traceback
from typing import NamedTuple

from wiseflow_nb.errors import TaskError

#: Bound of a stored traceback, in characters; the end is what tells most.
TRACEBACK_KEPT = 8192

# As the standard library's tracebacks have it.
_CAUSED = "\nThe above exception was the direct cause of the following exception:\n\n"


class ErrorText(NamedTuple):
    """An error as words: the name of its type, its own text and its traceback; all empty for none."""

    kind: str = ""
    text: str = ""
    traceback: str = ""

    def line(self, reason: str = "") -> str:
        """The type and the text; ``reason`` stands in for a text that is not there.

        Examples
        --------
        >>> ErrorText("ValueError", "no").line("stopped"), ErrorText("CancelledError").line("stopped")
        ('ValueError: no', 'CancelledError: stopped')
        """
        return ": ".join(filter(None, (self.kind, self.text or reason))) if self.kind else ""


NO_ERROR = ErrorText()


def text_of_error(error: BaseException | None) -> ErrorText:
    """The words of any error; not while the manager's lock is held."""
    if error is None:
        return NO_ERROR
    kind = type(error).__name__
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001  user code: an error that cannot be shown is still named
        text = "(its text could not be made)"
    try:
        lines = "".join(traceback.format_exception(error))
    except BaseException:  # noqa: BLE001  as above
        lines = f"{kind}: {text}\n"
    return ErrorText(kind, text, lines[-TRACEBACK_KEPT:])


def text_of_own(error: TaskError, cause: ErrorText = NO_ERROR) -> ErrorText:
    """The words of an error of the manager's own that was never raised, and of its cause; calls nothing of the user's."""
    kind, text = type(error), str(error)
    before = f"{cause.traceback}{_CAUSED}" if cause.kind else ""
    lines = f"{before}{kind.__module__}.{kind.__qualname__}: {text}\n"
    return ErrorText(kind.__name__, text, lines[-TRACEBACK_KEPT:])
