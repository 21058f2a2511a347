"""The monitor with a scripted probe on a fake clock, and behind a ring that another process writes."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import wiseflow_nb
from wiseflow_nb.config import Settings, load_settings
from wiseflow_nb.errors import UsageError
from wiseflow_nb.records import AlertState, AlertTransition, EventRecord, Limits, Sample, Severity
from wiseflow_nb.resources import ResourceMonitor, _disk
from wiseflow_nb.resources._ring import RingReader, RingWriter
from wiseflow_nb.testing import FakeClock, ScriptedProbe

LIMITS = Limits(1e9, 2.0, "test", "test")


def test_an_alert_is_logged_published_called_back_then_followed(caplog: pytest.LogCaptureFixture) -> None:
    clock, order, done = FakeClock(), [], threading.Event()
    probe = ScriptedProbe([Sample(cpu_utilization_ratio=0.99)], LIMITS)
    settings = Settings(alert_for_seconds=0, resource_check_interval=1.0)
    monitor = ResourceMonitor(settings, probe=probe, clock=clock)

    def failing(transition: object) -> None:
        order.append("failing callback")
        raise RuntimeError("a user's mistake")

    monitor.bus.subscribe(lambda event: order.append("event"))
    monitor.add_callback(failing)
    monitor.add_callback(lambda transition: order.append("callback"))
    monitor.after_callbacks = lambda transition: (order.append("resize"), done.set())
    with caplog.at_level(logging.INFO, "wiseflow_nb.alerts"), monitor:
        assert done.wait(10)
        assert order == ["event", "failing callback", "callback", "resize"]
        assert caplog.records[0].levelname == "ERROR"
        assert monitor.callback_failures == 1
        assert [alert.resource for alert in monitor.alerts] == ["cpu"]
    assert order[4:] == ["event", "failing callback", "callback", "resize"]
    assert monitor.alerts == ()
    assert len(monitor.history()) >= 1


def test_the_thread_count_explains_itself() -> None:
    probe = ScriptedProbe([Sample(cpu_utilization_ratio=0.1)], LIMITS)
    monitor = ResourceMonitor(Settings(), probe=probe, clock=FakeClock())
    decision = monitor.calculate_optimal_thread_count(pending=5, workers=2)
    assert decision.target == 4
    assert decision.reason


def transition(number: int = 0, kind: str = "fired") -> AlertTransition:
    states = (AlertState.PENDING, AlertState.FIRING) if kind == "fired" else (AlertState.RECOVERING, AlertState.OK)
    severity = Severity.WARNING if kind == "fired" else Severity.NONE
    return AlertTransition(f"a{number}", "r", "cpu", kind, *states, severity, 0.8, 0.7, 0.8, 1.0, 2.0, "said")


class FailingProbe(ScriptedProbe):
    """Fails at first, as a mistake in a user's probe would."""

    def __init__(self, failures: int) -> None:
        super().__init__([Sample(cpu_utilization_ratio=0.1)], LIMITS)
        self.failures = failures
        self.worked = threading.Event()

    def read(self, **stamps: object) -> Sample:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("a mistake in the probe")
        self.worked.set()
        return super().read(**stamps)


def test_the_sampler_outlives_a_probe_that_raises_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    clock, probe, events = FakeClock(), FailingProbe(3), []
    monitor = ResourceMonitor(Settings(resource_check_interval=1.0), probe=probe, clock=clock)
    monitor.bus.subscribe(events.append)
    with monitor:
        while not probe.worked.wait(0.005):
            clock.advance(1.0)
    assert monitor.sampler_failures == 3
    assert [event.kind for event in events] == ["sampler_failed"]
    assert "RuntimeError: a mistake in the probe" in events[0].message
    assert len([record for record in caplog.records if record.exc_info]) == 1


class HangingProbe(ScriptedProbe):
    """Hangs, as a look at a file system that is gone does."""

    def __init__(self) -> None:
        super().__init__([Sample(cpu_utilization_ratio=0.99)], LIMITS)
        self.entered, self.release, self.left = threading.Event(), threading.Event(), threading.Event()

    def read(self, **stamps: object) -> Sample:
        self.entered.set()
        self.release.wait(30)
        self.left.set()
        return super().read(**stamps)


