"""What waits for the recorder: of a task its last state is never given up while there is any room for ids."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from wiseflow_nb.recorder import _backlog, _outbox
from wiseflow_nb.recorder._backlog import Backlog
from wiseflow_nb.recorder._outbox import Outbox
from wiseflow_nb.recorder._rows import rows_of
from wiseflow_nb.recorder._wire import Wire
from wiseflow_nb.records import EventRecord, TaskRecord, TaskState, TaskTransition
from wiseflow_nb.testing import FakeClock


class Live:
    """As a manager's task: its record is made when it is asked for."""

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        self.state = TaskState.PENDING

    @property
    def record(self) -> TaskRecord:
        return TaskRecord(self.task_id, "", self.state)


def move(seq: int) -> tuple[str, TaskTransition]:
    return "transition", TaskTransition(seq, "t1", 1, "pending", TaskState.RUNNING, 1.0)


def told(number: int) -> tuple[str, EventRecord]:
    return "event", EventRecord(float(number), "told", "m")


def test_without_room_the_oldest_moves_and_events_are_given_up_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backlog, "MOVES_LIMIT", 2)
    monkeypatch.setattr(_backlog, "ROWS_LIMIT", 3)
    backlog = Backlog()
    live = Live("t1")
    cell = {"cell_id": "c1", "status": "running"}
    backlog.add([("task", live), move(1), ("task", live), move(2), move(3), told(1), ("cell", cell), told(2)])
    backlog.add([("cell", {**cell, "status": "ok"}), ("meta", {"key": "k", "value": "1"})])
    assert backlog.shed() == 2
    assert (backlog.shed(), backlog.dropped_rows) == (0, 2)
    live.state = TaskState.COMPLETED
    rows, tasks, moves = backlog.portion()
    assert rows == [told(2), ("cell", {**cell, "status": "ok"}), ("meta", {"key": "k", "value": "1"})]
    assert [task.state for task in tasks] == ["completed"]
    assert [item.seq for item in moves] == [2, 3]
    assert not backlog


def test_what_is_owed_is_bounded_and_the_newest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backlog, "OWED_LIMIT", 3)
    backlog = Backlog()
    backlog.add(("task", Live(f"t{number}")) for number in range(5))
    backlog.add([("task", Live("t1"))])
    assert backlog.shed() == 2
    assert (backlog.dropped_rows, backlog.dropped_tasks) == (2, 2)
    assert [task.task_id for task in backlog.portion()[1]] == ["t3", "t4", "t1"]


def test_a_batch_takes_a_share_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backlog, "TASKS_AT_ONCE", 2)
    monkeypatch.setattr(_backlog, "MOVES_AT_ONCE", 3)
    backlog = Backlog()
    backlog.add([item for number in range(4) for item in (("task", Live(f"t{number}")), move(number))])
    sizes = []
    while backlog:
        _, tasks, moves = backlog.portion()
        sizes.append(([task.task_id for task in tasks], [item.seq for item in moves]))
    assert sizes == [(["t0", "t1"], [0, 1, 2]), (["t2", "t3"], [3])]
    assert backlog.dropped_rows == 0


class Bench:
    """An outbox whose recorder is the test: it acknowledges when it is told to."""

    def __init__(self) -> None:
        self.clock, self.wire = FakeClock(), Wire()
        self.published: list[EventRecord] = []
        self.outbox = Outbox(self.wire, self.clock, self.published.append)
        # No thread: there is nobody else who could hold the lock.
        self.outbox._publish_aside = self.published.append  # type: ignore[method-assign]
        self.file: dict[str, dict[str, str]] = {"meta": {}}
        self.tasks: dict[str, str] = {}
        self.events: list[str] = []

    def acknowledge(self) -> None:
        for number, line in self.wire.unacked():
            for table, values in rows_of(line):
                if table == "meta":
                    self.file["meta"][values["key"]] = values["value"]
                elif table == "task":
                    self.tasks[values[0]] = TaskState(next(item for item in values if item in set(TaskState)))
                elif table == "event":
                    self.events.append(values["kind"])
            self.wire.acknowledged(number)
            self.outbox.acknowledged(number)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(_outbox, "PENDING_LIMIT_BYTES", 3000)
    monkeypatch.setattr(_backlog, "MOVES_LIMIT", 5)
    monkeypatch.setattr(_backlog, "TASKS_AT_ONCE", 10)
    monkeypatch.setattr(_backlog, "MOVES_AT_ONCE", 20)
    return Bench()


