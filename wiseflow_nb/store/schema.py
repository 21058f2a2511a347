"""The tables, as numbered migrations; each is committed together with its number."""

from __future__ import annotations

import sqlite3
import struct
from dataclasses import fields

from wiseflow_nb.errors import StoreVersionError
from wiseflow_nb.records import AlertTransition, CellRecord, EventRecord, TaskRecord, TaskState, TaskTransition

TASK_COLUMNS = tuple(item.name for item in fields(TaskRecord))
TRANSITION_COLUMNS = tuple(item.name for item in fields(TaskTransition))
CELL_COLUMNS = tuple(item.name for item in fields(CellRecord))
ALERT_COLUMNS = tuple(item.name for item in fields(AlertTransition))
EVENT_COLUMNS = tuple(item.name for item in fields(EventRecord))
COMMAND_COLUMNS = ("created_seconds", "who", "verb", "arguments", "status", "ok", "message", "finished_seconds")

#: The id of the next command, not left to SQLite: a row with the greatest id there is would be the last one.
_MOST_COMMANDS = 2**53
NEXT_COMMAND = (
    f"(SELECT 1 + max(coalesce((SELECT max(id) FROM commands WHERE id < {_MOST_COMMANDS}), 0), "
    f"coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'commands' AND seq < {_MOST_COMMANDS}), 0)))"
)

#: To be written into a question word for word: by it SQLite knows that the index has all that is asked for.
UNFINISHED = f"state IN ({', '.join(repr(state.value) for state in TaskState if not state.terminal)})"

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        """CREATE TABLE samples (
            tier INTEGER NOT NULL, start_seconds REAL NOT NULL, end_seconds REAL NOT NULL,
            count INTEGER NOT NULL, data BLOB NOT NULL, PRIMARY KEY (tier, start_seconds))""",
        """CREATE TABLE tasks (
            task_id TEXT PRIMARY KEY, name TEXT, state TEXT, priority INTEGER, kind TEXT,
            attempt INTEGER, max_attempts INTEGER, created_seconds REAL, ready_seconds REAL,
            started_seconds REAL, finished_seconds REAL, queue_seconds REAL, wall_seconds REAL,
            cpu_seconds REAL, cpu_source TEXT, memory_peak_bytes REAL, memory_source TEXT,
            progress REAL, progress_text TEXT, reason TEXT, error TEXT, traceback TEXT,
            output_tail TEXT, dependencies TEXT, tags TEXT, retry_of TEXT, rev INTEGER)""",
        "CREATE INDEX tasks_by_rev ON tasks (rev)",
        """CREATE TABLE transitions (
            seq INTEGER PRIMARY KEY, task_id TEXT, attempt INTEGER, from_state TEXT, to_state TEXT,
            time_seconds REAL, reason TEXT)""",
        """CREATE TABLE alerts (
            alert_id TEXT, rule TEXT, resource TEXT, kind TEXT, from_state TEXT, to_state TEXT,
            severity TEXT, value REAL, threshold REAL, peak REAL, started_seconds REAL,
            time_seconds REAL, message TEXT, top_processes TEXT)""",
        "CREATE INDEX alerts_by_time ON alerts (time_seconds)",
        "CREATE TABLE alert_marks (alert_id TEXT PRIMARY KEY, acknowledged INTEGER, silenced_until REAL) WITHOUT ROWID",
        """CREATE TABLE cells (
            cell_id TEXT PRIMARY KEY, number INTEGER, first_line TEXT, started_seconds REAL,
            finished_seconds REAL, wall_seconds REAL, cpu_seconds REAL, rss_before_bytes REAL,
            rss_after_bytes REAL, rss_peak_bytes REAL, largest_gap_seconds REAL, status TEXT)""",
        """CREATE TABLE events (
            id INTEGER PRIMARY KEY, time_seconds REAL, kind TEXT, message TEXT, data TEXT)""",
        """CREATE TABLE commands (
            id INTEGER PRIMARY KEY AUTOINCREMENT, created_seconds REAL NOT NULL, who TEXT NOT NULL,
            verb TEXT NOT NULL, arguments TEXT NOT NULL, status TEXT NOT NULL DEFAULT 'new',
            ok INTEGER, message TEXT, finished_seconds REAL)""",
        "CREATE INDEX commands_by_status ON commands (status)",
    ),
    (
        "ALTER TABLE alerts ADD COLUMN silenced INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE alerts ADD COLUMN unit TEXT NOT NULL DEFAULT 'ratio'",
        # The kernel hands in again what a killed recorder may not have committed.
        "CREATE UNIQUE INDEX alerts_once ON alerts (alert_id, kind, time_seconds)",
    ),
    (
        # Kept, since counting a million rows takes a third of a second, at every look of a dashboard.
        "CREATE TABLE task_counts (state TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID",
        "INSERT INTO task_counts SELECT state, count(*) FROM tasks GROUP BY state",
        """CREATE TRIGGER task_added AFTER INSERT ON tasks BEGIN
            INSERT INTO task_counts VALUES (new.state, 1) ON CONFLICT (state) DO UPDATE SET count = count + 1;
        END""",
        """CREATE TRIGGER task_removed AFTER DELETE ON tasks BEGIN
            UPDATE task_counts SET count = count - 1 WHERE state = old.state;
        END""",
        """CREATE TRIGGER task_moved AFTER UPDATE OF state ON tasks WHEN old.state IS NOT new.state BEGIN
            UPDATE task_counts SET count = count - 1 WHERE state = old.state;
            INSERT INTO task_counts VALUES (new.state, 1) ON CONFLICT (state) DO UPDATE SET count = count + 1;
        END""",
        "CREATE INDEX cells_by_start ON cells (started_seconds)",
        "CREATE INDEX samples_by_end ON samples (tier, end_seconds)",
    ),
    # What still runs or waits, among a million rows that have ended.
    (f"CREATE INDEX tasks_unfinished ON tasks (state, rev) WHERE {UNFINISHED}",),
    (
        # By the wall clock nobody can tell what a tier has already, nor which block is which: it is set
        # back, and then the same times come again.
        """CREATE TABLE blocks (
            id INTEGER PRIMARY KEY AUTOINCREMENT, tier INTEGER NOT NULL,
            start_seconds REAL NOT NULL, end_seconds REAL NOT NULL,
            start_monotonic REAL, end_monotonic REAL, count INTEGER NOT NULL, data BLOB NOT NULL)""",
        """INSERT INTO blocks (tier, start_seconds, end_seconds, start_monotonic, end_monotonic, count, data)
            SELECT tier, start_seconds, end_seconds, first_monotonic(tier, count, data),
            last_monotonic(tier, count, data), count, data FROM samples ORDER BY rowid""",
        "DROP TABLE samples",
        "ALTER TABLE blocks RENAME TO samples",
        "CREATE INDEX samples_by_start ON samples (tier, start_seconds)",
        # With all that a question asks: no block is looked at that is not read.
        "CREATE INDEX samples_by_end ON samples (tier, end_seconds, start_seconds, start_monotonic, end_monotonic)",
        "CREATE INDEX samples_by_monotonic ON samples (tier, end_monotonic, start_monotonic, end_seconds)",
    ),
)
VERSION = len(MIGRATIONS)
#: From this version on a block has the monotonic times of its first and its last sample beside it.
MONOTONIC_VERSION = 5