def test_stop_leaves_a_hanging_reading_behind() -> None:
    probe = HangingProbe()
    monitor = ResourceMonitor(Settings(alert_for_seconds=0), probe=probe, clock=FakeClock())
    heard: list[AlertTransition] = []
    monitor.add_callback(heard.append)
    monitor.start()
    sampler = monitor._thread
    assert probe.entered.wait(10)
    monitor.stop(timeout=0.05)
    probe.release.set()
    assert probe.left.wait(10)
    sampler.join(10)
    assert not sampler.is_alive()
    assert heard == []
    assert monitor.latest() is None


def test_it_follows_a_ring_that_appears_later_and_takes_alerts_from_outside(tmp_path: Path) -> None:
    path, heard, done = str(tmp_path / "ring"), [], threading.Event()
    monitor = ResourceMonitor(Settings(), probe=ScriptedProbe([Sample()], LIMITS), ring_path=path)
    monitor.after_callbacks = lambda item: (heard.append(item.kind), done.set() if len(heard) == 2 else None)
    with monitor:
        assert monitor.latest() is None
        assert monitor.history().empty
        writer = RingWriter(path)
        for at in range(5):
            writer.append(Sample(time_seconds=float(at), monotonic_seconds=float(at), disk_read_bytes_total=at * 10.0))
        assert monitor.latest().time_seconds == 4.0
        assert list(monitor.rows(3.0)[:, 0]) == [3.0, 4.0]
        part = monitor.history(since=1.0, until="1970-01-01T00:00:03", rates=True)
        assert list(part.time_seconds) == [1.0, 2.0, 3.0]
        assert (part.disk_read_bytes_per_second == 10.0).all()
        monitor.deliver(transition())
        monitor.deliver(transition(kind="resolved"))
        assert done.wait(10)
    writer.close()
    assert heard == ["fired", "resolved"]
    assert monitor.alerts == ()


def test_what_does_not_fit_the_queue_is_counted_and_the_rest_arrives() -> None:
    monitor = ResourceMonitor(Settings(), probe=ScriptedProbe([Sample()], LIMITS), ring_path="/nowhere/ring")
    heard: list[AlertTransition] = []
    monitor.add_callback(heard.append)
    for number in range(1005):
        monitor.deliver(transition(number))
    assert monitor.dropped_transitions == 5
    with monitor:
        pass
    assert len(heard) == 1000


def test_it_can_be_started_again_and_a_bound_method_can_be_removed() -> None:
    class Listener:
        heard = 0

        def hear(self, item: AlertTransition) -> None:
            self.heard += 1

    listener, done = Listener(), threading.Event()
    monitor = ResourceMonitor(Settings(), probe=ScriptedProbe([Sample()], LIMITS), ring_path="/nowhere/ring")
    monitor.add_callback(listener.hear)
    monitor.remove_callback(listener.hear)
    for _ in range(2):
        with monitor:
            monitor.after_callbacks = lambda item: done.set()
            monitor.deliver(transition())
            assert done.wait(10)
        done.clear()
    assert listener.heard == 0


def test_new_settings_reach_the_rules_and_the_watched_path(tmp_path: Path) -> None:
    clock, fired = FakeClock(), threading.Event()
    probe = ScriptedProbe([Sample(cpu_utilization_ratio=0.5)], LIMITS)
    monitor = ResourceMonitor(Settings(alert_for_seconds=0), probe=probe, clock=clock)
    monitor.after_callbacks = lambda item: fired.set()
    with monitor:
        monitor.apply_settings(Settings(alert_for_seconds=0, cpu_threshold=40, resource_check_interval=1.0))
        while not fired.wait(0.005):
            clock.advance(1.0)
        assert monitor.alerts[0].resource == "cpu"
    own = ResourceMonitor(Settings())
    own.apply_settings(Settings(disk_path=str(tmp_path / "missing")))
    assert own.sample_now().filesystem_size_bytes != own.sample_now().filesystem_size_bytes
    own.stop()


