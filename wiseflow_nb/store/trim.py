"""Retention inside a session's file: the oldest rows go, a few at a time, so that no writer has to wait."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable

#: After so long a step takes no further rows, or pages: whoever else writes waits for its end.
STEP_SECONDS = 0.005
#: Rows looked at between two looks at the clock, and rows of one table that a step looks at, at most.
CHUNK_ROWS, MOST_ROWS = 50, 500
#: Pages that a step gives back to the file system, at most. As many may stay free: they are used again.
VACUUM_PAGES = 32
#: Too large a file loses its oldest rows, but never what is as young as this.
YOUNG_SECONDS = 600.0
WATCH_SECONDS = 60.0
#: (table, the column that says when a row was finished with; NULL means not yet)
TABLES = (
    ("transitions", "time_seconds"),
    ("tasks", "finished_seconds"),
    ("events", "time_seconds"),
    ("alerts", "time_seconds"),
    ("cells", "finished_seconds"),
    ("commands", "finished_seconds"),
)


class Trimmer:
    """Delete what is over the age, or oldest first while the file is over its size.

    A step either deletes rows or gives free pages back, in a transaction of its own, so that each holds
    the lock for some milliseconds.

    Rows stand in the order in which they were made. One that is dated later than now was made before the
    clock was set back: its age is unknown, so it goes once a row that was made after it is over the age.

    Parameters
    ----------
    max_age
        Seconds.
    max_bytes
        Of the file, without the pages that are free already.
    timer
        Seconds of any beginning, by which a step ends when its time is up.
    """

    def __init__(self, max_age: float, max_bytes: int, timer: Callable[[], float] = time.perf_counter) -> None:
        self._max_age, self._max_bytes, self._timer = max_age, max_bytes, timer
        # Which table comes first, and how many in a row had nothing to do.
        self._first = self._idle = 0
        self._gave_back = False
        self._passed = dict.fromkeys((table for table, _ in TABLES), -1)
        # The newest row of each table that was over the age, and whether the round passed an undated one.
        self._over = dict.fromkeys((table for table, _ in TABLES), -1)
        self._undated = dict.fromkeys((table for table, _ in TABLES), False)

    def step(self, connection: sqlite3.Connection, now: float, steady: float | None = None) -> bool:
        """Take one small step in a transaction of its own; return whether there is more to do.

        Parameters
        ----------
        connection
            In autocommit mode with no transaction open.
        now
            Seconds since the epoch.
        steady
            The moment by which rows are over the age, where ``now`` may be one bad reading of the clock. The
            size does not go by it: no more is deleted than is over. Default: ``now``.
        """
        deadline = self._timer() + STEP_SECONDS
        free = _returnable(connection)
        self._gave_back = free > VACUUM_PAGES and not self._gave_back
        connection.execute("BEGIN IMMEDIATE")
        try:
            if self._gave_back:
                self._give_back(connection, min(VACUUM_PAGES, free - VACUUM_PAGES), deadline)
                more = True
            else:
                more = self._delete(connection, now, now if steady is None else steady, deadline)
                more = more or _returnable(connection) > VACUUM_PAGES
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        return more

    def _delete(self, connection: sqlite3.Connection, now: float, steady: float, deadline: float) -> bool:
        connection.execute(
            "DELETE FROM commands WHERE id IN (SELECT id FROM commands WHERE status = 'done' AND verb = 'watch' "
            "AND finished_seconds < ? ORDER BY id LIMIT ?)",
            (now - WATCH_SECONDS, CHUNK_ROWS),
        )
        for _ in TABLES:
            table, finished = TABLES[self._first]
            # The next one, here or in the next step, so that each has its turn.
            self._first = (self._first + 1) % len(TABLES)
            more = True
            for _ in range(MOST_ROWS // CHUNK_ROWS):
                more = self._trim(connection, table, finished, now, self._before(connection, now, steady))
                if not more or self._timer() >= deadline:
                    break
            self._idle = 0 if more else self._idle + 1
            if self._timer() >= deadline:
                break
        if self._idle < len(TABLES):
            return True
        self._idle = 0
        return False

    def _before(self, connection: sqlite3.Connection, now: float, steady: float) -> float:
        """Rows that are older than this moment may go."""
        pages = _number(connection, "page_count") - _number(connection, "freelist_count")
        before = steady - self._max_age
        if pages * _number(connection, "page_size") > self._max_bytes:
            before = max(before, now - min(YOUNG_SECONDS, self._max_age))
        return before

    def _give_back(self, connection: sqlite3.Connection, most: int, deadline: float) -> None:
        """Give free pages back to the file system, one at a time."""
        for _ in range(most):
            # One a call: of several, Python's sqlite3 gives back the first alone.
            connection.execute("PRAGMA incremental_vacuum(1)").close()
            if self._timer() >= deadline:
                return

    def _trim(self, connection: sqlite3.Connection, table: str, finished: str, now: float, before: float) -> bool:
        """Look at the next rows in the order in which they were made; return whether to go on soon."""
        rows = connection.execute(
            f"SELECT rowid, {finished} FROM {table} WHERE rowid > ? ORDER BY rowid LIMIT ?",
            (self._passed[table], CHUNK_ROWS),
        ).fetchall()
        dated = [(row, moment) for row, moment in rows if isinstance(moment, float) and moment <= now]
        over = self._over[table] = max([self._over[table], *(row for row, moment in dated if moment < before)])
        undated = [row for row, moment in rows if isinstance(moment, float) and moment > now]
        doomed = sorted([*(row for row, moment in dated if moment < before), *(row for row in undated if row < over)])
        self._undated[table] |= any(row >= over for row in undated)
        if len(doomed) == len(rows) and rows:
            # One range instead of many searches.
            connection.execute(f"DELETE FROM {table} WHERE rowid BETWEEN ? AND ?", (rows[0][0], rows[-1][0]))
        else:
            for row in doomed:
                connection.execute(f"DELETE FROM {table} WHERE rowid = ?", (row,))
        # What never ended is passed over; where the young begin, the next round starts at the oldest again.
        more = len(rows) == CHUNK_ROWS and not any(moment >= before for _, moment in dated)
        self._passed[table] = rows[-1][0] if more else -1
        if not more:
            if not self._undated[table]:
                self._over[table] = -1  # numbers are given again where no row is left
            self._undated[table] = False
        return more


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])


def _returnable(connection: sqlite3.Connection) -> int:
    """The free pages, in a file that can give them back."""
    return _number(connection, "freelist_count") if _number(connection, "auto_vacuum") else 0
