"""One probe for several threads, and for a forked child that inherits it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from wiseflow_nb.records import NAN, EventRecord, Limits, Sample
from wiseflow_nb.resources._probe import Probe
from wiseflow_nb.resources._sampler import SampleSource

#: The way of a probe that the user gave.
CUSTOM = "custom"


class SharedProbe:
    """A probe that the sampling loop and ``sample_now`` take turns with.

    ``make`` makes another one in a forked child: the parent's may have been in the middle of a reading.
    One that cannot be made anew (the user's) is used on.
    """

    def __init__(self, probe: SampleSource, make: Callable[[], Probe] | None) -> None:
        self._probe: SampleSource | None = probe
        self._make = make
        self.lock = threading.Lock()

    def after_fork(self) -> None:
        """In a forked child: nobody is reading."""
        self.lock = threading.Lock()
        if self._make is not None:
            # Made when it is first used: a fork must not become dear.
            self._probe = None

    def _now(self) -> SampleSource:
        if self._probe is None:
            assert self._make is not None
            self._probe = self._make()
        return self._probe

    @property
    def limits(self) -> Limits:
        """The effective limits, as of the probe's last look."""
        # Without the lock, if it is there: a reading that hangs must not hold this up.
        if (probe := self._probe) is None:
            with self.lock:
                probe = self._now()
        return probe.limits

    @property
    def path(self) -> str:
        """Which way the figures come; see ``Probe.path``."""
        if self._make is None:
            return CUSTOM
        if (probe := self._probe) is None:
            with self.lock:
                probe = self._now()
        return probe.path if isinstance(probe, Probe) else CUSTOM

    def follow(self, disk_path: str) -> None:
        """Watch another path, if it is our own probe."""
        if isinstance(self._probe, Probe) and self._make is not None:
            self._probe.disk_path = disk_path

    def read(self, **stamps: Any) -> Sample:
        """Return a reading."""
        with self.lock:
            return self._now().read(**stamps)

    def read_now(self, time_seconds: float, monotonic_seconds: float, rest: bool = False) -> Sample:
        """Return a reading that leaves the rates of ``read`` alone; of a user's probe, one like any other.

        ``rest``: nobody else reads, so leave no thread behind.
        """
        with self.lock:
            probe = self._now()
            if isinstance(probe, Probe):
                found = probe.read_now(time_seconds=time_seconds, monotonic_seconds=monotonic_seconds)
                if rest:
                    probe.rest()
                return found
            return probe.read(
                time_seconds=time_seconds, monotonic_seconds=monotonic_seconds, interval_seconds=NAN, gap=False
            )

    def top_processes(self, count: int = 3) -> tuple[tuple[int, str, float, float], ...]:
        """Return the largest processes."""
        with self.lock:
            return self._now().top_processes(count)

    def take_events(self) -> list[EventRecord]:
        """Return what failed or works again."""
        with self.lock:
            return self._now().take_events()

    def close(self) -> None:
        """Close the probe's files."""
        if self._probe is not None:
            self._probe.close()
