"""What travels to the recorder: packed where there is much of it, whole, and never torn."""

from __future__ import annotations

import io
import math
import threading
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest

from wiseflow_nb.errors import RecorderError
from wiseflow_nb.recorder._link import Link
from wiseflow_nb.recorder._rows import batch_line, newest_rows, rows_of, unpacked
from wiseflow_nb.recorder.protocol import encode
from wiseflow_nb.records import EventRecord, Priority, TaskRecord, TaskState, TaskTransition
from wiseflow_nb.store.schema import TASK_COLUMNS
from wiseflow_nb.store.writer import MAX_TEXT, StoreWriter


class Name(str):
    """As numpy's texts are: not quite a ``str``."""

    __slots__ = ()


def task(number: int = 1, **more: object) -> TaskRecord:
    values = {"name": "load", "priority": Priority.HIGH, "tags": ("a", "\udce4"), "rev": number, **more}
    return TaskRecord(f"t{number}", state=TaskState.RUNNING, **values)  # type: ignore[arg-type]


MOVE = TaskTransition(1, "t1", 1, "pending", TaskState.RUNNING, 5.0)


def plain(values: object) -> list[object]:
    assert isinstance(values, (list, tuple))
    return ["nan" if isinstance(item, float) and math.isnan(item) else item for item in values]


def test_tasks_and_transitions_arrive_as_they_were_with_plain_values() -> None:
    batch, left_out = batch_line(3, [("meta", {"key": "paused", "value": "true"})], [task(), task(2)], [MOVE])
    meta, first, second, move = rows_of(batch)
    assert left_out == 0
    assert meta == ["meta", {"key": "paused", "value": "true"}]
    assert (first[0], plain(first[1])) == ("task", plain(astuple(task())))
    assert (second[0], plain(second[1])) == ("task", plain(astuple(task(2))))
    assert (move[0], move[1]) == ("transition", astuple(MOVE))
    assert all(type(item) in (str, int, float, tuple) for item in (*first[1], *move[1]))


def test_what_cannot_be_packed_travels_as_json() -> None:
    odd = task(2, name=Name("odd"))
    batch, left_out = batch_line(1, (), [task(), odd], [MOVE])
    rows = rows_of(batch)
    assert left_out == 0
    assert sorted(row[0] for row in rows) == ["task", "task", "transition"]
    assert [row[1][1] for row in rows if row[0] == "task"] == ["load", "odd"]


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __float__ = __deepcopy__ = __str__


@pytest.mark.parametrize(
    ("value", "text"),
    [(np.str_("epoch"), "epoch"), (np.int64(3), "3"), (b"abc", "abc"), (1j, "1j"), (Unspeakable(), "<Unspeakable>")],
)
def test_each_column_holds_what_it_says_whatever_it_was_given(value: object, text: str) -> None:
    odd = task(2, name=value, progress_text=value, tags=(value,), progress=np.float64(0.5), attempt=np.int64(4))
    move = replace(MOVE, reason=value, time_seconds=np.float32(0.25))  # type: ignore[arg-type]
    batch, left_out = batch_line(1, (), [task(1), odd], [MOVE, move])
    first, second, _, moved = rows_of(batch)
    assert left_out == 0
    assert plain(first[1]) == plain(astuple(task()))
    found = dict(zip(TASK_COLUMNS, second[1], strict=True))
    assert (found["name"], found["progress_text"], found["tags"]) == (text, text, (text,))
    assert (found["progress"], found["attempt"]) == (0.5, 4)
    assert moved[1][-2:] == (0.25, text)
    assert {type(item) for item in (*second[1], *found["tags"], *moved[1])} == {str, float, int, tuple}


def test_a_number_that_is_none_is_said_to_be_none() -> None:
    odd = task(2, progress="much", attempt=Unspeakable(), wall_seconds=Unspeakable())
    (row,) = rows_of(batch_line(1, (), [odd], [])[0])
    found = dict(zip(TASK_COLUMNS, row[1], strict=True))
    assert math.isnan(found["progress"])
    assert math.isnan(found["wall_seconds"])
    assert found["attempt"] == 0


def test_a_row_that_cannot_be_encoded_is_left_out_and_the_others_travel() -> None:
    circle: dict[str, object] = {}
    circle["self"] = circle
    events = [
        EventRecord(1.0, "told", "m", data) for data in ({}, circle, {"x": Unspeakable()}, {"x": threading.Lock()})
    ]
    batch, left_out = batch_line(1, [("event", event) for event in events], [task(), object()], [MOVE])  # type: ignore[list-item]
    assert [row[0] for row in rows_of(batch)] == ["event", "task", "transition"]
    assert left_out == 4


def test_a_batch_with_rows_that_fit_no_table_is_written_but_for_these(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "session.sqlite")
    bad = [["task", [b"raw", 1]], ["meta", {"key": "k", "value": None}], [], 7, ["nothing", {}]]
    bad += [["event", "text"], ["event", {"time_seconds": 1.0, "kind": "odd", "message": b"\xff", "data": {"x": {1}}}]]
    rows = [*bad, ["meta", {"key": "good", "value": "1"}]]
    assert writer.apply(newest_rows(rows)) == 6
    writer.commit()
    assert writer.get_meta("good") == 1
    assert writer.connection.execute("SELECT kind FROM events").fetchall() == [("odd",)]
    writer.close()


def test_a_text_that_is_too_long_is_cut_and_the_others_stay_as_they_are() -> None:
    many = [task(number, error="x" * 900) for number in range(2, 200)]
    rows = rows_of(batch_line(1, (), [task(1, error="y" * 1_000_000), *many], [MOVE])[0])
    errors = {row[1][0]: row[1][20] for row in rows if row[0] == "task"}
    assert len(errors) == 199
    assert len(errors.pop("t1")) == MAX_TEXT
    assert set(errors.values()) == {"x" * 900}


def test_a_batch_that_was_torn_off_is_not_taken_and_what_is_not_rows_is_told() -> None:
    whole, torn = batch_line(1, (), [task()], [MOVE])[0], batch_line(2, (), [task(2)], [])[0][:-1]
    link = Link(io.BytesIO(whole + encode({"t": "busy", "value": True}) + torn), io.BytesIO())
    link.start()
    kinds = []
    while (message := link.inbox.get(timeout=10)) is not None:
        kinds.append((message["t"], len(message.get("rows", ()))))
    assert kinds == [("batch", 2), ("busy", 0)]
    assert link.malformed == 0
    junk = encode({"t": "batch", "seq": 1, "rows": [["meta", {}]], "packed": 4}) + b"junk"
    link = Link(io.BytesIO(junk), io.BytesIO())
    link.start()
    assert link.inbox.get(timeout=10) == {"t": "batch", "seq": 1, "rows": [["meta", {}]], "packed": 4, "torn": 1}
    for junk in (b"", b"junk", b"N"):
        with pytest.raises(RecorderError):
            unpacked(junk)
