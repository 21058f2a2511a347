"""The end of a record where its file cannot take all that waits: the mark first, then what fits; by the recorder or the kernel."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wiseflow_nb.clock import Clock
from wiseflow_nb.errors import RecorderError, WiseflowError
from wiseflow_nb.recorder._files import LastRoom
from wiseflow_nb.recorder._rows import newest_rows, rows_of
from wiseflow_nb.store.paths import DATABASE_NAME
from wiseflow_nb.store.writer import StoreWriter

logger = logging.getLogger("wiseflow_nb.recorder")
#: So many rows are written at once where there is little room; of what does not fit a half is tried, down to the fewest.
ROWS_AT_ONCE = 512
FEWEST_ROWS = 16
#: After so long, what is left is given up.
FITTING_SECONDS = 2.0
#: Of a table with so few rows they take no room from the others, and go first.
FEW_ROWS = 64
#: The tables in the order in which their rows are worth their place; what is not named goes before the last one.
_WORTH = ("task", "cell", "event")
_LEAST = "transition"
#: What the kernel counted itself goes with the mark.
_WITH_MARK = ("dropped_rows", "dropped_tasks", "trouble")


class GivenUp(NamedTuple):
    """How many rows were given up, and how many of them were last states of tasks."""

    rows: int = 0
    tasks: int = 0

    def text(self) -> str:
        """It in words; empty for none.

        Examples
        --------
        >>> GivenUp(1200, 300).text()
        "1,200 rows were given up at the end, the last states of 300 tasks among them: the session's file could not be written"
        """
        if not self.rows:
            return ""
        tasks = f", the last states of {self.tasks:,} tasks among them" if self.tasks else ""
        return f"{self.rows:,} rows were given up at the end{tasks}: the session's file could not be written"


def _nothing() -> None:
    """What has rows alone."""


class _Part(NamedTuple):
    rows: Sequence[Any]
    table: str = ""
    write: Callable[[], object] = _nothing

    @property
    def tasks(self) -> int:
        return len(self.rows) if self.table == "task" else 0

    def halves(self) -> tuple[_Part, ...]:
        half = len(self.rows) // 2
        if half < FEWEST_ROWS:
            return ()
        return _Part(self.rows[:half], self.table), _Part(self.rows[half:], self.table, self.write)


def write_what_fits(
    writer: StoreWriter,
    mark: Mapping[str, Any],
    rows: Iterable[Sequence[Any]],
    clock: Clock,
    *,
    before: GivenUp,
    closing: Callable[[], object],
    rest: Callable[[], object] = _nothing,
) -> GivenUp:
    """Write the end mark alone, and then what else the file takes, what is worth most first.

    The count of what is given up stands beside the mark (``lost_rows``, ``lost_tasks``), and is true
    whenever this is cut off.

    Parameters
    ----------
    mark
        Values of the meta table.
    rows
        All that waits, as ``StoreWriter.apply`` takes it.
    closing
        Writes what belongs to the end: alerts and commands that nobody looks after any more.
    rest
        Writes what has no rows, such as samples.
    before
        What had been given up before.

    Raises
    ------
    sqlite3.Error
        If not even the mark can be written.
    """
    by_table: dict[str, list[Any]] = {}
    for row in newest_rows(rows):
        by_table.setdefault(_table(row), []).append(row)
    metas = by_table.pop("meta", [])
    with_mark = [row for row in metas if _key(row) in _WITH_MARK]
    least = by_table.pop(_LEAST, [])
    marks = [*by_table.pop("alert", []), *by_table.pop("mark", [])]
    parts = [_Part([row for row in metas if _key(row) not in _WITH_MARK], "meta"), _Part(marks, "alert", closing)]
    order = {table: number for number, table in enumerate(_WORTH)}
    for table in sorted(by_table, key=lambda name: (len(by_table[name]) > FEW_ROWS, order.get(name, len(order)))):
        parts += _portions(by_table[table], table)
    parts += [_Part((), "rest", rest), *_portions(least, _LEAST)]
    lost = GivenUp(
        before.rows + sum(len(part.rows) for part in parts), before.tasks + sum(part.tasks for part in parts)
    )

    def write(part: _Part, left: GivenUp) -> None:
        try:
            writer.apply(part.rows)
            part.write()
            writer.meta("lost_rows", left.rows)
            writer.meta("lost_tasks", left.tasks)
            writer.commit()
        except BaseException:
            # A full disk can have ended the transaction by itself.
            with contextlib.suppress(sqlite3.Error):
                writer.rollback()
            raise

    def write_mark() -> None:
        for key, value in mark.items():
            writer.meta(key, value)

    write(_Part(with_mark, write=write_mark), lost)
    waiting, give_up = parts[::-1], clock.monotonic() + FITTING_SECONDS
    while waiting and clock.monotonic() < give_up:
        part = waiting.pop()
        left = GivenUp(lost.rows - len(part.rows), lost.tasks - part.tasks)
        try:
            write(part, left)
            lost = left
        except sqlite3.Error:
            halves = part.halves()
            # Where the fewest do not fit, the others of that table do not either.
            waiting = [*waiting, *halves[::-1]] if halves else [item for item in waiting if item.table != part.table]
    return lost


def _portions(rows: Sequence[Any], table: str) -> list[_Part]:
    return [_Part(rows[at : at + ROWS_AT_ONCE], table) for at in range(0, len(rows), ROWS_AT_ONCE)]


def _table(row: Any) -> str:
    # What is no row is for the writer to judge.
    return row[0] if isinstance(row, (list, tuple)) and row and isinstance(row[0], str) else ""


def _key(row: Any) -> Any:
    values = row[1] if len(row) > 1 else None
    return values.get("key") if isinstance(values, Mapping) else None


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def mark_end(directory: str, unacked: Sequence[tuple[int, bytes]], reason: str, clock: Clock) -> None:
    """Write what was not acknowledged, and the end mark; without room for all of it, the mark and what fits.

    The recorder is no more: the room that it kept for its last words serves for these.
    """
    room = LastRoom(Path(directory))
    why: Exception | None = None
    for whole in (True, True, False):
        try:
            _write(directory, unacked, reason, clock, whole=whole)
            break
        except (WiseflowError, sqlite3.Error, OSError, ValueError, TypeError) as error:
            # Whatever the file is, closing a session raises nothing for it.
            why = error
            room.release()
    else:
        logger.warning("the session's end could not be recorded: %s", why)
    room.release()


def _write(directory: str, batches: Sequence[tuple[int, bytes]], reason: str, clock: Clock, *, whole: bool) -> None:
    writer = StoreWriter(Path(directory) / DATABASE_NAME)
    now = clock.time()
    mark: dict[str, Any] = {"ended_seconds": now, "end_reason": f"{reason} (the recorder did not answer)"}
    try:
        applied = int(writer.get_meta("batch_seq") or 0)
        rows: list[Any] = []
        for number, line in batches:
            if number > applied:
                with contextlib.suppress(RecorderError):
                    rows += rows_of(line)
                mark["batch_seq"] = number
        if whole:
            writer.apply(newest_rows(rows))
            writer.resolve_alerts(now)
            for key, value in mark.items():
                writer.meta(key, value)
            writer.commit()
        else:
            before = GivenUp(_whole(writer.get_meta("lost_rows")), _whole(writer.get_meta("lost_tasks")))
            lost = write_what_fits(writer, mark, rows, clock, closing=lambda: writer.resolve_alerts(now), before=before)
            if lost != before:
                logger.warning("%s", GivenUp(lost.rows - before.rows, lost.tasks - before.tasks).text())
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            writer.rollback()
        writer.connection.close()
        raise
    writer.close()
