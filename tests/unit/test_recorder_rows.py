"""What travels to the recorder: packed where there is much of it, whole, and never torn."""

from __future__ import annotations

import io
import math
from dataclasses import astuple

import pytest

from wiseflow_nb.errors import RecorderError
from wiseflow_nb.recorder._link import Link
from wiseflow_nb.recorder._rows import batch_line, rows_of, unpacked
from wiseflow_nb.recorder.protocol import encode
from wiseflow_nb.records import Priority, TaskRecord, TaskState, TaskTransition
from wiseflow_nb.store.writer import MAX_TEXT


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
    for junk in (b"", b"junk", b"N"):
        with pytest.raises(RecorderError):
            unpacked(junk)
