"""Alerts through a whole session: judged by the recorder, recorded, answered from another process' view."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from wiseflow_nb.config import load_settings
from wiseflow_nb.errors import UsageError
from wiseflow_nb.recorder.client import RecorderClient
from wiseflow_nb.recorder.protocol import RecorderSettings
from wiseflow_nb.records import AlertTransition
from wiseflow_nb.session import Session, open_session
from wiseflow_nb.view import StoreView


def wait_until(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)


@pytest.fixture(params=[True, False], ids=["process", "thread"])
def session(request: pytest.FixtureRequest):
    settings = load_settings({"resource_check_interval": 0.05, "recorder_enabled": request.param, "audit_interval": 0})
    with Session(settings, title="alerted") as opened:
        yield opened


def heard(session: Session) -> dict[str, threading.Event]:
    events = {kind: threading.Event() for kind in ("fired", "escalated", "de-escalated", "repeated", "resolved")}
    session.monitor.add_callback(lambda item: events[item.kind].set() if item.rule == "mine" else None)
    return events


def test_a_users_rule_on_a_column_is_judged_by_the_recorder_and_recorded(session: Session) -> None:
    events = heard(session)
    session.monitor.add_rule("mine", "process_count", warning=1, for_seconds=0, keep_seconds=0, repeat_seconds=0.2)
    assert events["fired"].wait(20)
    assert events["repeated"].wait(20)
    session.sync()
    view = StoreView(session.directory)
    (alert,) = [item for item in view.snapshot().alerts if item.rule == "mine"]
    assert view.silence(alert.alert_id, 60).ok
    assert view.acknowledge(alert.alert_id).ok
    wait_until(lambda: next(item for item in view.snapshot().alerts if item.rule == "mine").acknowledged)
    wait_until(lambda: [item.acknowledged for item in session.monitor.alerts if item.rule == "mine"] == [True])
    view.close()
    session.monitor.remove_rule("mine")
    assert events["resolved"].wait(20)
    session.sync()
    frame = session.alert_history()
    assert {"fired", "repeated", "resolved"} <= set(frame[frame.rule == "mine"].kind)
    assert len(set(frame[frame.rule == "mine"].alert_id)) == 1


def test_a_rule_with_a_function_is_recorded_and_answered_all_the_same(session: Session) -> None:
    events = heard(session)
    session.monitor.add_rule("mine", lambda sample: (5.0, "said by a function"), warning=1, for_seconds=0)
    assert events["fired"].wait(20)
    session.sync()
    view = StoreView(session.directory)
    wait_until(lambda: any(item.rule == "mine" for item in view.snapshot().alerts))
    (alert,) = [item for item in view.snapshot().alerts if item.rule == "mine"]
    assert "said by a function" in alert.message
    assert view.acknowledge(alert.alert_id).ok
    wait_until(lambda: next(item for item in view.snapshot().alerts if item.rule == "mine").acknowledged)
    assert session.view.silence(alert.alert_id, 60).ok
    wait_until(lambda: [item.acknowledged for item in session.monitor.alerts if item.rule == "mine"] == [True])
    refused = view.acknowledge("no-such-alert")
    assert not refused.ok
    assert "no open alert" in refused.message
    assert not session.view.acknowledge("no-such-alert").ok
    view.close()
    number = session.id
    session.close()
    ended = open_session(number)
    frame = ended.alert_history()
    assert list(frame[frame.rule == "mine"].kind) == ["fired", "resolved"]
    ended.close()


def test_a_function_that_fails_is_on_record_and_a_wrong_argument_harms_nothing(session: Session) -> None:
    with pytest.raises(UsageError, match="phrase=7"):
        session.monitor.add_rule("bad", "process_count", warning=1, phrase=7)  # type: ignore[arg-type]
    session.monitor.add_rule("broken", lambda sample: 1 / 0, warning=1)

    def recorded() -> bool:
        session.sync()
        return "rule_failed" in set(session.events().kind)

    wait_until(recorded)
    before = session.monitor.latest()
    wait_until(lambda: session.monitor.latest() != before)
    assert "recorder_restarted" not in set(session.events().kind)


def test_a_task_that_does_not_stop_is_told_as_stalled(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wiseflow_nb.tasks._stalled.CANCELLING_SECONDS", 0.2)
    told, gate, started = [], threading.Event(), threading.Event()
    session.monitor.add_callback(lambda item: told.append(item) if item.rule == "task stalled" else None)

    def deaf() -> None:
        started.set()
        gate.wait(30)

    task = session.tasks.options(name="deaf").submit(deaf)
    assert started.wait(20)
    task.cancel()
    wait_until(lambda: [item.kind for item in told] == ["fired"])
    assert "'deaf' (t1) was asked to stop" in told[0].message
    assert told[0].message.startswith("stalled tasks: 1 (warning, fired)")
    gate.set()
    wait_until(lambda: [item.kind for item in told] == ["fired", "resolved"])
    session.sync()
    assert set(session.alert_history().rule) == {"task stalled"}


def test_an_audit_finds_a_task_whose_cleanup_failed(session: Session) -> None:
    assert session.audit().empty

    def work() -> None:
        raise ValueError("no")

    def cleanup() -> None:
        raise OSError("still held")

    task = session.tasks.options(cleanup=cleanup).submit(work)
    assert isinstance(task.exception(20), ValueError)
    wait_until(lambda: not session.audit().empty)
    assert session.audit().kind.tolist() == ["cleanup"]
    session.audit()
    session.sync()
    told = session.events()
    assert (told.kind == "audit").sum() == 1


def test_the_rules_outlive_a_recorder_that_is_replaced() -> None:
    with Session(title="replaced", resource_check_interval=0.05) as session:
        told: list[AlertTransition] = []
        session.monitor.add_callback(told.append)
        session.monitor.add_rule("mine", "process_count", warning=1, for_seconds=0)
        wait_until(lambda: any(item.rule == "mine" for item in told))
        first = session.recorder.pid
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: session.recorder.pid != first)
        wait_until(lambda: [item.kind for item in told if item.rule == "mine"] == ["fired", "resolved", "fired"])
        assert len({item.alert_id for item in told if item.rule == "mine"}) == 2
    view = open_session(session.id)
    frame = view.alert_history()
    assert list(frame[frame.rule == "mine"].kind) == ["fired", "resolved", "fired", "resolved"]
    view.close()


def test_the_recorder_is_told_once_of_many_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    real = RecorderClient.configure

    def counted(self: RecorderClient, settings: RecorderSettings) -> None:
        told.append(len(settings.plan.rules))
        real(self, settings)

    monkeypatch.setattr(RecorderClient, "configure", counted)
    session = Session()
    for number in range(100):
        session.monitor.add_rule(f"rule {number}", "process_open_fds", warning=1e9)
    assert told == []
    with session:
        assert told == [100]
        session.monitor.add_rule("one more", "process_open_fds", warning=1e9)
        # What is asked for later finds it told.
        assert session.recorder.sync()
        assert told == [100, 101]
