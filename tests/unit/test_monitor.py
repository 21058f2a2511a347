"""The monitor with a scripted probe on a fake clock, and behind a ring that another process writes."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from wiseflow_nb.config import Settings
from wiseflow_nb.records import AlertState, AlertTransition, EventRecord, Limits, Sample, Severity
from wiseflow_nb.resources import ResourceMonitor
from wiseflow_nb.resources._ring import RingWriter
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
    sampler = monitor._threads[1]
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
