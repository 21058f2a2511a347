"""The two views of one session give the same answers: the one in its process, and the one through its file."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pandas as pd
import pytest

from wiseflow_nb import cli
from wiseflow_nb.records import (
    AlertState,
    AlertTransition,
    CellRecord,
    SessionInfo,
    SessionState,
    Severity,
    Snapshot,
    valid,
    valid_text,
)
from wiseflow_nb.session import Session
from wiseflow_nb.store.reader import StoreReader
from wiseflow_nb.store.writer import MAX_TEXT
from wiseflow_nb.tasks import TaskManager
from wiseflow_nb.testing import FakeClock
from wiseflow_nb.view import SessionView, StoreView, _picture, _views
from wiseflow_nb.view._views import LocalTasks

HOSTILE = {
    "sql": "'; DROP TABLE tasks; --",
    "html": "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "control": "a\x00b\x1b[31m\r\n\t\x7f\u202e",
    "surrogate": "\ud800 lone \udfff",
    "large": "x" * 1_000_000,
    "wide": "日本語 🧪 é",
    "json": '{"t": "end"}\n{"t": "end"}',
    "empty": "",
}


def wait_until(condition, timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.01)


@pytest.fixture
def session() -> Iterator[Session]:
    with Session(title="conformance", resource_check_interval=0.05) as made:
        yield made


@pytest.fixture
def views(session: Session) -> Iterator[tuple[SessionView, SessionView]]:
    store = StoreView(session.directory)
    yield session.view, store
    store.close()


@pytest.fixture(params=["local", "store"])
def view(views: tuple[SessionView, SessionView], request: pytest.FixtureRequest) -> SessionView:
    return views[request.param == "store"]


def plain(value: Any) -> Any:
    """Something comparable: NaN equals NaN."""
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def told(shot: Snapshot) -> dict[str, Any]:
    """All of a snapshot but what moves by itself between two looks."""
    values = {key: plain(value) for key, value in asdict(shot).items()}
    for name in ("time_seconds", "sample"):
        del values[name]
    del values["info"]["last_seen_seconds"]
    values["settings"].pop("version", None)
    values["tasks"] = sorted(values["tasks"], key=lambda task: task["task_id"])
    return values


def settle(session: Session, alive: int = 0) -> None:
    wait_until(lambda: sum(not task.state.terminal for task in session.task_records()) == alive)
    wait_until(lambda: session.pool.status().busy == min(alive, 1) and session.pool.status().queued == 0)
    # Else it may give the pool another size between two looks: that of a busy machine.
    session._governor.stop(30)
    session._governor.tell_pool()
    assert session.sync()


def boom(text: str) -> None:
    raise RuntimeError(text)


def variety(session: Session) -> TaskManager:
    tasks = session.tasks
    first = tasks.options(name="first", priority="high", tags=("a", "b")).submit(sum, [1, 2])
    tasks.options(name="second", dependencies=[first]).submit(int)
    failed = tasks.options(name="failed").submit(boom, "a reason")
    tasks.options(name="skipped", dependencies=[failed]).submit(int)
    session.cell_started(CellRecord("c1", 1, "x = 1", 1000.0))
    session.cell_finished(CellRecord("c1", 1, "x = 1", 1000.0, 1001.0, 1.0, 0.5, 1.0, 2.0, 3.0, 0.1, "ok"))
    return tasks


def test_both_tell_the_same(session: Session, views: tuple[SessionView, SessionView]) -> None:
    variety(session)
    session.configure(cpu_threshold=77)
    settle(session)
    local, store = views
    wait_until(lambda: store.snapshot().settings["cpu_threshold"] == 77)
    assert session.sync()
    assert told(local.snapshot()) == told(store.snapshot())
    for task in local.snapshot().tasks:
        assert plain(asdict(local.task(task.task_id))) == plain(asdict(store.task(task.task_id)))
    assert local.task("nobody") is store.task("nobody") is None


def test_a_first_picture_is_small_and_the_same_and_pages_bring_the_rest(
    session: Session, views: tuple[SessionView, SessionView], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_picture, "SHOWN_TASKS", 6)
    monkeypatch.setattr(_picture, "CHANGED_TASKS", 6)
    monkeypatch.setattr(_views, "CHANGES_A_TASK", 1)
    started, release = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        release.wait(60)

    session.tasks.set_max_concurrent(1)
    held = session.tasks.options(name="held").submit(hold)
    assert started.wait(30)
    waiting = [session.tasks.options(name=f"later {number}").submit(int) for number in range(3)]
    session.tasks.set_max_concurrent(2)
    blocked = [session.tasks.options(name=f"after {number}", dependencies=[held]).submit(int) for number in range(8)]
    for task in waiting:
        task.result(timeout=30)
    for number in range(20):
        session.tasks.options(name=f"short {number}").submit(int).result(timeout=30)
    settle(session, alive=9)
    local, store = views
    shot = local.snapshot()
    assert told(shot) == told(store.snapshot())
    assert shot.reset
    assert shot.task_counts == {"completed": 23, "running": 1, "waiting": 8}
    # The six that changed last, and of the older ones six that have not ended: what runs, then what waits.
    newest_waiting = [task.id for task in blocked[-5:]]
    assert [task.task_id for task in shot.tasks[-6:]] == [f"t{number}" for number in range(27, 33)]
    assert {task.task_id for task in shot.tasks[:-6]} == {held.id, *newest_waiting}
    for view in views:
        first = view.snapshot()
        page = view.task_records(until_rev=first.older_rev, limit=10)
        rest = view.task_records(until_rev=page[-1].rev - 1)
        assert len(page) == 10
        revs = [task.rev for task in (*page, *rest)]
        assert revs == sorted(revs, reverse=True)
        everything = {task.task_id for task in view.task_records()}
        assert {task.task_id for task in (*first.tasks, *page, *rest)} == everything
        assert len(everything) == 32
        # A little that changed is told alone; more than fits is a first picture again.
        few = view.snapshot(first.rev - 2)
        assert (few.reset, few.older_rev) == (False, 0)
        assert [task.rev for task in few.tasks] == sorted(task.rev for task in first.tasks)[-len(few.tasks) :]
        many = view.snapshot(1)
        assert told(replace(many, pool=first.pool)) == told(first)
    release.set()
    settle(session)
    assert told(local.snapshot()) == told(store.snapshot())


@pytest.mark.parametrize(("most", "rev"), [(3, 0), (3, 5), (3, 17), (9, 1), (9, 10), (100, 0)])
def test_what_changed_is_counted_alike_and_not_read_where_it_is_too_much(
    session: Session, views: tuple[SessionView, SessionView], monkeypatch: pytest.MonkeyPatch, most: int, rev: int
) -> None:
    monkeypatch.setattr(_views, "CHANGES_A_TASK", 1)
    for number in range(8):
        session.tasks.options(name=f"n{number}").submit(int).result(timeout=30)
    settle(session)
    local = LocalTasks(session, lambda limit, until_rev: ())
    store = StoreReader(session.directory)
    changed = [task for task in session.task_records() if task.rev > rev]
    for source in (local, store):
        assert min(source.count_changed(rev, most), most + 1) == min(len(changed), most + 1)
        assert list(source.changed_tasks(rev, most)) == changed[:most]
    store.close()

    def unread(*_: Any) -> Any:
        raise AssertionError("read, though it is too much")

    if rev and len(changed) > most:
        monkeypatch.setattr(_picture, "CHANGED_TASKS", most)
        monkeypatch.setattr(LocalTasks, "changed_tasks", unread)
        monkeypatch.setattr(StoreReader, "changed_tasks", unread)
        assert [view.snapshot(rev).reset for view in views] == [True, True]


@pytest.mark.parametrize("frame", ["task_history", "cell_history", "alert_history", "events", "commands"])
def test_both_give_the_same_frames(session: Session, views: tuple[SessionView, SessionView], frame: str) -> None:
    variety(session)
    local, store = views
    local.pause()
    store.resume()
    local.cancel("nobody")
    store.configure({"nonsense": 1})
    transition = AlertTransition(
        "a1",
        "r",
        "cpu",
        "fired",
        AlertState.OK,
        AlertState.FIRING,
        Severity.WARNING,
        1,
        1,
        1,
        1,
        1,
        "m",
        ((1, "n", 2.0, 3.0),),
    )
    session._put("alert", transition)
    settle(session)
    mine, theirs = getattr(local, frame)(), getattr(store, frame)()
    assert len(mine) > 0
    # In which order tasks come is nobody's promise; events and commands come in the order of their numbers.
    if frame == "task_history":
        mine, theirs = mine.sort_index(), theirs.sort_index()
        for column in mine:
            mine[column] = mine[column].map(lambda item: tuple(item) if isinstance(item, list) else item)
            theirs[column] = theirs[column].map(lambda item: tuple(item) if isinstance(item, list) else item)
    pd.testing.assert_frame_equal(mine, theirs)


def test_history_is_the_same_rows(session: Session, views: tuple[SessionView, SessionView]) -> None:
    wait_until(lambda: len(session.history()) > 5)
    until = session.history().index[4]
    mine, theirs = (view.history(until=until, rates=True) for view in views)
    pd.testing.assert_frame_equal(mine, theirs)
    assert mine.attrs == theirs.attrs


def test_what_changed_since_adds_up_to_everything(session: Session, view: SessionView) -> None:
    """Whoever follows by ``rev`` has, at the end, what one look at everything shows."""
    rev, known = 0, {}
    for turn in range(30):
        held = session.tasks.options(name=f"turn {turn}").submit(int if turn % 3 else boom)
        if turn % 5 == 0:
            session.tasks.cancel(held.id)
        shot = view.snapshot(rev)
        assert shot.rev >= rev
        assert all(task.rev > rev for task in shot.tasks) or shot.reset
        known |= {task.task_id: task for task in shot.tasks}
        rev = shot.rev
    settle(session)
    last = view.snapshot(rev)
    known |= {task.task_id: task for task in last.tasks}
    everything = {task.task_id: task for task in view.snapshot().tasks}
    assert plain({key: asdict(task) for key, task in known.items()}) == plain(
        {key: asdict(task) for key, task in everything.items()}
    )
    assert view.snapshot(last.rev).tasks == ()
    assert view.snapshot(last.rev).rev == last.rev
    counted: dict[str, int] = {}
    for task in everything.values():
        counted[task.state] = counted.get(task.state, 0) + 1
    assert {name: count for name, count in last.task_counts.items() if count} == counted


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_texts_are_texts_the_whole_way(session: Session, view: SessionView, kind: str) -> None:
    text = HOSTILE[kind]
    name = text or "named"
    tasks = session.tasks

    def work() -> None:
        from wiseflow_nb import current_task

        current_task().progress(0.5, text)
        print(text)
        raise RuntimeError(text)

    task = tasks.options(name=name, tags=(name[:100],)).submit(work)
    session.cell_started(CellRecord("c1", 1, text, 1000.0))
    session.event("told", text, data=text)
    settle(session)
    record = view.task(task.id)
    expected = name.encode("utf-8", "replace").decode()
    limit = 200
    assert record.name.encode("utf-8", "replace").decode()[:limit] == expected[:limit]
    assert record.state == "failed"
    assert text.encode("utf-8", "replace").decode()[:limit] in record.error.encode("utf-8", "replace").decode()
    for value in (record.name, record.error, record.traceback, record.output_tail, record.progress_text, *record.tags):
        assert isinstance(value, str)
        assert value == valid_text(value), "what is shown is text that UTF-8 has, from both views"
        assert isinstance(view, StoreView) is False or len(value) <= MAX_TEXT
    assert len(view.task_history()) == 1
    assert view.cell_history().first_line.iloc[0][:limit] == text.encode("utf-8", "replace").decode()[:limit]
    json.dumps(valid(asdict(record)), ensure_ascii=False).encode("utf-8")
    event = view.events().query("kind == 'told'").iloc[0]
    assert valid_text(str(event.data)) == str(event.data)
    assert event.message[:limit] == text.encode("utf-8", "replace").decode()[:limit]
    # The name is what a person sees of it elsewhere too, and nothing of it was obeyed.
    answer = view.cancel(task.id)
    assert not answer.ok
    assert not view.cancel(name).ok
    assert session.recorder.restarts == 0
    assert view.snapshot().task_counts["failed"] == 1
    assert [item.session_id for item in view.sessions()] == [session.id]


def test_a_title_that_is_no_text_is_shown_as_text_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    """A directory's name that is not UTF-8 is the default title, and comes with lone surrogates."""
    with Session(title="caf\udce9 \ud800", resource_check_interval=0.05) as session:
        task = session.tasks.options(name="w\udce4g", tags=("\udcff",)).submit(boom, "\udce4")
        settle(session)
        store = StoreView(session.directory)
        for view in (session.view, store):
            assert view.snapshot().info.title == "caf? ?"
            (shown,) = view.snapshot().tasks
            assert (shown.name, shown.tags, shown.error) == ("w?g", ("?",), "RuntimeError: ?")
            assert shown == view.task(task.id)
        store.close()
        for words in (["status"], ["tasks", session.id], ["sessions"], ["report", session.id]):
            assert cli.main([*words, "--json"]) == 0
            out = capsys.readouterr().out
            assert "\\udc" not in out
            assert "\\ud800" not in out
            json.loads(out)
        assert cli.main(["status"]) == 0
        assert "caf? ?" in capsys.readouterr().out