def flood(bench: Bench, state: TaskState, count: int = 100) -> None:
    for number in range(count):
        live = Live(f"t{number}")
        live.state = state
        bench.outbox.put("task", live)
        bench.outbox.put(*move(number))
    bench.outbox.make()


def settle(bench: Bench, done: Callable[[], bool]) -> None:
    for _ in range(100):
        bench.acknowledge()
        if bench.outbox.make() and done():
            return
    raise AssertionError("it does not catch up")


def test_who_falls_behind_is_told_at_once_and_once_more_when_all_is_on_record(bench: Bench) -> None:
    flood(bench, TaskState.RUNNING)
    flood(bench, TaskState.COMPLETED)
    assert [event.kind for event in bench.published] == ["rows_dropped"]
    assert "does not keep up" in bench.outbox.trouble
    assert not bench.outbox.make()
    settle(bench, lambda: bench.outbox.trouble == "")
    assert set(bench.tasks.values()) == {"completed"}
    assert len(bench.tasks) == 100
    assert [event.kind for event in bench.published] == bench.events == ["rows_dropped", "rows_caught_up"]
    assert bench.outbox.dropped_rows > 0
    assert bench.published[-1].data == {"dropped_rows": bench.outbox.dropped_rows, "dropped_tasks": 0}
    count = str(bench.outbox.dropped_rows)
    assert bench.file["meta"] == {"dropped_rows": count, "dropped_tasks": "0", "trouble": '""'}


def test_the_trouble_is_in_the_file_as_soon_as_anything_is(bench: Bench) -> None:
    flood(bench, TaskState.RUNNING)
    bench.acknowledge()
    assert "does not keep up" in bench.file["meta"]["trouble"]
    assert int(bench.file["meta"]["dropped_rows"]) > 0


def test_one_that_falls_behind_again_and_again_is_told_of_once_a_minute(bench: Bench) -> None:
    for _ in range(3):
        flood(bench, TaskState.RUNNING)
        settle(bench, lambda: bench.outbox.trouble == "")
    assert [event.kind for event in bench.published] == ["rows_dropped", "rows_caught_up"]
    bench.clock.advance(_outbox.BEHIND_AGAIN_SECONDS + 1)
    flood(bench, TaskState.RUNNING)
    assert [event.kind for event in bench.published] == ["rows_dropped", "rows_caught_up", "rows_dropped"]
    # The end tells the count, whatever was told before.
    bench.outbox.make(everything=True)
    bench.acknowledge()
    assert bench.published[-1].data == {"dropped_rows": bench.outbox.dropped_rows, "dropped_tasks": 0}
    assert bench.file["meta"]["trouble"] == '""'


def test_tasks_whose_last_state_is_given_up_are_counted_and_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backlog, "OWED_LIMIT", 30)
    flood(bench, TaskState.COMPLETED)
    settle(bench, lambda: bench.outbox.trouble == "")
    missing = 100 - len(bench.tasks)
    assert missing > 0
    assert bench.file["meta"]["dropped_tasks"] == str(missing)
    assert f"the last states of {missing} tasks" in bench.published[-1].message


def test_nothing_is_kept_after_the_end() -> None:
    bench = Bench()
    bench.outbox.close()
    bench.outbox.put(*told(1))
    assert bench.outbox.make()
    assert bench.wire.unacked() == []


def test_a_thread_that_has_no_turn_to_make_batches_is_helped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_outbox, "PENDING_LIMIT_ROWS", 10)
    bench = Bench()
    for number in range(100):
        bench.outbox.put(*told(number))
    assert len(bench.outbox.pending) <= 11
    bench.outbox.make()
    bench.acknowledge()
    assert len(bench.events) == 100
