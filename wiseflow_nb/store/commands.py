"""The verbs that another process may ask of a session, and what their arguments must be.

Both sides check with the same function: the sender before it writes, the session before it acts.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wiseflow_nb.errors import CommandError, UsageError
from wiseflow_nb.records import CommandResult, Priority
from wiseflow_nb.store.schema import NEXT_COMMAND

MAX_ARGUMENT_BYTES = 64 * 1024
#: A command that nobody took for so long is refused: its sender has given up.
STALE_AFTER_SECONDS = 30.0
HIDDEN = "(hidden)"
SHUTDOWN_MODES = ("drain", "cancel_pending", "now")

Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 256


def _number(low: float, high: float) -> Check:
    def check(value: Any) -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and low <= value <= high  # false for NaN, and safe for any size of int

    return check


def _whole(low: int, high: int) -> Check:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _priority(value: Any) -> bool:
    return isinstance(value, str) and value.upper() in Priority.__members__


def _changes(value: Any) -> bool:
    return isinstance(value, dict) and 0 < len(value) <= 64 and all(isinstance(key, str) for key in value)


#: verb -> argument -> (check, what is allowed). Every argument is required.
VERBS: Mapping[str, Mapping[str, tuple[Check, str]]] = {
    "watch": {"seconds": (_number(1, 60), "a number from 1 to 60")},
    "cancel": {"task_id": (_text, "a task's id")},
    "retry": {"task_id": (_text, "a task's id")},
    "reprioritise": {
        "task_id": (_text, "a task's id"),
        "priority": (_priority, "one of low, normal, high, critical"),
    },
    "pause": {},
    "resume": {},
    "resize": {
        "min_workers": (_whole(1, 1024), "a whole number from 1 to 1024"),
        "max_workers": (_whole(1, 1024), "a whole number from 1 to 1024"),
    },
    "configure": {"changes": (_changes, "settings by name")},
    "acknowledge": {"alert_id": (_text, "an alert's id")},
    "silence": {
        "alert_id": (_text, "an alert's id"),
        "seconds": (_number(1, 7 * 86_400), "a number of seconds up to a week"),
    },
    "shutdown": {"mode": (lambda value: value in SHUTDOWN_MODES, "one of drain, cancel_pending, now")},
}


def validate(verb: str, arguments: Any) -> dict[str, Any]:
    """Return the arguments of a verb, checked.

    Raises
    ------
    UsageError
        If the verb is unknown, an argument is missing, unknown or not allowed, or all of it is too large.

    Examples
    --------
    >>> validate("cancel", {"task_id": "t1"})
    {'task_id': 't1'}
    """
    expected = VERBS.get(verb) if isinstance(verb, str) else None
    if expected is None:
        raise UsageError(f"unknown command {_shown(verb)}; the commands are {', '.join(VERBS)}")
    if not isinstance(arguments, dict) or arguments.keys() != expected.keys():
        raise UsageError(f"{verb} takes exactly: {', '.join(expected) or 'no arguments'}")
    for name, (check, allowed) in expected.items():
        if not check(arguments[name]):
            raise UsageError(f"{verb}: {name}={_shown(arguments[name])} is not {allowed}")
    try:
        size = len(json.dumps(arguments))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{verb}: the arguments cannot be sent ({error}); give texts, numbers and lists") from None
    if size > MAX_ARGUMENT_BYTES:
        raise UsageError(f"{verb}: the arguments are over {MAX_ARGUMENT_BYTES} bytes; send less")
    return arguments


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int with more digits than Python writes
        text = f"a number of {type(value).__name__}"
    return text if len(text) <= 66 else f"{text[:65]}…"


def masked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a command as they may be kept and shown: what is secret is hidden."""
    changes = arguments.get("changes")
    if not isinstance(changes, dict):
        return dict(arguments)
    shown = {name: HIDDEN if is_secret_name(name) else value for name, value in changes.items()}
    return {**arguments, "changes": shown}


def is_secret_name(name: str) -> bool:
    """Whether a setting is secret, by its name: the recorder does not load the settings."""
    return "token" in name.lower()


def refuse_secrets(changes: Mapping[str, Any]) -> None:
    """Refuse secret settings from elsewhere: what is asked from there stands in the session's file until it is read.

    Raises
    ------
    UsageError
        If one of the changes is secret; its value is not in the message.

    Examples
    --------
    >>> refuse_secrets({"cpu_threshold": 80})
    >>> refuse_secrets({"dashboard_token": "x"})
    Traceback (most recent call last):
    wiseflow_nb.errors.UsageError: DASHBOARD_TOKEN is secret and is not taken from another process or a page, ...
    """
    names = ", ".join(name.upper()[:64] for name in changes if is_secret_name(name))
    if names:
        raise UsageError(
            f"{names} is secret and is not taken from another process or a page, as what these ask is written to the "
            "session's file; set it with session.configure() in the session's own process, or before it starts in the "
            "environment or wiseflow.toml"
        )