def test_the_thread_count_goes_by_the_newest_limits(tmp_path: Path) -> None:
    path = str(tmp_path / "ring")
    writer = RingWriter(path)
    writer.append(Sample(cpu_limit_cores=0.5, cpu_utilization_ratio=0.1))
    monitor = ResourceMonitor(Settings(), probe=ScriptedProbe([Sample()], LIMITS), ring_path=path)
    assert monitor.calculate_optimal_thread_count(pending=8, workers=2).target == 2
    writer.close()


def test_events_of_the_probe_reach_the_bus() -> None:
    class Telling(ScriptedProbe):
        def take_events(self) -> list[EventRecord]:
            return [EventRecord(1.0, "probe_failed", "load cannot be read")]

    heard = threading.Event()
    monitor = ResourceMonitor(Settings(), probe=Telling([Sample()], LIMITS), clock=FakeClock())
    monitor.bus.subscribe(lambda event: heard.set() if event.kind == "probe_failed" else None)
    with monitor:
        assert heard.wait(10)


def alone(settings: Settings | None = None, **sample: float) -> tuple[FakeClock, ResourceMonitor]:
    clock = FakeClock()
    given = Settings(resource_check_interval=1.0) if settings is None else settings
    return clock, ResourceMonitor(given, probe=ScriptedProbe([Sample(**sample)], LIMITS), clock=clock)


def until(clock: FakeClock, done: threading.Event, step: float = 1.0) -> None:
    for _ in range(20_000):
        if done.wait(0.002):
            return
        clock.advance(step)
    raise AssertionError("what was waited for did not come")


def test_a_rule_of_the_users_on_a_column_is_judged_and_ends_with_its_removal() -> None:
    clock, monitor = alone(process_open_fds=800.0)
    told: dict[str, AlertTransition] = {}
    fired, resolved = threading.Event(), threading.Event()

    def hear(item: AlertTransition) -> None:
        told[item.kind] = item
        (fired if item.kind == "fired" else resolved).set()

    monitor.add_callback(hear)
    monitor.add_rule("many files", "process_open_fds", warning=500, critical=900, for_seconds=3, resource="descriptors")
    with monitor:
        until(clock, fired)
        assert told["fired"].severity is Severity.WARNING
        assert told["fired"].message == "descriptors at 800 fds is warning (from 500 fds, fired)"
        assert monitor.remove_rule("many files")
        assert resolved.wait(10)
        assert not monitor.remove_rule("many files")
    frame = monitor.alert_history()
    assert list(frame.kind) == ["fired", "resolved"]
    assert str(frame.index.tz) == "UTC"


def test_a_rule_of_the_users_may_be_a_function_with_words_of_its_own() -> None:
    clock, monitor = alone(system_load1=12.0)
    told, fired = [], threading.Event()
    monitor.add_callback(lambda item: (told.append(item), fired.set()))
    monitor.add_rule(
        "queue",
        lambda sample: (sample.system_load1, "the backlog is over there"),
        warning=10,
        for_seconds=2,
        unit="jobs",
    )
    with monitor:
        until(clock, fired)
        assert told[0].message == "queue at 12 jobs is warning (from 10 jobs, fired): the backlog is over there"
        assert monitor.alerts[0].alert_id == told[0].alert_id
        assert monitor.acknowledge(told[0].alert_id)
        assert monitor.silence(told[0].alert_id, 60.0)
        assert not monitor.acknowledge("nobody")
    assert [item.kind for item in told] == ["fired", "resolved"]


def test_a_function_that_raises_is_told_once_and_does_not_stop_the_others() -> None:
    clock, monitor = alone(system_load1=12.0)
    fired, both, failed = threading.Event(), threading.Event(), []

    def hear(event: EventRecord) -> None:
        if event.kind == "rule_failed":
            failed.append(event.message)
            if len(failed) == 2:
                both.set()

    monitor.bus.subscribe(hear)
    monitor.add_callback(lambda item: fired.set() if item.rule == "load" else None)
    monitor.add_rule("broken", lambda sample: 1 / 0, warning=1)
    monitor.add_rule("words", lambda sample: "many", warning=1)
    monitor.add_rule("load", lambda sample: sample.system_load1, warning=10, for_seconds=3)
    with monitor:
        until(clock, fired)
        until(clock, both)
    # Each on a thread of its own: in any order.
    assert len(failed) == 2
    assert any("'broken' failed: ZeroDivisionError" in message for message in failed)
    assert not {item.rule for item in monitor.transitions()} & {"broken", "words"}
    assert monitor.rule_failures >= 2


