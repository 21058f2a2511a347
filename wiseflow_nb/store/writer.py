"""The one writer of a session's file. It lives in the recorder and loads neither numpy nor pandas."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wiseflow_nb.errors import StoreError
from wiseflow_nb.records import TIER_RETENTION_SECONDS, AlertTransition, Sample, to_json_dict
from wiseflow_nb.store._samples import SampleWriter
from wiseflow_nb.store.schema import (
    ALERT_COLUMNS,
    CELL_COLUMNS,
    TASK_COLUMNS,
    TRANSITION_COLUMNS,
    check_version,
    migrate,
)

MAX_TEXT = 100_000


def _upsert(table: str, columns: Sequence[str]) -> str:
    return f"INSERT OR REPLACE INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


_STATEMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "task": (_upsert("tasks", TASK_COLUMNS), TASK_COLUMNS),
    "transition": (_upsert("transitions", TRANSITION_COLUMNS), TRANSITION_COLUMNS),
    "cell": (_upsert("cells", CELL_COLUMNS), CELL_COLUMNS),
    "alert": (_upsert("alerts", ALERT_COLUMNS), ALERT_COLUMNS),
    "event": (
        _upsert("events", ("time_seconds", "kind", "message", "data")),
        ("time_seconds", "kind", "message", "data"),
    ),
    "meta": (_upsert("meta", ("key", "value")), ("key", "value")),
}


def bindable(value: Any) -> Any:
    """Return a value that SQLite stores as what it means: bounded valid text, JSON for the rest."""
    if value is None or isinstance(value, (int, float)):
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > MAX_TEXT:
        text = text[: MAX_TEXT - 1] + "…"
    # A lone surrogate is legal in a str and not in UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


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
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600))
            os.chmod(path, 0o600)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
            check_version(self._db, str(path))
            # Blocks of 20 to 79 kB: half the reads of the default; a commit of one row stays small. Both this
            # and the vacuum before the journal mode, or they are silently off.
            self._db.execute("PRAGMA page_size = 8192")
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            migrate(self._db, str(path))
            self._samples = SampleWriter(self._db)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{path} cannot be opened for recording: {error}") from error
        self._in_transaction = False

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
        """Write rows ``(table, values by column)``; return how many were of an unknown table."""
        unknown = 0
        self.begin()
        for table, values in rows:
            known = _STATEMENTS.get(table)
            if known is None or not isinstance(values, Mapping):
                unknown += 1
                continue
            statement, columns = known
            self._db.execute(statement, [bindable(values.get(name)) for name in columns])
        return unknown

    def meta(self, key: str, value: Any) -> None:
        """Set one value of the meta table, as JSON."""
        self.begin()
        self._db.execute(_STATEMENTS["meta"][0], (key, json.dumps(value)))

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

    def sample(self, sample: Sample) -> None:
        """Take one sample into the open block and the open buckets; in memory only until ``write_blocks``."""
        self._samples.add(sample)

    @property
    def full_blocks(self) -> int:
        """How many full blocks wait to be written."""
        return self._samples.full_blocks

    def write_blocks(self, *, partial: bool) -> None:
        """Write the full blocks and, on demand, the open one, which is written over when it has grown."""
        if self._samples.has_blocks(partial):
            self.begin()
            self._samples.write(partial)

    def close_tiers(self) -> None:
        """Write the open buckets of the upper tiers too, as far as they go: the end of a recording."""
        self._samples.close_buckets()
        self.write_blocks(partial=True)

    def forget_samples(self, now: float, retention: Sequence[float] = TIER_RETENTION_SECONDS) -> bool:
        """Delete a few blocks of samples older than their tier keeps, and give pages back; return whether more wait.

        Parameters
        ----------
        now
            Seconds since the epoch.
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
        """Return (id, created, who, verb, arguments) of the commands nobody took yet."""
        # As bytes: whoever can write the table can also write text that is none.
        rows = self._db.execute(
            "SELECT id, created_seconds, CAST(who AS BLOB), CAST(verb AS BLOB), "
            "CAST(substr(arguments, 1, 70000) AS BLOB) FROM commands WHERE status = 'new' ORDER BY id LIMIT 100"
        ).fetchall()
        return [(row[0], row[1], *(bytes(item or b"").decode("utf-8", "replace") for item in row[2:])) for row in rows]

    def take_command(self, number: int) -> None:
        """Mark a command as taken, so that its sender cannot withdraw it any more."""
        self.begin()
        self._db.execute("UPDATE commands SET status = 'taken' WHERE id = ?", (number,))

    def answer_command(self, number: int, ok: bool, message: str, now: float) -> None:
        """Write the answer to a command."""
        self.begin()
        self._db.execute(
            "UPDATE commands SET status = 'done', ok = ?, message = ?, finished_seconds = ? WHERE id = ?",
            (int(ok), bindable(message), now, number),
        )

    def close(self) -> None:
        """Commit and close."""
        self.commit()
        self._db.close()
