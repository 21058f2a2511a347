"""The sampling loop on a fake clock: cadence, gaps, errors, and a whole day of it."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from wiseflow_nb.clock import Clock
from wiseflow_nb.config import Settings
from wiseflow_nb.records import TIER_RETENTION_SECONDS, AlertTransition, EventRecord, Limits, Sample
from wiseflow_nb.resources._probe import Probe
from wiseflow_nb.resources._ring import RingReader, RingWriter
from wiseflow_nb.resources._rules import AlertPlan, AlertRule
from wiseflow_nb.resources._sampler import LAST_SECONDS, NO_EVENTS, NO_PROCESSES, Sampler, SamplingPlan
from wiseflow_nb.resources.monitor import ResourceMonitor
from wiseflow_nb.store.paths import DATABASE_NAME, RING_NAME
from wiseflow_nb.store.writer import StoreWriter
from wiseflow_nb.testing import FakeClock, ScriptedProbe
from wiseflow_nb.view import StoreView

LIMITS = Limits(1e9, 2.0, "test", "test")
PLAN = SamplingPlan(alerts=AlertPlan({"cpu": (0.72, 0.9)}))


class Heard:
    """What a sampler said."""

    def __init__(self, clock: Clock, plan: SamplingPlan = PLAN, samples: list[Sample] | None = None) -> None:
        self.samples: list[Sample] = []
        self.alerts: list[AlertTransition] = []
        self.events: list[EventRecord] = []
        self.errors: list[Exception] = []
        self.probe = ScriptedProbe(samples or [Sample(cpu_utilization_ratio=0.1)], LIMITS)
        self.sampler = Sampler(
            self.probe,
            self.samples.append,
            plan,
            clock,
            on_sample=lambda sample: None,
            on_alert=self.alerts.append,
            on_event=self.events.append,
            on_error=lambda what, error, first: self.errors.append(error),
        )


def drive(sampler: Sampler, clock: FakeClock, seconds: float) -> None:
    """Let the loop run for so long; each wait is skipped."""
    end = clock.monotonic() + seconds
    while (left := sampler.turn()) is not None and clock.monotonic() + left <= end:
        clock.advance(left)
    clock.advance(max(end - clock.monotonic(), 0.0))


def times(heard: Heard) -> list[float]:
    return [sample.monotonic_seconds - 1000.0 for sample in heard.samples]


def test_idle_busy_and_watched_cadence() -> None:
    clock = FakeClock()
    heard = Heard(clock)
    drive(heard.sampler, clock, 20.0)
    assert times(heard) == [0, 10, 20]
    heard.sampler.set_busy(True)
    drive(heard.sampler, clock, 3.0)
    assert times(heard)[3:] == [21, 22, 23]
    heard.sampler.set_busy(False)
    drive(heard.sampler, clock, 12.0)
    assert times(heard)[6:] == [24, 34]
    heard.sampler.watch(5.0)
    drive(heard.sampler, clock, 20.0)
    assert times(heard)[8:] == [36, 37, 38, 39, 40, 50]
    assert not any(sample.gap for sample in heard.samples)


def test_of_two_leases_the_longer_counts_and_a_renewal_goes_on() -> None:
    clock = FakeClock()
    heard = Heard(clock)
    heard.sampler.watch(2.0)
    heard.sampler.watch(10.0)
    heard.sampler.watch(3.0)
    drive(heard.sampler, clock, 9.0)
    heard.sampler.watch(10.0)
    drive(heard.sampler, clock, 9.0)
    assert times(heard) == list(range(19))


def test_an_explicit_interval_is_honoured_always() -> None:
    clock = FakeClock()
    heard = Heard(clock, replace(PLAN, idle_interval=7.0, interval_is_explicit=True))
    heard.sampler.set_busy(True)
    heard.sampler.watch(60.0)
    drive(heard.sampler, clock, 21.0)
    assert times(heard) == [0, 7, 14, 21]


def test_a_new_plan_holds_from_the_next_sample_and_is_stamped() -> None:
    clock = FakeClock()
    heard = Heard(clock, samples=[Sample(cpu_utilization_ratio=0.5)])
    drive(heard.sampler, clock, 10.0)
    rule = AlertRule("half", "cpu", "cpu_utilization_ratio", 0.5, 0.9, for_seconds=0)
    heard.sampler.configure(replace(PLAN, idle_interval=2.0, rules=(rule,), revision=3))
    drive(heard.sampler, clock, 4.0)
    assert times(heard) == [0, 10, 12, 14]
    assert [sample.settings_revision for sample in heard.samples] == [0, 0, 3, 3]
    assert [(item.rule, item.kind) for item in heard.alerts] == [("half", "fired")]
    heard.sampler.configure(replace(PLAN, revision=4))
    assert [item.kind for item in heard.alerts] == ["fired", "resolved"]


def test_a_suspended_machine_is_one_gap() -> None:
    clock = FakeClock()
    heard = Heard(clock, samples=[Sample(cpu_utilization_ratio=0.95)])
    heard.sampler.set_busy(True)
    drive(heard.sampler, clock, 3.0)
    clock.advance(3600.0)
    drive(heard.sampler, clock, 3.0)
    assert [sample.gap for sample in heard.samples] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert heard.alerts == []


def test_a_monotonic_clock_that_stands_still_while_suspended_hides_no_gap() -> None:
    clock = FakeClock()
    heard = Heard(clock)
    heard.sampler.set_busy(True)
    drive(heard.sampler, clock, 2.0)
    clock.set_back(-3600.0)
    drive(heard.sampler, clock, 2.0)
    assert [sample.gap for sample in heard.samples] == [0, 0, 0, 1, 0]


def test_the_first_sample_of_a_sampler_that_takes_over_ends_a_gap() -> None:
    clock = FakeClock()
    probe, kept = ScriptedProbe([Sample()], LIMITS), []
    sampler = Sampler(
        probe,
        kept.append,
        PLAN,
        clock,
        on_sample=lambda _: None,
        on_alert=lambda _: None,
        on_event=lambda _: None,
        resumed=True,
    )
    drive(sampler, clock, 20.0)
    assert [sample.gap for sample in kept] == [1, 0, 0]


def test_a_wall_clock_set_back_is_no_gap() -> None:
    clock = FakeClock()
    heard = Heard(clock)
    drive(heard.sampler, clock, 20.0)
    clock.set_back(3600.0)
    drive(heard.sampler, clock, 20.0)
    assert not any(sample.gap for sample in heard.samples)


def test_missed_ticks_are_skipped_never_made_up_for() -> None:
    clock = FakeClock()
    heard = Heard(clock)
    heard.sampler.set_busy(True)
    drive(heard.sampler, clock, 1.0)
    clock.advance(7.3)
    drive(heard.sampler, clock, 1.7)
    assert times(heard) == pytest.approx([0, 1, 8.3, 9, 10])


def test_the_last_words_come_fast_and_end_by_themselves() -> None:
    clock = FakeClock()
    heard = Heard(clock)
    drive(heard.sampler, clock, 10.0)
    heard.sampler.last_words()
    drive(heard.sampler, clock, 60.0)
    assert 10 + LAST_SECONDS <= times(heard)[-1] < 10 + LAST_SECONDS + 0.2
    assert len(times(heard)) == pytest.approx(2 + LAST_SECONDS / 0.1, abs=2)


def test_a_probe_that_raises_is_told_of_and_its_time_counts_as_a_gap() -> None:
    clock = FakeClock()
    heard = Heard(clock)
    heard.sampler.set_busy(True)
    drive(heard.sampler, clock, 2.0)
    read, heard.probe.read = heard.probe.read, lambda **stamps: 1 / 0  # type: ignore[method-assign]
    drive(heard.sampler, clock, 5.0)
    heard.probe.read = read  # type: ignore[method-assign]
    drive(heard.sampler, clock, 1.0)
    assert [type(error) for error in heard.errors] == [ZeroDivisionError] * 5
    assert [sample.gap for sample in heard.samples] == [0, 0, 0, 1]
    heard.sampler._on_error = None
    heard.probe.read = lambda **stamps: 1 / 0  # type: ignore[method-assign]
    clock.advance(1.0)
    with pytest.raises(ZeroDivisionError):
        heard.sampler.turn()


def test_a_probe_that_cannot_tell_its_processes_or_events_loses_no_alert_and_no_sample() -> None:
    clock, told = FakeClock(), []
    heard = Heard(clock, samples=[Sample(cpu_utilization_ratio=0.95)])
    heard.probe.top_processes = lambda: [].pop()  # type: ignore[method-assign]
    heard.probe.take_events = lambda: 1 / 0  # type: ignore[method-assign]

    def raised(what: str, error: BaseException, first: bool) -> None:
        told.append((what, type(error), first))
        # Whoever hears of it may ask the sampler.
        assert not heard.sampler.acknowledge("nobody")

    heard.sampler._on_error = raised
    heard.sampler.set_busy(True)
    drive(heard.sampler, clock, 7.0)
    assert [(item.kind, item.top_processes) for item in heard.alerts] == [("fired", ())]
    assert [sample.gap for sample in heard.samples] == [0.0] * 8
    assert [item for item in told if item[0] == NO_PROCESSES] == [(NO_PROCESSES, IndexError, True)]
    assert [item for item in told if item[0] == NO_EVENTS] == [
        (NO_EVENTS, ZeroDivisionError, at == 0) for at in range(8)
    ]


def test_the_end_resolves_what_fires_and_a_late_reading_is_dropped() -> None:
    clock = FakeClock()
    heard = Heard(clock, samples=[Sample(cpu_utilization_ratio=0.95)])
    heard.sampler.set_busy(True)
    drive(heard.sampler, clock, 6.0)
    assert [view.resource for view in heard.sampler.active()] == ["cpu"]
    taken = len(heard.samples)
    heard.sampler.finish()
    clock.advance(1.0)
    heard.sampler.turn()
    heard.sampler.finish()
    assert [item.kind for item in heard.alerts] == ["fired", "resolved"]
    assert len(heard.samples) == taken
    heard.sampler.stop()
    assert heard.sampler.turn() is None


@pytest.mark.parametrize("back", [86_400.0, -86_400.0])
@pytest.mark.parametrize(("after", "silenced"), [(30.0, True), (70.0, False)])
def test_a_silence_lasts_as_long_as_was_asked_also_where_the_clock_is_set(
    back: float, after: float, silenced: bool
) -> None:
    clock = FakeClock()
    plan = replace(PLAN, alerts=AlertPlan({"cpu": (0.72, 0.9)}, for_seconds=0))
    levels = [Sample(cpu_utilization_ratio=0.8)] * 100 + [Sample(cpu_utilization_ratio=0.95)]
    heard = Heard(clock, plan, levels)
    heard.sampler.turn()
    (alert,) = heard.alerts
    assert heard.sampler.silence(alert.alert_id, clock.time() + 60.0)
    clock.set_back(back)
    drive(heard.sampler, clock, after)
    heard.probe.reads = 100
    drive(heard.sampler, clock, 20.0)
    assert [(item.kind, item.silenced) for item in heard.alerts] == [("fired", False), ("escalated", silenced)]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_a_day_of_sampling_with_dashboards_coming_and_going(tmp_path: Path) -> None:
    """A real probe, a real ring, a real file, real readers; only time is made up."""
    clock = FakeClock()
    directory = tmp_path / "session"
    directory.mkdir(mode=0o700)
    writer = StoreWriter(directory / DATABASE_NAME)
    ring = RingWriter(str(directory / RING_NAME))
    writer.meta("session_id", "a-day")
    writer.meta("started_seconds", clock.time())
    writer.commit()
    probe = Probe(os.getpid(), str(tmp_path))
    heard: deque[AlertTransition] = deque(maxlen=100)
    sampler = Sampler(
        probe, ring.append, PLAN, clock, on_sample=writer.sample, on_alert=heard.append, on_event=lambda event: None
    )
    threads = threading.active_count()
    blocks: list[int] = []
    resident: list[int] = []
    opened: list[int] = []
    looks = 0
    for hour in range(24):
        writer.meta("heartbeat", clock.time())
        for visit in range(4):
            # A dashboard looks for five minutes in every quarter of an hour, the session is idle else.
            view = StoreView(directory, clock=clock)
            for _ in range(5 if visit else 0):
                sampler.watch(60.0)
                drive(sampler, clock, 60.0)
                writer.write_blocks(partial=True)
                writer.commit()
                view.snapshot()
                times, _ = view.series(["cpu_utilization_ratio"], clock.time() - 3600.0, 600)
                looks += len(times) > 0
            view.close()
            drive(sampler, clock, 600.0 if visit else 900.0)
        writer.write_blocks(partial=True)
        while writer.forget_samples(clock.monotonic(), TIER_RETENTION_SECONDS):
            pass
        writer.commit()
        gc.collect()
        if hour >= 3:
            blocks.append(sys.getallocatedblocks())
            resident.append(psutil.Process().memory_info().rss)
            opened.append(descriptors())
    assert looks == 24 * 15
    assert threading.active_count() == threads
    assert len(set(opened)) == 1
    # An object a sample kept would be 20,000 of them.
    assert max(blocks) - blocks[0] < 5_000
    assert max(resident) - resident[0] < 32e6
    # 15 minutes of each hour at 1 Hz, the rest each 10 s.
    assert ring.count == pytest.approx(24 * (15 * 60 + 45 * 6), rel=0.02)
    reader = RingReader(str(directory / RING_NAME))
    _, rows = reader.read(0)
    assert len(rows) == ring.capacity - 1 or len(rows) == ring.capacity
    reader.close()
    sampler.finish()
    probe.close()
    ring.close()
    writer.close()


def test_monitors_that_come_and_go_leave_no_thread_and_no_descriptor(tmp_path: Path) -> None:
    settings = Settings(resource_check_interval=0.1, disk_path=str(tmp_path))

    def come_and_go(times: int) -> None:
        for _ in range(times):
            with ResourceMonitor(settings) as monitor:
                monitor.add_callback(lambda alert: None)
                monitor.add_rule("of a function", lambda sample: 1.0, warning=2.0)
                monitor.watch(1.0)
                deadline = time.monotonic() + 30
                while len(monitor.rows()) < 2:
                    assert time.monotonic() < deadline, "no samples came"
                    time.sleep(0.005)

    come_and_go(2)
    gc.collect()
    before = {thread.name for thread in threading.enumerate()}, descriptors()
    come_and_go(25)
    gc.collect()
    assert ({thread.name for thread in threading.enumerate()}, descriptors()) == before


def test_many_rules_in_a_row_cost_one_plan() -> None:
    clock = FakeClock()
    heard = Heard(clock)
    drive(heard.sampler, clock, 20.0)
    taken: list[int] = []
    for number in range(300):
        heard.sampler.soon(lambda number=number: taken.append(number))
    assert taken == []
    # Before the sample that is due next, and on the sampling thread.
    count = len(heard.samples)
    heard.sampler.turn()
    assert taken == [299]
    assert len(heard.samples) == count
    heard.sampler.turn()
    assert taken == [299]


def test_a_rule_that_is_added_alone_is_judged_from_the_next_sample_on() -> None:
    clock = FakeClock()
    heard = Heard(clock)
    monitor = ResourceMonitor(Settings(), probe=heard.probe, clock=clock)
    monitor._sampler = heard.sampler
    drive(heard.sampler, clock, 20.0)
    monitor.add_rule("any", "cpu_utilization_ratio", warning=0.05, for_seconds=0)
    drive(heard.sampler, clock, 10.0)
    assert [(item.rule, item.kind) for item in heard.alerts] == [("any", "fired")]
    monitor.remove_rule("any")
    heard.sampler.turn()
    assert [(item.rule, item.kind) for item in heard.alerts[1:]] == [("any", "resolved")]
