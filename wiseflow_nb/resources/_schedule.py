"""An absolute schedule: ticks at start + k x interval, missed ones skipped, never in bursts."""

from __future__ import annotations

import math


class Schedule:
    """When the next sample is due. Monotonic seconds.

    Examples
    --------
    >>> schedule = Schedule(100.0, 1.0)
    >>> schedule.advance(100.0), schedule.deadline
    (0, 101.0)
    >>> schedule.advance(104.5), schedule.deadline
    (3, 105.0)
    """

    def __init__(self, start: float, interval: float) -> None:
        self.interval = interval
        self.deadline = start

    def advance(self, now: float) -> int:
        """Move to the first tick after ``now``; return how many were missed."""
        steps = max(1, math.floor((now - self.deadline) / self.interval) + 1)
        deadline = self.deadline + steps * self.interval
        if deadline <= now:  # the quotient was rounded down
            deadline += self.interval
        self.deadline = deadline
        return steps - 1

    def set_interval(self, interval: float, now: float) -> None:
        """Change the interval; the next tick is at most one new interval away."""
        if interval != self.interval:
            self.interval = interval
            self.deadline = min(self.deadline, now + interval)


def is_gap(measured_interval: float, interval: float) -> bool:
    """Whether so long between two samples means a suspended machine or a starved sampler."""
    return measured_interval > max(3.0 * interval, interval + 1.0)
