"""The CPU time of one piece of work after the other on a thread."""

from __future__ import annotations

import time

#: A step shorter than this counts its wall time as CPU time: it cannot have been off the CPU for longer.
SHORT_SECONDS = 50e-6
#: So old may the reading of the thread's CPU clock be that a longer step is measured against.
STALE_SECONDS = 250e-6


class CpuGauge:
    """The CPU time of one step after the other on the thread that made this.

    The thread's CPU clock is a system call, which costs more than a small step itself; so it is read
    after each longer step, and for short ones only as often as keeps the last reading fresh. A step's
    figure is never less than what it took, never more than its wall time, and at most
    ``STALE_SECONDS`` over what it took.
    """

    __slots__ = ("_cpu", "_read", "wall")

    def __init__(self) -> None:
        self._cpu = time.thread_time()
        self.wall = self._read = time.monotonic()

    def start(self) -> float:
        """A step begins after a pause; return the moment (monotonic seconds)."""
        self.wall = now = time.monotonic()
        if now - self._read > STALE_SECONDS:
            self._cpu, self._read = time.thread_time(), now
        return now

    def step(self) -> float:
        """A step ends and the next begins; return the CPU seconds of the one that ended."""
        now = time.monotonic()
        spent = now - self.wall
        self.wall = now
        if spent >= SHORT_SECONDS or now - self._read > STALE_SECONDS:
            before, self._cpu, self._read = self._cpu, time.thread_time(), now
            return min(spent, self._cpu - before)
        return spent
