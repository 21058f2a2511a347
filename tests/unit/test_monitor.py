"""The probe on this machine, and the monitor with a scripted probe on a fake clock."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading

import pytest

from wiseflow_nb.config import Settings
from wiseflow_nb.records import Limits, Sample
from wiseflow_nb.resources import ResourceMonitor
from wiseflow_nb.resources._probe import Probe
from wiseflow_nb.testing import FakeClock, ScriptedProbe


def read(probe: Probe, at: float = 0.0) -> Sample:
    return probe.read(time_seconds=at, monotonic_seconds=at, interval_seconds=1.0, gap=False)


@pytest.mark.skipif(sys.platform != "linux", reason="compares Linux' own files with psutil")
def test_the_fast_path_and_the_portable_path_agree() -> None:
    fast, portable = Probe(os.getpid()), Probe(os.getpid(), portable=True)
    one, other = read(fast), read(portable)
    for name in ("memory_limit_bytes", "cpu_limit_cores", "system_memory_total_bytes", "filesystem_size_bytes"):
        assert getattr(one, name) == getattr(other, name)
    for name in ("process_count", "process_threads"):
        assert getattr(one, name) == getattr(other, name)
    for name in ("process_memory_rss_bytes", "system_memory_available_bytes", "disk_read_bytes_total"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=0.1, abs=1e6)
    fast.close()


def test_children_are_counted_and_their_time_stays_after_they_end() -> None:
    probe = Probe(os.getpid())
    code = "import sys, time\nt = time.process_time()\nwhile time.process_time() - t < 0.3: pass\nprint(1, flush=True)\nsys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline()
    with_child = read(probe)
    excluded = Probe(os.getpid(), exclude_pids=frozenset({child.pid}))
    assert with_child.process_count == read(excluded).process_count + 1
    child.communicate()
    after = read(probe)
    assert after.process_count == with_child.process_count - 1
    assert after.process_cpu_seconds_total >= with_child.process_cpu_seconds_total
    probe.close()
    excluded.close()


def test_the_first_reading_has_no_rate_and_a_lost_process_leaves_the_rest() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    probe = Probe(child.pid)
    first = read(probe)
    assert first.cpu_utilization_ratio != first.cpu_utilization_ratio
    assert first.process_memory_rss_bytes > 0
    child.communicate(b"\n")
    later = [read(probe, at) for at in (1.0, 2.0)]
    assert later[0].process_count != later[0].process_count
    assert later[0].system_memory_total_bytes == first.system_memory_total_bytes
    events = probe.take_events()
    assert [event.kind for event in events].count("probe_failed") == len(events) > 0
    assert probe.take_events() == []
    probe.close()


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
    assert decision.target == 5
    assert decision.reason
