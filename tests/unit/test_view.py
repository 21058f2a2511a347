"""One conformance suite for both views: in this process, and through the file."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from wiseflow_nb.errors import SessionNotFoundError, UsageError
from wiseflow_nb.records import AlertState, AlertTransition, CellRecord, Sample, SessionState, Severity, TaskState
from wiseflow_nb.session import Session, current_session, open_session, sessions, start_default
from wiseflow_nb.view import StoreView, alert_views, default_view


def wait_until(condition, timeout: float = 15.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.01)


@pytest.fixture
def session() -> Iterator[Session]:
    with Session(title="conformance", resource_check_interval=0.05) as made:
        yield made


@pytest.fixture(params=["local", "store"])
def view(session: Session, request: pytest.FixtureRequest):
    made = session.view if request.param == "local" else StoreView(session.directory)
    yield made
    made.close()


def test_a_snapshot_tells_of_tasks_pool_settings_and_samples(session: Session, view) -> None:
    session.tasks.options(name="one", priority="high").submit(sum, [1, 2]).result(timeout=10)
    wait_until(lambda: view.snapshot().task_counts.get("completed") == 1)
    wait_until(lambda: view.snapshot().sample is not None)
    shot = view.snapshot()
    assert shot.info.state is SessionState.LIVE
    assert shot.info.title == "conformance"
    assert [(task.name, task.state, task.priority.name) for task in shot.tasks] == [("one", "completed", "HIGH")]
    assert shot.settings["cpu_threshold"] == 90.0
    assert "dashboard_token" not in shot.settings
    assert shot.thresholds["memory"] == (0.68, 0.85)
    assert shot.sample.memory_limit_bytes > 0
    wait_until(lambda: view.snapshot().pool.max_workers == 8)


def test_only_what_changed_comes_again(session: Session, view) -> None:
    session.tasks.submit(int).result(timeout=10)
    wait_until(lambda: view.snapshot().task_counts.get("completed") == 1)
    before = view.snapshot()
    assert view.snapshot(before.rev).tasks == ()
    session.tasks.options(name="second").submit(int).result(timeout=10)
    wait_until(lambda: view.snapshot().task_counts.get("completed") == 2)
    assert [task.name for task in view.snapshot(before.rev).tasks] == ["second"]


def test_both_views_tell_of_the_tasks_whose_records_only_the_file_keeps(session: Session) -> None:
    session.tasks._scheduler.ledger._kept = 5
    gate = threading.Event()
    waiting = session.tasks.options(name="old").submit(gate.wait)
    wait_until(lambda: waiting.state is TaskState.RUNNING)
    for number in range(30):
        session.tasks.options(name=f"n{number}").submit(int).result(timeout=10)
    assert session.sync()
    local, stored = session.view, StoreView(session.directory)
    assert len(session.task_records()) == 6
    assert local.snapshot().task_counts == stored.snapshot().task_counts == {"completed": 30, "running": 1}
    assert local.snapshot().tasks == stored.snapshot().tasks
    assert local.task("t2") == stored.task("t2") is not None
    assert local.task("nobody") is None
    assert local.task_history().equals(stored.task_history())
    assert len(local.task_history()) == 31
    assert local.task_records() == stored.task_records()
    for until in (None, 90, 60, 20, 3, 1):
        for limit in (1, 4, 7, 29, 100):
            assert local.task_records(until_rev=until, limit=limit) == stored.task_records(until_rev=until, limit=limit)
    gate.set()
    waiting.result(timeout=10)
    stored.close()


def test_sessions_of_every_directory_are_seen_and_opened(
    session: Session, view, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    elsewhere = tmp_path / "wiseflow_nb"
    with Session(title="elsewhere", state_dir=str(elsewhere)) as other:
        assert other.directory.parent != session.directory.parent
    assert session.sync()
    assert [info.session_id for info in view.sessions()] == [info.session_id for info in sessions()]
    assert {info.session_id for info in view.sessions()} == {session.id, other.id}
    opened = view.open(other.id)
    assert opened.snapshot().info.title == "elsewhere"
    back = opened.open(session.id)
    assert back.snapshot().info.title == "conformance"
    back.close()
    opened.close()


def test_the_answer_names_a_secret_setting_and_hides_its_value(session: Session, view) -> None:
    answer = session.view.configure({"dashboard_token": "sEcReT"})
    assert answer.message == "set DASHBOARD_TOKEN=(hidden)"
    assert session.sync()
    assert "sEcReT" not in view.commands().to_csv()


def test_a_secret_from_another_process_is_refused_and_nowhere_written(session: Session) -> None:
    with contextlib.closing(StoreView(session.directory)) as view:
        answer = view.configure({"WISEFLOW_DASHBOARD_TOKEN": "sEcReT", "cpu_threshold": 50})
        assert not answer.ok
        assert "DASHBOARD_TOKEN is secret" in answer.message
        assert "session.configure()" in answer.message
        assert "sEcReT" not in answer.message
        assert (session.settings.dashboard_token, session.settings.cpu_threshold) == ("", 90.0)
        assert view.commands().empty
    assert not any(b"sEcReT" in path.read_bytes() for path in session.directory.iterdir())
    # Should it come all the same, as from a recorder of an older version.
    relayed = session._asked("configure", {"changes": {"dashboard_token": "sEcReT"}}, "somebody")
    assert not relayed.ok
    assert "is secret" in relayed.message
    assert session.settings.dashboard_token == ""


def test_the_verbs(session: Session, view) -> None:
    release = threading.Event()
    held = [session.tasks.options(name=f"held {number}").submit(release.wait, 30) for number in range(8)]
    waiting = held[-1]
    wait_until(lambda: view.task(waiting.id) is not None)
    assert view.reprioritise(waiting.id, "critical").ok
    wait_until(lambda: view.task(waiting.id).priority.name == "CRITICAL")
    assert not view.reprioritise(waiting.id, "urgent").ok
    assert view.cancel(waiting.id).ok
    wait_until(lambda: view.task(waiting.id).state == "cancelled")
    assert not view.cancel(waiting.id).ok
    answer = view.retry(waiting.id)
    assert answer.ok, answer.message
    assert view.pause().ok
    wait_until(lambda: view.snapshot().paused)
    assert view.resume().ok
    assert view.resize(1, 3).ok
    assert session.settings.max_thread_workers == 3
    assert not view.resize(5, 3).ok
    assert not view.configure({"source": "x"}).ok
    assert not view.configure({"self": 1}).ok
    assert not view.configure({"state_dir": "/elsewhere"}).ok
    assert not view.silence("nothing", 10**400).ok
    wait_until(lambda: view.snapshot().sample is not None)
    assert view.configure({"disk_path": "/proc"}).ok
    wait_until(lambda: (view.snapshot().sample or Sample()).filesystem_size_bytes == 0.0)
    assert not view.acknowledge("nothing").ok
    view.watch(5)
    release.set()
    assert view.shutdown("drain").ok


def test_frames_and_chart_data(session: Session, view) -> None:
    session.tasks.options(name="framed").submit(int).result(timeout=10)
    wait_until(lambda: len(view.history()) > 3)
    session.sync()
    assert view.task_history().name.tolist() == ["framed"]
    assert "session_started" in set(view.events().kind)
    assert len(view.alert_history()) == 0
    assert len(view.cell_history()) == 0
    times, values = view.series(["cpu_utilization_ratio", "disk_read_bytes_per_second"], 0.0, 100)
    assert len(times) == len(values["cpu_utilization_ratio"]) == len(values["disk_read_bytes_per_second"]) > 2
    assert view.history(rates=True).attrs["limit_source"]
    cut = view.history().index[2]
    ranged = view.history(since=cut, rates=True)
    assert ranged.index[0] >= cut.floor("us")
    assert ranged.process_cpu_seconds_per_second.notna().all()
    assert [info.session_id for info in view.sessions()] == [session.id]


def test_tiers_summary_and_busiest_minutes(session: Session, view) -> None:
    release = threading.Event()
    session.tasks.options(name="framed").submit(release.wait, 60)
    wait_until(lambda: len(view.task_history()) == 1 and view.task_history().started.notna().all())
    wait_until(lambda: len(view.history()) > 3)
    made = view.history(since="-1h", resolution="10s")
    assert made.sample_count.sum() > 3
    told = {"session_id", "host", "limit_source", "version", "probe_path", "resolution_seconds", "tier"}
    assert told <= set(made.attrs)
    assert view.history().attrs["tier"] == "raw"
    with pytest.raises(UsageError, match="resolution 'fine' is unknown"):
        view.history(resolution="fine")
    summary = view.summary(since="-1h")
    assert summary.loc["memory_limit_bytes", "min"] > 0
    assert summary.loc["memory_utilization_ratio", "warning_seconds"] >= 0
    assert len(view.busiest(1, by="process_cpu_seconds_per_second")) == 1
    assert view.busiest(5, by="memory_working_set_bytes").tasks.explode().dropna().tolist().count("framed") >= 1
    release.set()
    number = session.id
    session.close()
    with contextlib.closing(open_session(number)) as over:
        ended = over.history(resolution="60s")
        assert ended.sample_count.sum() == len(over.history(resolution="raw").dropna(subset=["time_seconds"]))
        assert over._store().tier_starts()[0] == over._store().tier_starts()[2]


def test_alerts_fire_in_the_recorder_and_reach_callbacks_and_views() -> None:
    seen: list[AlertTransition] = []
    settings = {"resource_check_interval": 0.05, "alert_for_seconds": 0.0}
    with Session(title="alerting", **settings) as session:
        session.monitor.add_callback(seen.append)
        session.configure(memory_threshold=0.001)
        wait_until(lambda: any(item.resource == "memory" for item in seen))
        view = StoreView(session.directory)
        wait_until(lambda: any(alert.resource == "memory" for alert in view.snapshot().alerts))
        (alert,) = [item for item in view.snapshot().alerts if item.resource == "memory"]
        assert alert.severity is Severity.CRITICAL
        assert view.acknowledge(alert.alert_id).ok
        wait_until(lambda: [item for item in view.snapshot().alerts if item.acknowledged])
        # The CPU of a busy machine may be critical as well; either keeps the pool at its least.
        wait_until(lambda: "critical" in session.pool.status().reason)
        view.close()
        number = session.id
    view = open_session(number)
    kinds = [
        kind
        for kind, what in zip(view.alert_history().kind, view.alert_history().resource, strict=True)
        if what == "memory"
    ]
    assert kinds == ["fired", "resolved"]
    view.close()


def test_the_fold_of_transitions_into_alerts() -> None:
    def move(alert: str, kind: str, at: float, severity: Severity) -> AlertTransition:
        state = AlertState.OK if kind == "resolved" else AlertState.FIRING
        return AlertTransition(alert, "r", "cpu", kind, AlertState.OK, state, severity, 1, 1, 1, at, at, "m")

    views = alert_views(
        [
            move("a", "fired", 1, Severity.WARNING),
            move("a", "escalated", 2, Severity.CRITICAL),
            move("a", "resolved", 3, Severity.NONE),
            move("b", "fired", 4, Severity.WARNING),
        ],
        frozenset({"b"}),
    )
    assert [(view.alert_id, view.severity, view.acknowledged) for view in views] == [
        ("b", Severity.WARNING, True),
        ("a", Severity.CRITICAL, False),
    ]


def test_the_default_session_is_one_and_is_forgotten_when_closed() -> None:
    session = start_default(title="default")
    assert start_default() is session is current_session()
    other = default_view()
    assert other.snapshot().info.session_id == session.id
    other.close()
    session.close()
    assert current_session() is None
    assert not session.view.pause().ok
    with pytest.raises(SessionNotFoundError):
        open_session("20200101-000000-none")
    assert [info.state for info in sessions()] == [SessionState.ENDED]


def test_a_picture_marks_cells_and_alerts_and_a_summary_needs_no_more_than_the_session() -> None:
    with Session(title="drawn", resource_check_interval=0.05, audit_interval=0, alert_for_seconds=600) as session:
        fired = threading.Event()
        session.monitor.add_callback(lambda item: fired.set())
        session.monitor.add_rule("some", "process_count", resource="cpu", warning=1, for_seconds=0)
        started = session.now()
        session.cell_started(CellRecord("c1", 1, "x = 1", started))
        session.cell_finished(CellRecord("c1", 1, "x = 1", started, started + 0.1, 0.1, status="ok"))
        assert fired.wait(20)
        wait_until(lambda: len(session.history()) >= 5)
        session.sync()
        view = StoreView(session.directory)
        for drawn in (session.plot(), view.plot(theme="dark", since="-10min")):
            # Thresholds of three charts (two bands each), one alert, one cell.
            assert len(drawn.layout.shapes) == 3 * 2 + 2
        with pytest.raises(UsageError, match="theme='pink'"):
            session.plot(theme="pink")
        assert session.summary().loc["process_count", "min"] >= 1
        busy = view.busiest(1)
        assert busy.cells.tolist() == [(1,)]
        assert len(session.busiest(1, by="process_memory_rss_bytes")) == 1
        view.close()
