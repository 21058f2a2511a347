"""The one writer of a session's file. It lives in the recorder and loads neither numpy nor pandas."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wiseflow_nb.errors import StoreError
from wiseflow_nb.records import (
    TIER_RETENTION_SECONDS,
    AlertTransition,
    Sample,
    text_of,
    to_json_dict,
    valid,
    valid_text,
)
from wiseflow_nb.store._samples import SampleWriter
from wiseflow_nb.store.commands import MAX_ARGUMENT_BYTES
from wiseflow_nb.store.paths import DATABASE_NAME, check_regular, database_uri, in_memory, private_directory
from wiseflow_nb.store.schema import (
    ALERT_COLUMNS,
    CELL_COLUMNS,
    COMMAND_COLUMNS,
    NEXT_COMMAND,
    TASK_COLUMNS,
    TRANSITION_COLUMNS,
    check_version,
    migrate,
)

MAX_TEXT = 100_000
COMMANDS_AT_ONCE = 100
#: Of 8 kB: the log is copied back a megabyte at a time.
CHECKPOINT_PAGES = 125
#: One more than the arguments of a command may have, to tell that it has more.
READ_ARGUMENT_BYTES = MAX_ARGUMENT_BYTES + 1


def _upsert(table: str, columns: Sequence[str]) -> str:
    return f"INSERT OR REPLACE INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


_STATEMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    # Updated in place: replacing a row would not run the triggers that count.
    "task": (
        _upsert("tasks", TASK_COLUMNS).replace("INSERT OR REPLACE", "INSERT")
        + " ON CONFLICT (task_id) DO UPDATE SET "
        + ", ".join(f"{name} = excluded.{name}" for name in TASK_COLUMNS if name != "task_id"),
        TASK_COLUMNS,
    ),
    "transition": (_upsert("transitions", TRANSITION_COLUMNS), TRANSITION_COLUMNS),
    "cell": (_upsert("cells", CELL_COLUMNS), CELL_COLUMNS),
    "alert": (_upsert("alerts", ALERT_COLUMNS).replace("OR REPLACE", "OR IGNORE"), ALERT_COLUMNS),
    "event": (
        _upsert("events", ("time_seconds", "kind", "message", "data")),
        ("time_seconds", "kind", "message", "data"),
    ),
    "meta": (_upsert("meta", ("key", "value")), ("key", "value")),
    # A verb that was used in the kernel itself, for the record.
    "command": (
        f"INSERT OR REPLACE INTO commands (id, {', '.join(COMMAND_COLUMNS)}) "
        f"VALUES ({NEXT_COMMAND}, {', '.join('?' * len(COMMAND_COLUMNS))})",
        COMMAND_COLUMNS,
    ),
    # Of an alert that is judged in the kernel; a second mark keeps what the first one said.
    "mark": (
        "INSERT INTO alert_marks (alert_id, acknowledged, silenced_until) VALUES (?, ?, ?) ON CONFLICT (alert_id) "
        "DO UPDATE SET acknowledged = max(acknowledged, excluded.acknowledged), "
        "silenced_until = max(silenced_until, excluded.silenced_until)",
        ("alert_id", "acknowledged", "silenced_until"),
    ),
}


#: What SQLite says of a row that does not fit, not of a file that cannot be written.
_UNFIT = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError)


def bindable(value: Any) -> Any:
    """Return a value that SQLite stores as what it means: bounded valid text, JSON for the rest."""
    kind = type(value)
    if kind is float or value is None:
        return value
    if kind is str and len(value) <= MAX_TEXT:
        return valid_text(value)
    if (kind is list or kind is tuple) and not value:
        return "[]"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return math.copysign(math.inf, value > 0 or -1)
    if value is None or isinstance(value, (int, float)):
        return value
    text = text_of(value) if isinstance(value, (str, bytes)) else _json_text(value)
    if len(text) > MAX_TEXT:
        text = text[: MAX_TEXT - 1] + "…"
    return valid_text(text)


def _own_file(path: Path) -> None:
    """Make a file (0600 whatever the umask), or check that the one there is this user's."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    os.close(os.open(path, flags, 0o600))
    check_regular(path)
    os.chmod(path, 0o600)


def _parts(path: Path) -> tuple[Path, ...]:
    return path, Path(f"{path}-wal"), Path(f"{path}-shm")