def test_a_function_that_hangs_stops_its_own_rule_alone_is_told_once_and_judged_again() -> None:
    clock, monitor = alone(system_load1=12.0)
    events, release, entered, hung = [], threading.Event(), threading.Event(), threading.Event()
    fired = {name: threading.Event() for name in ("load", "stuck")}

    def stuck(sample: Sample) -> float:
        entered.set()
        release.wait(60)
        return 5.0

    monitor.bus.subscribe(lambda event: (events.append(event), hung.set() if event.kind == "rule_hangs" else None))
    monitor.add_callback(lambda item: fired[item.rule].set() if item.kind == "fired" and item.rule in fired else None)
    monitor.add_rule("stuck", stuck, warning=1, for_seconds=0)
    with monitor:
        assert entered.wait(10)
        # Added while the other hangs, and judged all the same.
        monitor.add_rule("load", lambda sample: sample.system_load1, warning=10, for_seconds=3)
        until(clock, fired["load"])
        until(clock, hung)
        for _ in range(100):
            clock.advance(1.0)
        assert not fired["stuck"].is_set()
        release.set()
        until(clock, fired["stuck"])
    told = [event.message for event in events if event.kind == "rule_hangs"]
    assert told == [
        "the function of alert rule 'stuck' has run for 30 s; the rule is judged again when it returns",
    ]
    assert (monitor.rule_hangs, monitor.rule_failures) == (1, 0)


def test_a_function_without_a_thread_is_told_once_and_judged_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, monitor = alone(system_load1=12.0)
    events, told, fired, refused = [], threading.Event(), threading.Event(), []
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "wiseflow-rule-load" and len(refused) < 3:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monitor.bus.subscribe(lambda event: (events.append(event), told.set() if event.kind == "rule_failed" else None))
    monitor.add_callback(lambda item: fired.set() if item.kind == "fired" and item.rule == "load" else None)
    monitor.add_rule("load", lambda sample: sample.system_load1, warning=10, for_seconds=0)
    with monitor:
        until(clock, told)
        until(clock, fired)
    assert len(refused) == 3
    assert [event.message for event in events if event.kind == "rule_failed"] == [
        "the function of alert rule 'load' has no thread (can't start new thread); it is tried with each sample"
    ]


def test_stop_leaves_a_hanging_function_behind_and_a_new_start_judges_its_rule_anew() -> None:
    clock, monitor = alone(system_load1=12.0)
    release, entered, fired, calls = threading.Event(), threading.Event(), threading.Event(), []

    def stuck(sample: Sample) -> float:
        calls.append(sample)
        entered.set()
        if len(calls) == 1:
            release.wait(60)
        return 5.0

    monitor.add_callback(lambda item: fired.set() if item.rule == "stuck" else None)
    monitor.add_rule("stuck", stuck, warning=1, for_seconds=0)
    monitor.start()
    assert entered.wait(10)
    monitor.stop(timeout=0.05)
    with monitor:
        until(clock, fired)
        assert "stuck" in [view.rule for view in monitor.alerts]
    release.set()
    assert [item.kind for item in monitor.transitions() if item.rule == "stuck"] == ["fired", "resolved"]


def test_durations_that_a_rule_leaves_open_go_by_the_settings_also_later() -> None:
    _, monitor = alone(Settings(alert_for_seconds=7, alert_keep_seconds=70))
    monitor.add_rule("load", "system_load1", warning=1, keep_seconds=9)
    monitor.add_rule("words", lambda sample: 5.0, warning=1, for_seconds=3)
    changed = Settings(alert_for_seconds=1, alert_keep_seconds=2, alert_clear_factor=0.5, alert_repeat_seconds=60)
    monitor.apply_settings(changed)
    rule = monitor.plan().rules[0]
    assert (rule.for_seconds, rule.keep_seconds, rule.clear_factor, rule.repeat_seconds) == (1, 9, 0.5, 60)
    judged = monitor._functions._engine._rules["words", "words"]
    assert (judged.for_seconds, judged.keep_seconds, judged.repeat_seconds) == (3, 2, 60)