def test_data_that_json_has_no_word_for_does_not_stop_the_record(session: Session, view: SessionView) -> None:
    class Unprintable:
        def __str__(self) -> str:
            raise ValueError("no")

    circle: list[Any] = []
    circle.append(circle)
    session.event("odd", "object", thing=object(), path=session.directory, odd=Unprintable(), number=10**400)
    session.event("odd", "nan", value=math.nan, infinite=math.inf, raw=b"\xff")
    session.event("odd", "set", value={1, 2})
    assert session.sync()
    assert view.events().query("kind == 'odd'").message.tolist() == ["object", "nan", "set"]
    assert session.tasks.submit(int).result(timeout=10) == 0


def test_verbs_that_do_not_fit_change_nothing_and_say_why(session: Session, view: SessionView) -> None:
    before = session.settings
    for answer, reason in [
        (view.cancel(""), "task's id"),
        (view.cancel("t" * 300), "task's id"),
        (view.reprioritise("nobody", "urgent"), "priority"),
        (view.resize(0, 4), "min_workers"),
        (view.resize(9, 4), "MIN_THREAD_WORKERS"),
        (view.configure({}), "settings by name"),
        (view.configure({"cpu_threshold": math.nan}), "CPU_THRESHOLD"),
        (view.configure({"cpu_threshold": object()}), "cannot be sent"),
        (view.configure({"x": "y" * 70_000}), "over 65536 bytes"),
        (view.configure({"retention_mb": 1}), "RETENTION_MB"),
        (view.silence("nobody", -1), "seconds"),
        (view.silence("nobody", math.inf), "seconds"),
        (view.shutdown("explode"), "drain"),
    ]:
        assert not answer.ok
        assert reason in answer.message
    assert session.settings == before
    assert session.tasks.submit(int).result(timeout=10) == 0


