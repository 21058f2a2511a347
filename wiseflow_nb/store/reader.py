"""Read a session's file and ring from any process, while it is written or long after."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wiseflow_nb.errors import SessionNotFoundError, StoreError
from wiseflow_nb.records import (
    NAN,
    SAMPLE_COLUMNS,
    TIER_SECONDS,
    AlertTransition,
    CellRecord,
    Priority,
    SessionInfo,
    SessionState,
    TaskRecord,
    TaskState,
    from_json_dict,
    valid_text,
)
from wiseflow_nb.store.identity import Identity, is_alive
from wiseflow_nb.store.paths import DATABASE_NAME, check_owned, check_regular, database_uri, in_memory
from wiseflow_nb.store.schema import (
    ALERT_COLUMNS,
    CELL_COLUMNS,
    COMMAND_COLUMNS,
    MONOTONIC_VERSION,
    TASK_COLUMNS,
    UNFINISHED,
    check_version,
    last_monotonic,
)

if TYPE_CHECKING:
    import numpy as np

#: Where the process cannot be seen (another host or namespace), this long without a heartbeat means crashed.
HEARTBEAT_LOST_SECONDS = 15.0
#: A live session whose heartbeat (each 2 s) is older says so: its recorder has ended, or cannot write.
HEARTBEAT_LATE_SECONDS = 10.0
KEPT_ALERTS = 1000
MOST_REV = 2**63 - 1
_SELECT_TASKS = f"SELECT {', '.join(TASK_COLUMNS)} FROM tasks"
_TASK_NUMBERS = tuple(at for at, item in enumerate(fields(TaskRecord)) if item.type == "float")
_TASK_LISTS = (TASK_COLUMNS.index("dependencies"), TASK_COLUMNS.index("tags"))
_STATE, _PRIORITY = TASK_COLUMNS.index("state"), TASK_COLUMNS.index("priority")
#: Looked up, where there are thousands: a third of the time of a call of the class.
_STATES = {state.value: state for state in TaskState}
_PRIORITIES = {priority.value: priority for priority in Priority}
_JSON_COLUMNS = frozenset({"dependencies", "tags", "top_processes"})


class StoreReader:
    """Read-only access to one session's directory; any thread may call.

    Raises
    ------
    SessionNotFoundError
        If there is no such session.
    StoreError
        If its file belongs to somebody else, or cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / DATABASE_NAME
        self._lock = threading.Lock()
        self._inode: tuple[int, int] | None = None
        self._alerts: list[tuple[int, AlertTransition]] = []
        self._alerts_lock = threading.Lock()
        try:
            if not in_memory(directory):
                check_owned(directory)
                check_regular(self.path)
                for end in ("-wal", "-shm", "-journal"):
                    with contextlib.suppress(FileNotFoundError):
                        check_regular(Path(f"{self.path}{end}"))
                self._inode = self.inode()
            self._db = sqlite3.connect(
                database_uri(self.path, "ro"),
                uri=True,
                isolation_level=None,
                check_same_thread=False,
                timeout=2.0,
            )
            try:
                #: An ended session's file stays as the version that wrote it left it.
                self._version = check_version(self._db, str(self.path))
            except BaseException:
                self._db.close()
                raise
        except FileNotFoundError:
            raise SessionNotFoundError(
                f"there is no session {directory.name!r}; `wiseflow sessions` lists those there are"
            ) from None
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.path} cannot be read: {error}") from error

    def inode(self) -> tuple[int, int] | None:
        """Which file is at the path now."""
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def was_replaced(self) -> bool:
        """Whether another file is at the path than the one that was opened: this one is not written any more."""
        return self._inode is not None and self.inode() not in (None, self._inode)

    def query(self, statement: str, arguments: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one SELECT and return all rows."""
        with self._lock:
            return self._db.execute(statement, arguments).fetchall()

    def meta(self) -> dict[str, Any]:
        """Everything in the meta table that can be read."""
        # As bytes: whoever can write the table can also write text that is none.
        rows = self.query("SELECT CAST(key AS BLOB), CAST(value AS BLOB) FROM meta")
        return meta_from(rows)

    def info(self, now: float) -> SessionInfo:
        """Who the session is and whether it is live, ended or crashed at ``now`` (epoch seconds)."""
        return info_from_meta(self.meta(), self.directory, now)

    def count_changed(self, since_rev: int, most: int) -> int:
        """How many task rows have a ``rev`` above the given one; ``most + 1`` where there are more than ``most``."""
        # By the index alone: no row is looked at.
        return len(self.query("SELECT 1 FROM tasks WHERE rev > ? LIMIT ?", (since_rev, most + 1)))

    def changed_tasks(self, since_rev: int = 0, limit: int = 100_000) -> list[TaskRecord]:
        """The task rows with a ``rev`` above the given one, oldest change first."""
        rows = self.query(f"{_SELECT_TASKS} WHERE rev > ? ORDER BY rev LIMIT ?", (since_rev, limit))
        return [_task(row) for row in rows]

    def newest_tasks(self, limit: int, until_rev: int = MOST_REV) -> list[TaskRecord]:
        """The task rows with a ``rev`` up to the given one, newest change first."""
        rows = self.query(f"{_SELECT_TASKS} WHERE rev <= ? ORDER BY rev DESC LIMIT ?", (until_rev, limit))
        return [_task(row) for row in rows]

    def unfinished_tasks(self, state: TaskState, limit: int, until_rev: int = MOST_REV) -> list[TaskRecord]:
        """The task rows in a state that is not terminal, with a ``rev`` up to the given one, newest change first."""
        rows = self.query(
            f"{_SELECT_TASKS} WHERE {UNFINISHED} AND state = ? AND rev <= ? ORDER BY rev DESC LIMIT ?",
            (state.value, until_rev, limit),
        )
        return [_task(row) for row in rows]

    def unfinished_named(self, name: str) -> list[str]:
        """The ids of the tasks of a name in a state that is not terminal, oldest change first."""
        # The plus keeps SQLite from a walk over all in the order of their change.
        rows = self.query(f"SELECT task_id FROM tasks WHERE {UNFINISHED} AND name = ? ORDER BY +rev", (name,))
        return [str(task_id) for (task_id,) in rows]

    def task(self, task_id: str) -> TaskRecord | None:
        """One task row."""
        rows = self.query(f"{_SELECT_TASKS} WHERE task_id = ?", (task_id,))
        return _task(rows[0]) if rows else None

    def task_rev(self) -> int:
        """The highest ``rev`` of any task row."""
        return int(self.query("SELECT coalesce(max(rev), 0) FROM tasks")[0][0])

    def task_counts(self) -> dict[str, int]:
        """How many tasks are in each state."""
        if self._version < 3:
            return {
                str(state): count for state, count in self.query("SELECT state, count(*) FROM tasks GROUP BY state")
            }
        return {
            str(state): count for state, count in self.query("SELECT state, count FROM task_counts WHERE count > 0")
        }

    def alerts(self, limit: int = 1000) -> list[AlertTransition]:
        """The newest alert transitions, oldest first."""
        if limit > KEPT_ALERTS:
            return [alert for _, alert in self._read_alerts(-1, limit)]
        with self._alerts_lock:
            # They are only ever added, at the end: what was read once is not read again.
            newest = self._alerts[-1][0] if self._alerts else -1
            if self.query("SELECT coalesce(max(rowid), -1) FROM alerts")[0][0] < newest:
                self._alerts, newest = [], -1  # all were old, and removed
            self._alerts = [*self._alerts, *self._read_alerts(newest, KEPT_ALERTS)][-KEPT_ALERTS:]
            return [alert for _, alert in self._alerts[-limit:]]

    def _read_alerts(self, after: int, limit: int) -> list[tuple[int, AlertTransition]]:
        columns = self._present("alerts", ALERT_COLUMNS)
        rows = self.query(
            f"SELECT rowid, {', '.join(columns)} FROM alerts WHERE rowid > ? ORDER BY rowid DESC LIMIT ?",
            (after, limit),
        )
        return [(row[0], _record(AlertTransition, columns, row[1:])) for row in reversed(rows)]

    def _present(self, table: str, columns: Sequence[str]) -> tuple[str, ...]:
        """Those of the columns that the file has: one of an earlier version, read only, is not migrated."""
        there = {row[1] for row in self.query(f"PRAGMA table_info({table})")}
        return tuple(name for name in columns if name in there)

    def acknowledged(self) -> frozenset[str]:
        """The ids of the alerts that somebody acknowledged."""
        return frozenset(row[0] for row in self.query("SELECT alert_id FROM alert_marks WHERE acknowledged = 1"))

    def cells(self, limit: int = 100_000) -> list[CellRecord]:
        """The newest cells, oldest first."""
        rows = self.query(
            f"SELECT {', '.join(CELL_COLUMNS)} FROM cells ORDER BY started_seconds DESC LIMIT ?", (limit,)
        )
        return [_record(CellRecord, CELL_COLUMNS, row) for row in reversed(rows)]

    def sample_blocks(
        self, since: float = -1e18, until: float = 1e18, *, after: float = -math.inf, before: float = math.inf
    ) -> np.ndarray:
        """The stored raw samples that may lie within [since, until], epoch seconds, and in (after, before), monotonic.

        An array (n, columns) of float64, in whole blocks: some of its rows may lie outside.
        """
        return self._blocks(0, since, until, after, before)[0][:, 0]

    def tier_blocks(
        self, tier: int, since: float = -1e18, until: float = 1e18, columns: Sequence[str] = SAMPLE_COLUMNS
    ) -> tuple[np.ndarray, float]:
        """The stored buckets of an upper tier that may lie within [since, until].

        Returns
        -------
        buckets : ndarray of float64, shape (n, 4, len(columns))
            Value, low, high and count; see ``store.tiers``. The parts of a bucket that was written in
            parts follow one another.
        covered : float
            The monotonic time of the last sample that the tier has, within the range or not; or -inf.
        """
        return self._blocks(tier, since, until, columns=columns)

    def tier_starts(self) -> tuple[float, ...]:
        """The time of the first sample of each tier; infinity where it has no block."""
        # One look at the index each; grouped, it would be a walk over all blocks.
        found = [
            self.query("SELECT min(start_seconds) FROM samples WHERE tier = ?", (tier,))[0][0]
            for tier in range(len(TIER_SECONDS))
        ]
        return tuple(math.inf if start is None else float(start) for start in found)

    def last_sample_seconds(self) -> float:
        """The time of the sample that was taken last, in any tier; NaN if there is none."""
        newest = "end_monotonic" if self._version >= MONOTONIC_VERSION else "start_seconds"
        ends = [
            row
            for tier in range(len(TIER_SECONDS))
            for row in self.query(
                f"SELECT coalesce({newest}, -1e999), end_seconds FROM samples WHERE tier = ? "
                f"ORDER BY {newest} DESC LIMIT 1",
                (tier,),
            )
        ]
        return float(max(ends, default=(NAN, NAN))[1])

    def _covered(self, tier: int) -> float:
        if self._version >= MONOTONIC_VERSION:
            (end,) = self._db.execute("SELECT max(end_monotonic) FROM samples WHERE tier = ?", (tier,)).fetchone()
        else:
            # The blocks of an upper tier were written once, in their order.
            row = self._db.execute(
                "SELECT count, data FROM samples WHERE tier = ? ORDER BY rowid DESC LIMIT 1", (tier,)
            ).fetchone()
            end = None if row is None else last_monotonic(tier, *row)
        return -math.inf if end is None else float(end)

    def _blocks(
        self,
        tier: int,
        since: float,
        until: float,
        after: float = -math.inf,
        before: float = math.inf,
        columns: Sequence[str] = SAMPLE_COLUMNS,
    ) -> tuple[np.ndarray, float]:
        """The rows of a tier, shape (n, planes, columns), and the monotonic time up to which it has them."""
        import numpy as np

        planes, wanted = (1 if tier == 0 else 4), len(SAMPLE_COLUMNS)
        # The plus keeps SQLite from walking all that began before ``until``: most looks are at the newest.
        # In the order of their ends, which the index has: to sort them would be to copy every block.
        chosen = "FROM samples WHERE tier = ? AND end_seconds >= ? AND +start_seconds <= ?"
        asked: tuple[float, ...] = (tier, since, until)
        if self._version >= MONOTONIC_VERSION and (after, before) != (-math.inf, math.inf):
            chosen += " AND coalesce(end_monotonic > ?, 1) AND coalesce(start_monotonic < ?, 1)"
            asked = (*asked, after, before)
        runs: list[list[int]] = []
        # One array of the right size, filled block by block: a list of the blocks and a second copy to
        # join them are fresh memory, which for a day costs more than the reading.
        with self._lock:
            # Both questions see the same state of a file that is being written.
            self._db.execute("BEGIN")
            try:
                blocks = self._db.execute(f"SELECT data, count {chosen} ORDER BY end_seconds", asked)
                if columns is not SAMPLE_COLUMNS:
                    # Of a few columns no whole block is copied.
                    return _picked(blocks, planes, [SAMPLE_COLUMNS.index(name) for name in columns]), self._covered(
                        tier
                    )
                ((size,),) = self._db.execute(f"SELECT total(length(data)) {chosen}", asked)
                raw, end = np.empty(int(size), dtype="u1"), 0
                room = raw.data
                for data, count in blocks:
                    begin, end = end, end + len(data)
                    room[begin:end] = data
                    width = len(data) // (8 * planes * count)
                    if not runs or runs[-1][0] != width:
                        runs.append([width, begin // 8, 0])
                    runs[-1][2] = end // 8
                covered = self._covered(tier)
            finally:
                self._db.execute("COMMIT")
        values = raw.view("<f8")
        pieces = [fit_columns(values[begin:end].reshape(-1, planes, width), wanted) for width, begin, end in runs]
        if not pieces:
            return np.empty((0, planes, wanted)), covered
        return (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)), covered

    def commands(self, limit: int = 10_000) -> list[tuple[Any, ...]]:
        """The newest commands, oldest first: who asked what and when, and what came of it (``COMMAND_COLUMNS``).

        The leases of those who watch are left out: there is one every few seconds.
        """
        # As bytes: whoever can write the table can also write text that is none.
        texts = {"who", "verb", "arguments", "status", "message"}
        columns = ", ".join(f"CAST({name} AS BLOB)" if name in texts else name for name in COMMAND_COLUMNS)
        rows = self.query(f"SELECT {columns} FROM commands WHERE verb != 'watch' ORDER BY id DESC LIMIT ?", (limit,))
        return [
            tuple(item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in row)
            for row in reversed(rows)
        ]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()


def _picked(blocks: Iterable[tuple[bytes, int]], planes: int, columns: list[int]) -> np.ndarray:
    """Return some columns of blocks, shape (n, planes, len(columns))."""
    import numpy as np

    parts = [np.empty((0, planes, len(columns)))]
    for data, count in blocks:
        rows = np.frombuffer(data, "<f8").reshape(-1, planes, len(data) // (8 * planes * count))
        parts.append(fit_columns(rows, len(SAMPLE_COLUMNS))[..., columns])
    return np.concatenate(parts)


def fit_columns(rows: np.ndarray, wanted: int) -> np.ndarray:
    """Return rows of an older version, which knew fewer columns, with NaN in those that it did not know."""
    import numpy as np

    missing = wanted - rows.shape[-1]
    if missing <= 0:
        return rows[..., :wanted]
    return np.concatenate((rows, np.full((*rows.shape[:-1], missing), np.nan)), axis=-1)


def _task(row: Sequence[Any]) -> TaskRecord:
    """As ``_record`` does, in a third of the time: there are thousands of them."""
    values = list(row)
    for at in _TASK_NUMBERS:
        value = values[at]
        if type(value) is not float:
            values[at] = NAN if value is None else float(value)
    state, priority = values[_STATE], values[_PRIORITY]
    values[_STATE] = _STATES.get(state) or TaskState(state)
    values[_PRIORITY] = _PRIORITIES[priority] if priority in _PRIORITIES else Priority(priority)
    for at in _TASK_LISTS:
        values[at] = () if values[at] == "[]" else tuple(json.loads(values[at] or "[]"))
    return TaskRecord(*values)


def _record(cls: type[Any], columns: Sequence[str], row: Sequence[Any]) -> Any:
    values = {
        name: json.loads(value) if name in _JSON_COLUMNS and value is not None else value
        for name, value in zip(columns, row, strict=True)
    }
    return from_json_dict(cls, values)


#: The keys of the meta table whose values are objects.
_OBJECTS = frozenset({"identity", "settings", "thresholds", "pool"})
#: Moments outside of these years are damage, and no calendar has them.
_LAST_MOMENT = 9.2e9


def meta_from(rows: Iterable[tuple[bytes, bytes]]) -> dict[str, Any]:
    """The meta table as values by key; what is damaged is left out, its keys under ``damaged``."""
    found: dict[str, Any] = {}
    damaged: list[str] = []
    for key_bytes, text in rows:
        key = bytes(key_bytes or b"").decode("utf-8", "replace")
        try:
            value = json.loads(text)
        except (ValueError, TypeError, RecursionError):
            damaged.append(key)
            continue
        if (key in _OBJECTS and not isinstance(value, dict)) or (key == "identity" and Identity.read(value) is None):
            damaged.append(key)
        elif key == "thresholds":
            found[key] = {name: pair for name, pair in value.items() if _is_pair(pair)}
        else:
            found[key] = value
    return found | {"damaged": damaged} if damaged else found


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(item) in (int, float) for item in value)


def moment_from(value: Any) -> float:
    """A number of seconds since the epoch as a float; NaN where it is no moment of a calendar."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _LAST_MOMENT:
        return NAN
    return float(value)


def info_from_meta(meta: dict[str, Any], directory: Path, now: float) -> SessionInfo:
    """Return the session's info: its end mark first, then its process, then its heartbeat.

    What is no text, number or identity where one is meant reads as not there, and ``notice`` says so.
    """
    last_seen, ended = moment_from(meta.get("heartbeat")), moment_from(meta.get("ended_seconds"))
    identity = Identity.read(meta.get("identity"))
    state = SessionState.LIVE
    if ended == ended:
        state = SessionState.CRASHED if meta.get("crashed") else SessionState.ENDED
    else:
        alive = None if identity is None else is_alive(identity)
        if alive is None:
            alive = now - last_seen < HEARTBEAT_LOST_SECONDS
        if not alive:
            state, ended = SessionState.CRASHED, last_seen
    notices = [str(meta.get("notice") or ""), str(meta.get("trouble") or ""), missing_text(meta)]
    if state is SessionState.LIVE and now - last_seen > HEARTBEAT_LATE_SECONDS:
        notices.append(
            f"nothing has been recorded for {now - last_seen:.0f} s: the recorder hangs, ended, or cannot write its file"
        )
    if "damaged" in meta:
        notices.append(f"its record is damaged and read without: {', '.join(map(str, meta['damaged'][:5]))}")
    return SessionInfo(
        session_id=directory.name,
        state=state,
        title=valid_text(str(meta.get("title", ""))),
        host=identity.host if identity is not None else "",
        pid=identity.pid if identity is not None else 0,
        started_seconds=moment_from(meta.get("started_seconds")),
        ended_seconds=ended,
        last_seen_seconds=last_seen,
        limit_source=str(meta.get("limit_source", "")),
        path=str(directory),
        notice="; ".join(filter(None, notices)),
    )


def missing_text(meta: Mapping[str, Any]) -> str:
    """Of how many tasks the record lacks the last state for good, and what that means; empty for none.

    Examples
    --------
    >>> missing_text({"dropped_tasks": 0}), missing_text({"dropped_tasks": 2, "lost_tasks": 1000})[:48]
    ('', 'of 1,002 tasks the last state is not on record, ')
    """
    count = missing_tasks(meta)
    if not count:
        return ""
    return (
        f"of {count:,} {'task' if count == 1 else 'tasks'} the last state is not on record, as more came than could be written: in the file they "
        "read as before, or lost once the session is over, or are not there, and its counts of tasks are wrong"
    )


def missing_tasks(meta: Mapping[str, Any]) -> int:
    """Of how many tasks the last state was dropped in the kernel, or given up where the file took no more."""
    return sum(count_from(meta.get(key)) for key in ("dropped_tasks", "lost_tasks"))


def count_from(value: Any) -> int:
    """A count of the meta table; 0 where it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def after_the_end(task: TaskRecord) -> TaskRecord:
    """Return a task as it reads once its session is over: what was in flight is LOST."""
    if task.state.terminal:
        return task
    from dataclasses import replace

    return replace(task, state=TaskState.LOST, reason=task.reason or f"the session ended while it was {task.state}")


def counts_after_the_end(counts: Mapping[str, int]) -> dict[str, int]:
    """Return the counts of tasks by state as they read once their session is over."""
    over: dict[str, int] = {}
    for name, count in counts.items():
        state = name if TaskState(name).terminal else TaskState.LOST.value
        over[state] = over.get(state, 0) + count
    return over


def thresholds_from(meta: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The thresholds in a session's meta table: (warning, critical) ratios by resource."""
    return {name: (float(pair[0]), float(pair[1])) for name, pair in meta.get("thresholds", {}).items()}