def test_what_a_probe_cannot_tell_is_told_once_and_counted_each_time() -> None:
    class Mute(ScriptedProbe):
        enough = threading.Event()

        def take_events(self) -> list[EventRecord]:
            if self.reads >= 4:
                self.enough.set()
            raise KeyError("events")

        def close(self) -> None:
            raise OSError("closing")

    clock, events = FakeClock(), []
    probe = Mute([Sample(cpu_utilization_ratio=0.1)], LIMITS)
    monitor = ResourceMonitor(Settings(resource_check_interval=1.0), probe=probe, clock=clock)
    monitor.bus.subscribe(events.append)
    with monitor:
        until(clock, probe.enough)
    told = [event.message.split(":")[:2] for event in events if event.kind == "sampler_failed"]
    assert told == [
        ["what failed in the probe could not be told", " KeyError"],
        ["the probe cannot be closed", " OSError"],
    ]
    assert monitor.sampler_failures == len(monitor._kept) + 1 >= 5


def test_an_acknowledged_alert_is_shown_so_until_it_ends() -> None:
    _, monitor = alone()
    monitor.add_rule("words", lambda sample: 5.0, warning=1, critical=9, for_seconds=0)
    engine = monitor._functions._engine
    for item in engine.judge({("words", "words"): 5.0}, now=1.0, wall=1.0):
        monitor.deliver(item)
    (view,) = monitor.alerts
    assert not view.acknowledged
    assert monitor.acknowledge(view.alert_id)
    assert monitor.alerts[0].acknowledged
    # A worse one is the same alert.
    for item in engine.judge({("words", "words"): 10.0}, now=2.0, wall=2.0):
        monitor.deliver(item)
    assert [(item.severity, item.acknowledged) for item in monitor.alerts] == [(Severity.CRITICAL, True)]
    for item in engine.finish(3.0):
        monitor.deliver(item)
    assert monitor.alerts == ()
    monitor.mark_acknowledged(view.alert_id)
    assert monitor.alerts == ()


@pytest.mark.parametrize("seconds", [math.nan, -5, -0.001, math.inf, True, "60"])
def test_an_alert_is_not_silenced_for_what_is_no_time(seconds: float) -> None:
    _, monitor = alone()
    with pytest.raises(UsageError, match=r"cannot be silenced for .* give a finite number from 0 on"):
        monitor.silence("anything", seconds)


def test_a_history_says_where_it_comes_from() -> None:
    _, monitor = alone()
    assert monitor.history().attrs["version"] == wiseflow_nb.__version__
    assert monitor.history().attrs["probe_path"] == monitor.probe_path == "custom"
    own = ResourceMonitor(Settings())
    assert own.history().attrs["probe_path"] == ("linux files" if sys.platform == "linux" else "psutil")


