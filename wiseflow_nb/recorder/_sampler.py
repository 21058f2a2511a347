"""The sampling loop: an absolute schedule, the probe, the ring, the alert rules."""

from __future__ import annotations

import threading
from collections.abc import Callable

from wiseflow_nb.clock import Clock
from wiseflow_nb.recorder.protocol import RecorderSettings
from wiseflow_nb.records import NAN, AlertTransition, EventRecord, Sample
from wiseflow_nb.resources._alerts import AlertEngine, AlertRule, builtin_rules
from wiseflow_nb.resources._probe import Probe
from wiseflow_nb.resources._ring import RingWriter
from wiseflow_nb.resources._schedule import Schedule, is_gap

#: After the kernel's death: so often, for so long.
LAST_INTERVAL = 0.1
LAST_SECONDS = 2.0


def rules_of(settings: RecorderSettings) -> tuple[AlertRule, ...]:
    """The built-in rules at the settings' thresholds."""
    return builtin_rules(
        settings.thresholds, settings.alert_for_seconds, settings.alert_keep_seconds, settings.alert_clear_factor
    )


class Sampler:
    """Sample until stopped; other threads only set what the next turn reads.

    ``on_sample``, ``on_alert`` and ``on_event`` are called on the sampling thread and must return
    at once.
    """

    def __init__(
        self,
        probe: Probe,
        ring: RingWriter,
        settings: RecorderSettings,
        clock: Clock,
        on_sample: Callable[[Sample], None],
        on_alert: Callable[[AlertTransition], None],
        on_event: Callable[[EventRecord], None],
    ) -> None:
        self._probe = probe
        self._ring = ring
        self._clock = clock
        self._on_sample, self._on_alert, self._on_event = on_sample, on_alert, on_event
        self._engine_lock = threading.Lock()
        self._engine = AlertEngine(rules_of(settings))
        self._settings = settings
        self._busy = False
        self._watched_until = -1.0
        self._last_until: float | None = None
        self._wake = threading.Event()
        self._stop = False

    def interval(self, now: float) -> float:
        """The interval in force: explicit always, else the shortest that somebody needs."""
        settings = self._settings
        if self._last_until is not None:
            return min(LAST_INTERVAL, settings.idle_interval)
        if settings.interval_is_explicit:
            return settings.idle_interval
        wanted = self._busy or now < self._watched_until
        return min(settings.busy_interval, settings.idle_interval) if wanted else settings.idle_interval

    def set_busy(self, busy: bool) -> None:
        """A cell or a task runs (or none does any more)."""
        if busy != self._busy:
            self._busy = busy
            self._wake.set()

    def watch(self, seconds: float) -> None:
        """Somebody looks for so long."""
        now = self._clock.monotonic()
        was = now < self._watched_until
        self._watched_until = max(self._watched_until, now + seconds)
        if not was:
            self._wake.set()

    def configure(self, settings: RecorderSettings) -> None:
        """Take new settings; samples from now on carry their revision."""
        self._settings = settings
        self._probe.disk_path = settings.disk_path
        with self._engine_lock:
            closed = self._engine.replace_rules(rules_of(settings), self._clock.time())
        for transition in closed:
            self._on_alert(transition)
        self._wake.set()

    def acknowledge(self, alert_id: str) -> bool:
        """Acknowledge an open alert; return whether there is one with that id."""
        with self._engine_lock:
            return self._engine.acknowledge(alert_id)

    def silence(self, alert_id: str, until_seconds: float) -> bool:
        """Silence an open alert until a moment; return whether there is one with that id."""
        with self._engine_lock:
            return self._engine.silence(alert_id, until_seconds)

    def last_words(self) -> None:
        """The kernel is gone: sample a little longer (the counters of the container), then stop."""
        self._last_until = self._clock.monotonic() + LAST_SECONDS
        self._wake.set()

    def stop(self) -> None:
        """Stop at once."""
        self._stop = True
        self._wake.set()

    def run(self) -> None:
        """Sample until ``stop``; at the end every open alert is resolved."""
        clock = self._clock
        schedule = Schedule(clock.monotonic(), self.interval(clock.monotonic()))
        last, expected = NAN, 0.0
        while not self._stop:
            now = clock.monotonic()
            interval = self.interval(now)
            if interval != schedule.interval:
                schedule.set_interval(interval, now)
            expected = max(expected, interval)
            if now < schedule.deadline:
                if clock.wait(self._wake, schedule.deadline - now):
                    self._wake.clear()
                continue
            measured = now - last
            self._take(now, measured, measured == measured and is_gap(measured, expected))
            last, expected = now, interval
            schedule.advance(clock.monotonic())
            if self._last_until is not None and now >= self._last_until:
                break
        with self._engine_lock:
            resolved = self._engine.finish(clock.time())
        for transition in resolved:
            self._on_alert(transition)

    def _take(self, now: float, measured: float, gap: bool) -> None:
        sample = self._probe.read(
            time_seconds=self._clock.time(),
            monotonic_seconds=now,
            interval_seconds=measured,
            gap=gap,
            settings_revision=self._settings.revision,
        )
        self._ring.append(sample)
        self._on_sample(sample)
        with self._engine_lock:
            transitions = self._engine.observe(sample, self._probe.top_processes)
        for transition in transitions:
            self._on_alert(transition)
        for event in self._probe.take_events():
            self._on_event(event)
