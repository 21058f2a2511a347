"""Fakes for tests of code that uses wiseflow_nb: time that moves when told to, and more.

They are public: a test of a task with a time-out, or of an alert rule, needs no sleeping.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from wiseflow_nb.records import EventRecord, Limits, Sample


class FakeClock:
    """A ``Clock`` that stands still until ``advance`` is called.

    Examples
    --------
    >>> clock = FakeClock()
    >>> before = clock.monotonic()
    >>> clock.advance(5.0)
    >>> clock.monotonic() - before
    5.0
    """

    def __init__(self, start_seconds: float = 1_700_000_000.0) -> None:
        self._epoch = start_seconds
        self._elapsed = 0.0
        self._lock = threading.Lock()

    def time(self) -> float:
        """Seconds since the epoch on this clock."""
        return self._epoch + self._elapsed

    def monotonic(self) -> float:
        """Seconds since the clock was made, plus 1000 (so that zero never looks valid)."""
        return 1000.0 + self._elapsed

    def advance(self, seconds: float) -> None:
        """Move forward; whoever waits for a moment that has passed now goes on."""
        if seconds < 0:
            raise ValueError(f"cannot advance by {seconds!r} seconds; monotonic time never goes back")
        with self._lock:
            self._elapsed += seconds

    def set_back(self, seconds: float) -> None:
        """Set ``time()`` back, as an administrator would; ``monotonic()`` is not moved."""
        self._epoch -= seconds

    def wait(self, event: threading.Event, timeout: float | None) -> bool:
        """Block until the event is set or this clock has passed the timeout."""
        deadline = None if timeout is None else self.monotonic() + timeout
        # The event has no way to tell this clock; a short real wait stands in for it.
        while not event.wait(0.001):
            if deadline is not None and self.monotonic() >= deadline:
                return event.is_set()
        return True


class ScriptedProbe:
    """A probe that gives the samples it was given, the last one for ever.

    Examples
    --------
    >>> from wiseflow_nb.records import Limits, Sample
    >>> probe = ScriptedProbe([Sample(cpu_utilization_ratio=0.5)], Limits(1e9, 2.0, "test", "test"))
    >>> probe.read(time_seconds=1.0, monotonic_seconds=1.0, interval_seconds=1.0, gap=False).cpu_utilization_ratio
    0.5
    """

    def __init__(self, samples: Iterable[Sample], limits: Limits) -> None:
        self._samples = list(samples)
        self.limits = limits
        self.reads = 0

    def read(
        self,
        *,
        time_seconds: float,
        monotonic_seconds: float,
        interval_seconds: float,
        gap: bool,
        settings_revision: int = 0,
    ) -> Sample:
        """Return the next scripted sample, stamped."""
        sample = self._samples[min(self.reads, len(self._samples) - 1)]
        self.reads += 1
        return sample._replace(
            time_seconds=time_seconds,
            monotonic_seconds=monotonic_seconds,
            interval_seconds=interval_seconds,
            gap=float(gap),
            settings_revision=float(settings_revision),
        )

    def top_processes(self, count: int = 3) -> tuple[tuple[int, str, float, float], ...]:
        """No processes."""
        return ()

    def take_events(self) -> list[EventRecord]:
        """No events."""
        return []

    def close(self) -> None:
        """Nothing to close."""