_FORK = """
import os, signal
from wiseflow_nb.config import Settings
from wiseflow_nb.resources import ResourceMonitor

fixed = os.getpid()
alone, given = ResourceMonitor(Settings(resource_check_interval=0.05)), ResourceMonitor(Settings(), pid=fixed)
alone.start()
while alone.latest() is None:
    pass
locks = [alone._probe.lock, given._probe.lock, alone._functions._lock, alone._announcer._lock]
for lock in locks:  # as a thread in the middle of a reading holds it
    lock.acquire()
child = os.fork()
if child == 0:
    signal.alarm(30)
    try:
        assert alone.latest() is None and len(alone.rows()) == 0 and alone.alerts == ()
        sample = alone.sample_now()
        assert sample.process_count == 1, sample.process_count
        # The parent has a child, this one itself.
        assert given.sample_now().process_count == 2
        with alone:
            alone.add_rule("files", "process_open_fds", warning=1)
            while alone.latest() is None:
                pass
        assert alone._probe._probe.pid == os.getpid()
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
    os._exit(1)
for lock in locks:
    lock.release()
assert os.waitpid(child, 0)[1] == 0
alone.stop()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_a_forked_child_a_monitor_works_and_watches_the_child() -> None:
    subprocess.run([sys.executable, "-c", _FORK], check=True, timeout=60)


def test_a_rule_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    _, monitor = alone()
    with pytest.raises(UsageError, match="column 'no_such_column'"):
        monitor.add_rule("bad", "no_such_column", warning=1)
    with pytest.raises(UsageError, match="neither a column's name nor a function"):
        monitor.add_rule("bad", 5, warning=1)  # type: ignore[arg-type]
    assert monitor.plan().rules == ()


def test_a_rule_takes_the_place_of_a_built_in_one_and_its_defaults_from_the_settings() -> None:
    _, monitor = alone(Settings(alert_for_seconds=7, alert_keep_seconds=70))
    rule = monitor.add_rule("cpu high", "cpu_utilization_ratio", warning=0.5, resource="cpu")
    assert (rule.for_seconds, rule.keep_seconds, rule.unit) == (7, 70, "ratio")
    assert [item.warning for item in monitor.plan().all_rules() if item.name == "cpu high"] == [0.5]


def test_callbacks_are_timed_and_counted_and_need_not_be_hashable() -> None:
    clock, monitor = alone(cpu_utilization_ratio=0.99)

    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, item: AlertTransition) -> None:
            clock.advance(3.0)

    def failing(item: AlertTransition) -> None:
        raise ValueError("no")

    monitor.add_callback(Unhashable())
    monitor.add_callback(failing)
    done = threading.Event()
    monitor.after_callbacks = lambda item: done.set()
    with monitor:
        until(clock, done)
    slow, bad = monitor.callback_stats()
    assert (slow.name, slow.failures, bad.failures) == ("Unhashable", 0, bad.calls)
    assert slow.longest_seconds >= 3.0
    assert slow.seconds_total == pytest.approx(slow.calls * 3.0, abs=slow.calls * 1.0)
    assert bad.calls >= 2


def test_a_silenced_move_calls_nobody_and_is_kept() -> None:
    monitor = ResourceMonitor(Settings(), probe=ScriptedProbe([Sample()], LIMITS), ring_path="/nowhere/ring")
    heard, events = [], []
    monitor.bus.subscribe(events.append)
    monitor.add_callback(lambda item: heard.append(item.kind))
    with monitor:
        monitor.deliver(transition())
        monitor.deliver(replace(transition(kind="escalated"), silenced=True))
        monitor.deliver(transition(kind="resolved"))
    assert heard == ["fired", "resolved"]
    assert [item.kind for item in monitor.transitions()] == ["fired", "escalated", "resolved"]
    assert len(events) == 3


def test_alone_it_samples_faster_while_somebody_works_or_looks() -> None:
    clock = FakeClock()
    monitor = ResourceMonitor(Settings(), probe=ScriptedProbe([Sample()], LIMITS), clock=clock)
    monitor.set_busy(True)
    with monitor:
        assert monitor._sampler is not None
        assert monitor._sampler.interval(clock.monotonic()) == 1.0
        monitor.set_busy(False)
        assert monitor._sampler.interval(clock.monotonic()) == 10.0
        monitor.watch(5.0)
        assert monitor._sampler.interval(clock.monotonic()) == 1.0
        clock.advance(6.0)
        assert monitor._sampler.interval(clock.monotonic()) == 10.0


def test_a_callback_that_hangs_or_exits_holds_up_no_announcement() -> None:
    monitor = ResourceMonitor(Settings(), probe=ScriptedProbe([Sample()], LIMITS), ring_path="/nowhere/ring")
    gate, published, told = threading.Event(), threading.Event(), []

    def publish(event: EventRecord) -> None:
        told.append(event.message)
        if len(told) == 3:
            published.set()
        raise SystemExit  # as bad as a subscriber can be

    def hang(item: AlertTransition) -> None:
        gate.wait(30)
        raise SystemExit

    heard: list[str] = []
    monitor.bus.subscribe(publish)
    monitor.add_callback(hang)
    monitor.add_callback(lambda item: heard.append(item.alert_id))
    with monitor:
        for number in range(3):
            monitor.deliver(transition(number))
        assert published.wait(10)
        assert heard == []
        gate.set()
    assert heard == ["a0", "a1", "a2"]
    assert monitor.callback_failures == 3


def test_a_callback_that_hangs_is_told_of_once() -> None:
    clock = FakeClock()
    monitor = ResourceMonitor(
        Settings(), probe=ScriptedProbe([Sample()], LIMITS), ring_path="/nowhere/ring", clock=clock
    )
    gate, began, events = threading.Event(), threading.Event(), []
    last = threading.Event()

    def hang(item: AlertTransition) -> None:
        began.set()
        gate.wait(30)

    monitor.bus.subscribe(lambda event: (events.append(event), last.set() if "last" in event.message else None))
    monitor.add_callback(hang)
    with monitor:
        monitor.deliver(transition(0))
        assert began.wait(10)
        clock.advance(31.0)
        monitor.deliver(transition(1))
        monitor.deliver(replace(transition(2), message="the last"))
        assert last.wait(10)
        gate.set()
    assert [event.kind for event in events].count("callback_hangs") == 1


def test_what_cannot_be_called_is_no_callback() -> None:
    _, monitor = alone()
    with pytest.raises(UsageError, match="alert callback 5 cannot be called"):
        monitor.add_callback(5)  # type: ignore[arg-type]


def test_a_function_takes_the_place_of_a_rule_of_its_name_and_resource_and_of_no_other() -> None:
    _, monitor = alone()
    monitor.add_rule("lag", "process_count", warning=1, resource="db")
    monitor.add_rule("lag", "process_count", warning=1, resource="proc")
    monitor.add_rule("lag", lambda sample: 0.0, warning=1, resource="db")
    monitor.add_rule("cpu high", lambda sample: 0.0, warning=1, resource="cpu")
    plan = monitor.plan()
    assert [(rule.name, rule.resource) for rule in plan.rules] == [("lag", "proc")]
    assert ("cpu high", "cpu") not in {(rule.name, rule.resource) for rule in plan.all_rules()}
    monitor.add_rule("lag", "process_count", warning=1, resource="db")
    assert ("lag", "db") not in monitor.plan().replaced
    assert monitor.remove_rule("cpu high")
    assert ("cpu high", "cpu") in {(rule.name, rule.resource) for rule in monitor.plan().all_rules()}


def test_a_probe_that_exits_does_not_end_the_sampling() -> None:
    class Exiting(FailingProbe):
        def read(self, **stamps: object) -> Sample:
            if self.failures:
                self.failures -= 1
                raise SystemExit
            return super().read(**stamps)

    clock, probe = FakeClock(), Exiting(2)
    monitor = ResourceMonitor(Settings(resource_check_interval=1.0), probe=probe, clock=clock)
    with monitor:
        until(clock, probe.worked)
    assert monitor.sampler_failures == 2


def hung() -> tuple[ResourceMonitor, Callable[[AlertTransition], None], threading.Event, threading.Thread]:
    """A monitor whose callback hangs, that callback, what releases it, and the thread that calls."""
    monitor = ResourceMonitor(Settings(), probe=ScriptedProbe([Sample()], LIMITS), ring_path="/nowhere/ring")
    gate, entered = threading.Event(), threading.Event()

    def hang(item: AlertTransition) -> None:
        entered.set()
        gate.wait(60)

    monitor.add_callback(hang)
    monitor.start()
    monitor.deliver(transition(0))
    assert entered.wait(10)
    return monitor, hang, gate, monitor._announcer._threads[1]


def test_after_a_callback_that_hung_at_stop_a_new_start_calls_the_others_and_loses_nothing() -> None:
    monitor, hang, gate, stuck = hung()
    heard: list[str] = []
    done = threading.Event()

    def hear(item: AlertTransition) -> None:
        heard.append(item.alert_id)
        if len(heard) == 2:
            done.set()

    monitor.deliver(transition(1))
    monitor.stop(timeout=0.05)
    monitor.remove_callback(hang)
    monitor.add_callback(hear)
    with monitor:
        monitor.deliver(transition(2))
        assert done.wait(10)
        assert stuck.is_alive()
        gate.set()
        stuck.join(10)
        assert not stuck.is_alive()
    assert heard == ["a1", "a2"]


def test_a_thread_that_was_left_behind_with_a_full_queue_ends_all_the_same() -> None:
    monitor, _, gate, stuck = hung()
    for number in range(1, 1200):
        while monitor._announcer._queue.qsize() > 500:
            gate.wait(0.001)
        monitor.deliver(transition(number))
    while monitor.dropped_transitions < 199:
        gate.wait(0.001)
    monitor.stop(timeout=0.05)
    gate.set()
    stuck.join(10)
    assert not stuck.is_alive()


def test_the_time_between_stop_and_start_is_a_gap() -> None:
    clock, monitor = alone()
    for count in (1, 2):
        with monitor:
            # The first sample is taken at once.
            while len(monitor.rows()) < count:
                clock.wait(threading.Event(), 0.0)
        clock.advance(2.0)
    rows = [Sample(*row) for row in monitor.rows()]
    assert [row.gap for row in rows] == [0.0, 1.0]
    assert [row.interval_seconds == row.interval_seconds for row in rows] == [False, False]


@pytest.mark.parametrize("look", [ResourceMonitor.latest, ResourceMonitor.rows])
def test_a_stop_takes_the_ring_from_nobody_who_reads_it(
    look: Callable[[ResourceMonitor], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "ring")
    writer = RingWriter(path)
    writer.append(Sample(time_seconds=1.0))
    monitor = ResourceMonitor(Settings(), probe=ScriptedProbe([Sample()], LIMITS), ring_path=path).start()
    assert monitor.latest() is not None
    counts = RingReader.count.fget

    def stopped_meanwhile(ring: RingReader) -> int:
        monitor.stop()
        return counts(ring)

    monkeypatch.setattr(RingReader, "count", property(stopped_meanwhile))
    assert look(monitor) is not None
    writer.close()


def test_a_stop_between_two_looks_at_the_ring_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "ring")
    writer = RingWriter(path)
    writer.append(Sample(time_seconds=1.0))
    monitor = ResourceMonitor(Settings(), probe=ScriptedProbe([Sample()], LIMITS), ring_path=path).start()
    assert monitor.latest() is not None
    monkeypatch.setattr(RingReader, "was_replaced", lambda ring: monitor.stop())
    assert monitor.latest() is not None
    writer.close()


def test_a_name_forges_no_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    monitor = ResourceMonitor(Settings(), probe=ScriptedProbe([Sample()], LIMITS), ring_path="/nowhere/ring")
    forged = "cpu\nERROR all is lost\x1b[31m" + "x" * 5000
    with caplog.at_level(logging.INFO, "wiseflow_nb.alerts"), monitor:
        monitor.deliver(replace(transition(), message=forged))
        monitor.deliver(replace(transition(kind="resolved"), message=forged))
    for record in caplog.records:
        assert record.message.startswith("cpu ERROR all is lost [31mxxx")
        assert len(record.message) <= 1000
    assert len(caplog.records) == 2
    assert monitor.transitions()[0].message == forged


def test_alone_a_file_system_that_hangs_is_told_and_sampling_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, told = threading.Event(), threading.Event()

    def space(path: str, portable: bool) -> tuple[float, float, float]:
        answers.wait(60)
        return 1.0, 1.0, 0.0

    monkeypatch.setattr(_disk, "space", space)
    monkeypatch.setattr("wiseflow_nb.resources.monitor.PATIENCE_SECONDS", 0.05)
    events: list[EventRecord] = []
    monitor = ResourceMonitor(load_settings({"resource_check_interval": 0.05, "disk_path": "/far"}))
    monitor.bus.subscribe(lambda event: (events.append(event), told.set()))
    with monitor:
        assert told.wait(60)
        sample = monitor.sample_now()
        assert math.isnan(sample.filesystem_utilization_ratio)
        assert sample.process_memory_rss_bytes > 0
        answers.set()
    assert events[0].kind == "probe_failed"
    assert "disk space of /far" in events[0].message