def logged(verb: str, arguments: Mapping[str, Any], who: str, result: CommandResult, now: float) -> dict[str, Any]:
    """Return the row of a command that went another way than through the table; ``now`` is epoch seconds."""
    return {
        "created_seconds": now,
        "who": who[:256],
        "verb": verb,
        "arguments": json.dumps(masked(arguments), default=str)[:MAX_ARGUMENT_BYTES],
        "status": "done",
        "ok": int(result.ok),
        "message": result.message,
        "finished_seconds": now,
    }


def send(
    connection: sqlite3.Connection,
    verb: str,
    arguments: dict[str, Any],
    *,
    who: str,
    now: float,
    timeout: float = 5.0,
    poll: float = 0.02,
) -> CommandResult:
    """Write a command and wait for its answer.

    ``connection`` is in autocommit mode and may write. ``now`` is seconds since the epoch.

    Raises
    ------
    UsageError
        If the command is not well formed or would carry a secret; nothing was written.
    CommandError
        If no answer came within ``timeout`` seconds; the command is withdrawn if nobody took it.
    """
    checked = validate(verb, arguments)
    refuse_secrets(checked.get("changes", {}))
    number = patiently(
        connection,
        f"INSERT INTO commands (id, created_seconds, who, verb, arguments) VALUES ({NEXT_COMMAND}, ?, ?, ?, ?)",
        (now, who[:256], verb, json.dumps(checked)),
    ).lastrowid
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        row = patiently(
            connection, "SELECT ok, message FROM commands WHERE id = ? AND status = 'done'", (number,)
        ).fetchone()
        if row is not None:
            return CommandResult(bool(row[0]), str(row[1]))
        time.sleep(poll)
    withdrawn = patiently(
        connection,
        "UPDATE commands SET status = 'done', ok = 0, message = 'withdrawn', finished_seconds = ? "
        "WHERE id = ? AND status = 'new'",
        (now + timeout, number),
    ).rowcount
    what = "was withdrawn" if withdrawn else "was taken but not answered"
    raise CommandError(f"the session did not answer {verb!r} within {timeout:g} s; the command {what}")


def open_to_send(path: str) -> sqlite3.Connection:
    """Open a session's file (the URI of it) to send commands.

    Who sends waits for no disk: a command that a power failure takes was of a session that it took as well,
    and the log is copied back by the recorder.
    """
    connection = sqlite3.connect(path, uri=True, isolation_level=None, timeout=0.0)
    try:
        # To read the schema can be to wait for somebody who is putting the log in order.
        patiently(connection, "PRAGMA synchronous = NORMAL")
        patiently(connection, "PRAGMA wal_autocheckpoint = 0")
    except BaseException:
        connection.close()
        raise
    return connection


def patiently(
    connection: sqlite3.Connection,
    statement: str,
    values: Sequence[Any] = (),
    *,
    patience: float = 2.0,
    poll: float = 0.002,
) -> sqlite3.Cursor:
    """Run a statement as soon as nobody else writes, within ``patience`` seconds.

    SQLite's own waiting asks ever less often, up to 0.1 s apart, and beside short steps of others comes last.

    Raises
    ------
    sqlite3.OperationalError
        If somebody else wrote all the while.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return connection.execute(statement, values)
        except sqlite3.OperationalError as error:
            # The primary code: there are several kinds of busy.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                raise
        time.sleep(poll)


def wait_for_log(path: Path, timeout: float, poll: float = 0.02) -> None:
    """Wait until the log of a session's file and its index are there, as they are while it is recorded.

    Where one was deleted the recorder puts the file back. To write before that would be to make an index in
    which the recorder's locks are not seen.

    Raises
    ------
    CommandError
        If they were not put back within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not all(os.path.exists(f"{path}{end}") for end in ("-wal", "-shm")):
        if time.monotonic() >= deadline:
            raise CommandError(f"the log of {path} is gone and was not put back: nothing was asked; try again")
        time.sleep(poll)


def sender() -> str:
    """Return who sends a command, as the audit names it: user, host and process."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError, ImportError):
        name = "user"
    return f"{name}@{socket.gethostname()} (process {os.getpid()})"