def first_monotonic(tier: int, count: int, data: bytes) -> float | None:
    """Return the monotonic time of a block's first sample, or None if it has none."""
    width = len(data) // (8 * max(count, 1) * (4 if tier else 1))
    # Of a bucket it is the low one of that column.
    return _double(data, 8 * (width + 1 if tier else 1))


def last_monotonic(tier: int, count: int, data: bytes) -> float | None:
    """Return the monotonic time of a block's last sample, or None if it has none."""
    return _double(data, len(data) - len(data) // max(count, 1) + 8)


def _double(data: bytes, at: int) -> float | None:
    if not 0 <= at <= len(data) - 8:
        return None
    (value,) = struct.unpack_from("<d", data, at)
    return float(value) if value == value else None


def migrate(connection: sqlite3.Connection, path: str) -> None:
    """Bring the file to this version, one committed step at a time.

    ``connection`` must be in autocommit mode (``isolation_level=None``).

    Raises
    ------
    StoreVersionError
        If the file was written by a newer version; it is not touched.
    """
    version = check_version(connection, path)
    for function in (first_monotonic, last_monotonic):
        connection.create_function(function.__name__, 3, function, deterministic=True)
    for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")


def check_version(connection: sqlite3.Connection, path: str) -> int:
    """Return the file's version, or raise ``StoreVersionError`` if it is newer than this code."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > VERSION:
        raise StoreVersionError(
            f"{path} has schema version {version}, this wiseflow_nb knows {VERSION}: "
            "upgrade wiseflow_nb to read it (the file was not touched)"
        )
    return int(version)