@pytest.mark.parametrize("count", [1, 60_000])
def test_tasks_whose_last_state_the_record_lacks_are_told_by_both_for_good(
    session: Session, views: tuple[SessionView, SessionView], count: int
) -> None:
    assert [view.snapshot().info.notice for view in views] == ["", ""]
    session.recorder.put_meta("dropped_rows", json.dumps(3 * count))
    session.recorder.put_meta("dropped_tasks", json.dumps(count))
    assert session.sync()
    notices = {view.snapshot().info.notice for view in views}
    (notice,) = notices
    assert notice.startswith(f"of {count:,} task{'s' * (count > 1)} the last state is not on record")
    session.close()
    assert {view.snapshot().info.notice for view in views} == notices
    assert str(views[1].report()).count(notice) == 1


def test_a_record_that_stands_still_is_told_by_who_has_only_the_record(session: Session) -> None:
    assert session.sync()
    clock = FakeClock(time.time() + 100.0)
    with contextlib.closing(StoreView(session.directory, clock=clock)) as store:
        words = "the recorder hangs, ended, or cannot write its file"
        assert words in store.info.notice == store.snapshot().info.notice
        assert store.info.state is SessionState.LIVE
        # Who is in the same process hears from the recorder itself.
        assert session.view.snapshot().info.notice == ""
        session.close()
        assert store.info.notice == ""


