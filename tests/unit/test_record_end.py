"""The end of a record in a file that takes no more: the mark is in it, then what is worth most, and the count of the rest."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from wiseflow_nb.recorder import _end
from wiseflow_nb.recorder._end import GivenUp, mark_end, write_what_fits
from wiseflow_nb.recorder._rows import batch_line
from wiseflow_nb.records import TaskRecord, TaskState, TaskTransition
from wiseflow_nb.store.paths import DATABASE_NAME
from wiseflow_nb.store.reader import StoreReader, info_from_meta
from wiseflow_nb.store.schema import TASK_COLUMNS, TRANSITION_COLUMNS
from wiseflow_nb.store.writer import StoreWriter
from wiseflow_nb.testing import FakeClock

COUNT = 2000


def nothing() -> None:
    pass


def tasks(count: int = COUNT) -> list[TaskRecord]:
    return [TaskRecord(f"t{number}", f"work {number}", TaskState.COMPLETED, rev=number + 1) for number in range(count)]


def moves(count: int = COUNT) -> list[TaskTransition]:
    return [TaskTransition(number, f"t{number}", 1, "running", TaskState.COMPLETED, 1.0) for number in range(count)]


def rows() -> list[list[Any]]:
    return [
        *(["transition", [getattr(item, name) for name in TRANSITION_COLUMNS]] for item in moves()),
        *(["task", [getattr(item, name) for name in TASK_COLUMNS]] for item in tasks()),
        ["event", {"time_seconds": 1.0, "kind": "session_closed", "message": "", "data": "{}"}],
        ["meta", {"key": "dropped_rows", "value": "7"}],
        ["meta", {"key": "paused", "value": "true"}],
    ]


def room_for(writer: StoreWriter, pages: int) -> None:
    """As a disk does that is nearly full."""
    (now,) = writer.connection.execute("PRAGMA page_count").fetchone()
    writer.connection.execute(f"PRAGMA max_page_count = {now + pages}")


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[StoreWriter]:
    made = StoreWriter(tmp_path / DATABASE_NAME)
    yield made
    made.close()


def counted(writer: StoreWriter) -> tuple[int, int, int]:
    counts = [
        writer.connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        for table in ("tasks", "transitions", "events")
    ]
    return counts[0], counts[1], counts[2]


@pytest.mark.parametrize("pages", [0, 1, 10, 20, 10_000])
def test_the_mark_is_in_the_file_and_the_count_of_what_is_not(writer: StoreWriter, pages: int) -> None:
    room_for(writer, pages)
    lost = write_what_fits(writer, {"ended_seconds": 5.0}, rows(), FakeClock(), before=GivenUp(3, 1), closing=nothing)
    kept, moved, events = counted(writer)
    assert writer.get_meta("ended_seconds") == 5.0
    assert writer.get_meta("dropped_rows") == 7
    assert (writer.get_meta("lost_rows"), writer.get_meta("lost_tasks")) == lost
    assert lost.tasks == 1 + COUNT - kept
    assert lost.rows == 3 + 2 * COUNT - kept - moved + (1 - events) + (writer.get_meta("paused") is None)
    assert events == 1
    assert (lost == (3, 1)) == (pages == 10_000)
    if pages < 40:
        assert 0 < kept < COUNT


def test_what_is_cut_off_has_counted_what_is_not_there_yet(writer: StoreWriter) -> None:
    clock = FakeClock()

    def slow() -> None:
        clock.advance(_end.FITTING_SECONDS)

    lost = write_what_fits(writer, {"ended_seconds": 5.0}, rows(), clock, before=GivenUp(), closing=slow)
    assert counted(writer) == (0, 0, 0)
    assert lost == (writer.get_meta("lost_rows"), writer.get_meta("lost_tasks")) == (2 * COUNT + 1, COUNT)


def test_a_mark_that_does_not_fit_is_said(writer: StoreWriter) -> None:
    writer.connection.execute("PRAGMA query_only = ON")
    with pytest.raises(sqlite3.Error):
        write_what_fits(writer, {"ended_seconds": 5.0}, [], FakeClock(), before=GivenUp(), closing=nothing)


def test_an_end_that_the_kernel_marks_says_what_it_gave_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    StoreWriter(tmp_path / DATABASE_NAME).close()

    def nearly_full(path: Path) -> StoreWriter:
        made = StoreWriter(path)
        room_for(made, 20)
        return made

    monkeypatch.setattr(_end, "StoreWriter", nearly_full)
    line, _ = batch_line(4, [("meta", {"key": "paused", "value": "true"})], tasks(), moves())
    with caplog.at_level(logging.WARNING, "wiseflow_nb.recorder"):
        mark_end(str(tmp_path), [(4, line)], "closed", FakeClock())
    reader = StoreReader(tmp_path)
    meta, kept = reader.meta(), len(reader.changed_tasks())
    moved = reader.query("SELECT count(*) FROM transitions")[0][0]
    reader.close()
    rows_lost, tasks_lost = 2 * COUNT - kept - moved, COUNT - kept
    assert 0 < kept < COUNT
    assert (meta["lost_rows"], meta["lost_tasks"], meta["batch_seq"]) == (rows_lost, tasks_lost, 4)
    assert meta["end_reason"] == "closed (the recorder did not answer)"
    assert [record.message for record in caplog.records] == [GivenUp(rows_lost, tasks_lost).text()]
    assert f"of {tasks_lost:,} tasks" in info_from_meta(meta, tmp_path, 0.0).notice