def _inode(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _json_text(value: Any) -> str:
    """JSON that stays JSON when it is too long.

    A list loses its end, its only text the end of that, and an object all but the beginning of its text.
    """
    # As letters, not as escapes: a lone surrogate is to be found and replaced like that of any other text.
    text = json.dumps(value, ensure_ascii=False, default=text_of)
    most = MAX_TEXT - 5  # brackets, quotes and the mark of the cut
    while len(text) > MAX_TEXT:
        if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], str):
            # What is escaped takes several letters.
            value, most = [f"{value[0][:most]}…"], most // 2
        elif isinstance(value, (list, tuple)):
            value = value[: len(value) // 2]
        else:
            value = {"cut": text[:1000]}
        text = json.dumps(value, ensure_ascii=False, default=text_of)
    return text


class StoreWriter:
    """Write to the file in transactions that ``begin`` and ``commit`` bound.

    Parameters
    ----------
    path
        The file; made with mode 0600 if it does not exist.

    Raises
    ------
    StoreError, StoreVersionError
        If it cannot be opened or is newer than this code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = self._open()
        try:
            self._samples = SampleWriter(self._db)
        except sqlite3.Error as error:
            self._db.close()
            raise StoreError(f"{path} cannot be opened for recording: {error}") from error
        self._in_transaction = False

    def _open(self) -> sqlite3.Connection:
        path = self.path
        try:
            if not in_memory(path):
                _own_file(path)
            db = sqlite3.connect(
                database_uri(path, "rw"), uri=True, isolation_level=None, check_same_thread=False, timeout=5.0
            )
            try:
                check_version(db, str(path))
                # Blocks of 20 to 79 kB: half the reads of the default. Both before the journal mode, or they are silently off.
                db.execute("PRAGMA page_size = 8192")
                db.execute("PRAGMA auto_vacuum = INCREMENTAL")
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = NORMAL")
                # Often and little: copying the log back is the longest pause that this thread has.
                db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
                migrate(db, str(path))
                self._inodes = {} if in_memory(path) else {part: _inode(part) for part in _parts(path) if part.exists()}
            except BaseException:
                db.close()
                raise
            return db
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{path} cannot be opened for recording: {error}") from error

    def lost_part(self) -> str:
        """The name of a file of the three (database, log, index of the log) that is not the one written any more.

        Each matters: a process that opens the file where the index was deleted makes a new one, in which it
        does not see this one's locks, and both would write over each other. Empty where all are in place.
        """
        if os.name != "posix":
            return ""  # an open file cannot be deleted
        for part, inode in self._inodes.items():
            try:
                if _inode(part) != inode:
                    return part.name
            except OSError:
                return part.name
        return ""

    def is_in_place(self) -> bool:
        """Whether the file that is written still is the one at its path, with its log and the log's index beside it."""
        return not self.lost_part()

    def remake(self) -> None:
        """Put a deleted file back, whole: the open one still holds everything. Gives up an open transaction.

        Raises
        ------
        StoreError
            If it cannot be put back; a later call tries again.
        """
        new = self.path.with_name(f"{DATABASE_NAME}.new")
        try:
            private_directory(self.path.parent)
            # A log that was left alone would be played into the new file.
            for path in (new, *(Path(f"{base}{end}") for base in (new, self.path) for end in ("-wal", "-shm"))):
                path.unlink(missing_ok=True)
            _own_file(new)
            with contextlib.closing(sqlite3.connect(new)) as copy:
                self.rollback()
                self._db.backup(copy)
            os.replace(new, self.path)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{self.path} cannot be put back: {error}") from error
        # Only now: until here the old one was all there is. (Closing it touches no other file: SQLite sees the move.)
        old, self._db = self._db, self._open()
        self._samples.go_on_in(self._db)
        old.close()

    def begin(self) -> None:
        """Open a transaction unless one is open."""
        if not self._in_transaction:
            self._db.execute("BEGIN IMMEDIATE")
            self._in_transaction = True

    def commit(self) -> None:
        """Commit what was written; without anything written, do nothing."""
        if self._in_transaction:
            self._db.execute("COMMIT")
            self._in_transaction = False
            self._samples.committed()

    def rollback(self) -> None:
        """Give up the open transaction, if any."""
        if self._in_transaction:
            self._in_transaction = False
            self._samples.rolled_back()
            self._db.execute("ROLLBACK")

    def apply(self, rows: Iterable[Sequence[Any]]) -> int:
        """Write rows ``(table, values by column)``; return how many were left out, as no table takes them."""
        left_out = 0
        self.begin()
        for row in rows:
            try:
                table, values = row
                statement, columns = _STATEMENTS[table]
                if isinstance(values, Mapping):
                    values = [values.get(name) for name in columns]
                elif not isinstance(values, (list, tuple)) or len(values) != len(columns):
                    left_out += 1
                    continue
                self._db.execute(statement, [bindable(value) for value in values])
            except (KeyError, TypeError, ValueError, OverflowError, RecursionError, *_UNFIT):
                # Whatever a row is, those after it are written.
                left_out += 1
        return left_out

    def meta(self, key: str, value: Any) -> None:
        """Set one value of the meta table, as JSON."""
        self.begin()
        self._db.execute(_STATEMENTS["meta"][0], (key, json.dumps(valid(value))))

    def get_meta(self, key: str) -> Any:
        """Return one value of the meta table, or None."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def alert(self, transition: AlertTransition) -> None:
        """Append one alert transition."""
        self.apply([("alert", to_json_dict(transition))])

    def mark_alert(
        self, alert_id: str, *, acknowledged: bool | None = None, silenced_until: float | None = None
    ) -> None:
        """Record that an alert was acknowledged or silenced."""
        self.begin()
        self._db.execute("INSERT OR IGNORE INTO alert_marks VALUES (?, 0, 0)", (alert_id,))
        if acknowledged is not None:
            self._db.execute(
                "UPDATE alert_marks SET acknowledged = ? WHERE alert_id = ?", (int(acknowledged), alert_id)
            )
        if silenced_until is not None:
            self._db.execute("UPDATE alert_marks SET silenced_until = ? WHERE alert_id = ?", (silenced_until, alert_id))

    def resolve_alerts(self, now: float) -> None:
        """Write the end of every alert that is still open: nobody judges it any more."""
        self.begin()
        self._db.execute(
            "INSERT INTO alerts (alert_id, rule, resource, kind, from_state, to_state, severity, value, threshold, "
            "peak, started_seconds, time_seconds, message, top_processes, silenced, unit) "
            "SELECT alert_id, rule, resource, 'resolved', to_state, 'unknown', 'none', value, threshold, "
            "peak, started_seconds, ?, rule || ' ended with the session', '[]', 0, unit "
            "FROM alerts WHERE rowid IN (SELECT max(rowid) FROM alerts GROUP BY alert_id) AND kind != 'resolved'",
            (now,),
        )

    def sample(self, sample: Sample) -> None:
        """Take one sample into the open block and the open buckets; in memory only until ``write_blocks``."""
        self._samples.add(sample)

    def last_sample_monotonic(self) -> float:
        """The time of the newest sample in the file (monotonic seconds), or -inf."""
        return self._samples.last_monotonic()

    @property
    def full_blocks(self) -> int:
        """How many full blocks wait to be written."""
        return self._samples.full_blocks

    def write_blocks(self, *, partial: bool) -> None:
        """Write the full blocks and, on demand, the open one, which is written over when it has grown."""
        if self._samples.has_blocks(partial):
            self.begin()
            self._samples.write(partial)

    def give_up_blocks(self, most: int) -> int:
        """Keep ``most`` full blocks of a tier that wait, at most; return how many samples were given up."""
        return self._samples.give_up(most)

    def close_tiers(self) -> None:
        """Write the open buckets of the upper tiers too, as far as they go: the end of a recording."""
        self._samples.close_buckets()
        self.write_blocks(partial=True)

    def forget_samples(self, now: float, retention: Sequence[float] = TIER_RETENTION_SECONDS) -> bool:
        """Delete a few blocks of samples older than their tier keeps; return whether more of them wait.

        Their age is that by the monotonic clock: no reading of the other one, however wrong, makes them old.

        Parameters
        ----------
        now
            Monotonic seconds.
        retention
            Seconds that each tier keeps. No raw sample goes before the tiers above have it in a
            block of theirs.
        """
        self.begin()
        return self._samples.forget(now, retention)

    def data_version(self) -> int:
        """A number that changes when another connection has committed."""
        return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def new_commands(self) -> list[tuple[int, float, str, str, str]]:
        """Return (id, created, who, verb, arguments) of the first commands nobody took yet."""
        # As bytes: whoever can write the table can also write text that is none.
        rows = self._db.execute(
            "SELECT id, created_seconds, substr(CAST(who AS BLOB), 1, 1024), substr(CAST(verb AS BLOB), 1, 256), "
            "substr(CAST(arguments AS BLOB), 1, ?) FROM commands WHERE status = 'new' ORDER BY id LIMIT ?",
            (READ_ARGUMENT_BYTES, COMMANDS_AT_ONCE),
        ).fetchall()
        return [(row[0], row[1], *(bytes(item or b"").decode("utf-8", "replace") for item in row[2:])) for row in rows]

    def give_up_commands(self, why: str, now: float, *, taken_only: bool = False) -> None:
        """Answer what nobody will answer any more: all commands, or those alone that were taken before."""
        self.begin()
        which = "status = 'taken'" if taken_only else "status != 'done'"
        self._db.execute(
            f"UPDATE commands SET status = 'done', ok = 0, message = ?, finished_seconds = ? WHERE {which}", (why, now)
        )

    def take_command(self, number: int) -> None:
        """Mark a command as taken, so that its sender cannot withdraw it any more."""
        self.begin()
        self._db.execute("UPDATE commands SET status = 'taken' WHERE id = ?", (number,))

    def hide_arguments(self, number: int, arguments: str) -> None:
        """Keep these arguments (JSON) in the place of those that hold a secret."""
        self.begin()
        self._db.execute("UPDATE commands SET arguments = ? WHERE id = ?", (arguments, number))

    def answer_command(self, number: int, ok: bool, message: str, now: float) -> None:
        """Write the answer to a command."""
        self.begin()
        self._db.execute(
            "UPDATE commands SET status = 'done', ok = ?, message = ?, finished_seconds = ? WHERE id = ?",
            (int(ok), bindable(message), now, number),
        )

    @property
    def connection(self) -> sqlite3.Connection:
        """What is written through, for the upkeep of the file."""
        return self._db

    def close(self) -> None:
        """Commit and close."""
        self.commit()
        self._db.close()