def test_an_ended_session_reads_the_same_from_both(session: Session) -> None:
    variety(session)
    settle(session)
    store = StoreView(session.directory)
    store.snapshot()
    local = session.view.snapshot()
    session.close("done")
    after = store.snapshot(local.rev)
    assert after.reset, "its end turns what was in flight into lost: all rows come again"
    assert after.info.state is SessionState.ENDED
    assert plain([asdict(task) for task in sorted(after.tasks, key=lambda task: task.task_id)]) == plain(
        [asdict(task) for task in sorted(local.tasks, key=lambda task: task.task_id)]
    )
    ended: SessionInfo = replace(session.info, last_seen_seconds=0.0, ended_seconds=0.0)
    assert ended == replace(after.info, last_seen_seconds=0.0, ended_seconds=0.0)
    answers = [store.cancel("t1"), session.view.cancel("t1")]
    assert not any(answer.ok for answer in answers)
    store.close()


def test_three_readers_and_two_commanders_at_once(session: Session) -> None:
    """Every reader sees revisions grow and, at the end, the same; every command is answered, once."""
    stop = threading.Event()
    seen: list[dict[str, Any]] = []
    answers: list[tuple[bool, str]] = []
    failures: list[BaseException] = []

    def guarded(body: Any) -> None:
        try:
            body()
        except BaseException as error:
            failures.append(error)

    def read(view: SessionView) -> None:
        rev, known = 0, {}
        while True:
            last = stop.is_set()
            shot = view.snapshot(rev)
            assert shot.rev >= rev
            known |= {task.task_id: task.state for task in shot.tasks}
            rev = shot.rev
            view.history()
            if last:
                seen.append(known)
                return

    def command(view: SessionView, number: int) -> None:
        for turn in range(10):
            low = 1 + number
            verb = turn % 3
            if verb == 0:
                answer = view.resize(low, low + 4)
            elif verb == 1:
                answer = view.configure({"cpu_threshold": 60 + turn})
            else:
                answer = view.reprioritise(held[turn].id, "high")
            answers.append((answer.ok, answer.message))

    release = threading.Event()
    held = [session.tasks.options(name=f"held {number}").submit(release.wait, 60) for number in range(20)]
    stores = [StoreView(session.directory, command_timeout=60.0) for _ in range(4)]
    readers = [
        threading.Thread(target=guarded, args=(lambda view=view: read(view),)) for view in (session.view, *stores[:2])
    ]
    commanders = [
        threading.Thread(target=guarded, args=(lambda view=view, number=number: command(view, number),))
        for number, view in enumerate(stores[2:])
    ]
    for thread in (*readers, *commanders):
        thread.start()
    for thread in commanders:
        thread.join(120)
    release.set()
    for task in held:
        task.result(timeout=60)
    settle(session)
    stop.set()
    for thread in readers:
        thread.join(60)
    assert failures == []
    assert len(answers) == 20
    assert all(ok for ok, _ in answers), answers
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2] == {task.id: "completed" for task in held}
    commands = session.commands()
    assert len(commands) == 20
    assert commands.ok.all()
    for view in stores:
        view.close()
