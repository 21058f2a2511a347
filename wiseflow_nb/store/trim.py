"""Retention inside a session's file: the oldest rows go, a few at a time, so that no writer has to wait."""

from __future__ import annotations

import sqlite3
import time

#: A step that took longer than this takes fewer rows the next time, one much shorter takes more.
STEP_SECONDS = 0.010
LEAST_ROWS, MOST_ROWS = 16, 500
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

    Parameters
    ----------
    max_age
        Seconds.
    max_bytes
        Of the file, without the pages that are free already.
    """

    def __init__(self, max_age: float, max_bytes: int) -> None:
        self._max_age, self._max_bytes = max_age, max_bytes
        self._rows = LEAST_ROWS * 4
        self._passed = dict.fromkeys((table for table, _ in TABLES), -1)

    def step(self, connection: sqlite3.Connection, now: float) -> bool:
        """Take one small step in a transaction of its own; return whether there is more to do.

        ``connection`` is in autocommit mode with no transaction open. ``now`` is seconds since the epoch.
        """
        began = time.perf_counter()
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (free,) = connection.execute("PRAGMA freelist_count").fetchone()
        (page_size,) = connection.execute("PRAGMA page_size").fetchone()
        large = (pages - free) * page_size > self._max_bytes
        before = now - (min(YOUNG_SECONDS, self._max_age) if large else self._max_age)
        more = False
        connection.execute("BEGIN IMMEDIATE")
        try:
            for table, finished in TABLES:
                more = self._trim(connection, table, finished, before) or more
            connection.execute(
                "DELETE FROM commands WHERE id IN (SELECT id FROM commands WHERE status = 'done' AND verb = 'watch' "
                "AND finished_seconds < ? ORDER BY id LIMIT ?)",
                (now - WATCH_SECONDS, self._rows),
            )
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        self._adapt(time.perf_counter() - began)
        (free,) = connection.execute("PRAGMA freelist_count").fetchone()
        if free:
            # Executed as often as it gives rows, one page each.
            connection.execute(f"PRAGMA incremental_vacuum({VACUUM_PAGES})").fetchall()
        return more or free > VACUUM_PAGES

    def _trim(self, connection: sqlite3.Connection, table: str, finished: str, before: float) -> bool:
        """Look at the next rows in the order in which they were made; return whether to go on soon."""
        rows = connection.execute(
            f"SELECT rowid, {finished} FROM {table} WHERE rowid > ? ORDER BY rowid LIMIT ?",
            (self._passed[table], self._rows),
        ).fetchall()
        doomed = [number for number, moment in rows if isinstance(moment, float) and moment < before]
        if len(doomed) == len(rows) and rows:
            # One range instead of many searches.
            connection.execute(f"DELETE FROM {table} WHERE rowid BETWEEN ? AND ?", (rows[0][0], rows[-1][0]))
        else:
            for number in doomed:
                connection.execute(f"DELETE FROM {table} WHERE rowid = ?", (number,))
        # What never ended is passed over; where the young begin, the next round starts at the oldest again.
        more = len(rows) == self._rows and not any(isinstance(moment, float) and moment >= before for _, moment in rows)
        self._passed[table] = rows[-1][0] if more else -1
        return more

    def _adapt(self, took: float) -> None:
        if took > STEP_SECONDS:
            self._rows = max(self._rows // 2, LEAST_ROWS)
        elif took < STEP_SECONDS / 4:
            self._rows = min(self._rows * 2, MOST_ROWS)
