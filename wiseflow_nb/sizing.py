"""How many workers the resources allow: a pure function, with its reason.

The rule has three parts. Capacity: never more workers than the bounds, nor far more than the
effective cores can serve. Demand: no more than there is work for. Pressure: while an alert fires,
step down at once (critical: halve, warning: one less); when the resources are calm again, grow
after a cool-down, but only so far that the CPU use, taken as proportional to the workers, stays
calm. The dead band between "calm" and "warning" keeps the size still.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Threads mostly wait (files, network, code that gives up the interpreter lock).
THREADS_PER_CORE = 4.0
#: Growing is allowed below this share of the warning level.
CALM_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class SizingInput:
    """What the decision is made from. Ratios are 0-1 (NaN: unknown); times are monotonic seconds."""

    cpu_limit_cores: float
    cpu_utilization_ratio: float
    memory_utilization_ratio: float
    cpu_warning_ratio: float
    cpu_critical_ratio: float
    memory_warning_ratio: float
    memory_critical_ratio: float
    workers: int
    pending: int
    min_workers: int
    max_workers: int
    now_seconds: float
    last_change_seconds: float = -math.inf
    grow_cooldown_seconds: float = 5.0
    shrink_cooldown_seconds: float = 2.0


@dataclass(frozen=True, slots=True)
class SizingDecision:
    """The target and why. ``pressure`` is none, warning or critical."""

    target: int
    reason: str
    pressure: str = "none"

    def __index__(self) -> int:
        return self.target


def pressure_of(value: float, warning: float, critical: float) -> int:
    """Return 2 at or over critical, 1 at or over warning, 0 below or unknown."""
    if math.isnan(value):
        return 0
    return 2 if value >= critical else 1 if value >= warning else 0


def decide_workers(given: SizingInput) -> SizingDecision:
    """Return the number of workers to have now.

    Never outside ``min_workers..max_workers``. Same input, same answer.

    Examples
    --------
    >>> calm = SizingInput(2.0, 0.1, 0.2, 0.72, 0.9, 0.68, 0.85, workers=2, pending=6,
    ...                    min_workers=2, max_workers=8, now_seconds=100.0)
    >>> decide_workers(calm).target
    8
    """
    low, high = given.min_workers, given.max_workers
    current = min(max(given.workers, low), high)
    if current != given.workers:
        return SizingDecision(current, f"brought within the bounds {low}-{high}")
    since = given.now_seconds - given.last_change_seconds
    memory = pressure_of(given.memory_utilization_ratio, given.memory_warning_ratio, given.memory_critical_ratio)
    cpu = pressure_of(given.cpu_utilization_ratio, given.cpu_warning_ratio, given.cpu_critical_ratio)
    level = max(memory, cpu)
    if level:
        what = "memory" if memory >= cpu else "CPU"
        ratio = given.memory_utilization_ratio if what == "memory" else given.cpu_utilization_ratio
        name = "critical" if level == 2 else "warning"
        wanted = max(low, current // 2 if level == 2 else current - 1)
        phrase = f"{what} at {ratio:.0%} is {name}"
        if wanted == current:
            return SizingDecision(current, f"{phrase}; already at the least of {low}", name)
        if since < given.shrink_cooldown_seconds:
            return SizingDecision(current, f"{phrase}; waiting for the last change to take effect", name)
        return SizingDecision(wanted, f"{phrase}: fewer workers", name)
    capacity = high
    if not math.isnan(given.cpu_limit_cores):
        capacity = min(high, max(low, math.ceil(given.cpu_limit_cores * THREADS_PER_CORE)))
    wanted = min(capacity, max(low, given.pending))
    if wanted <= current:
        if wanted < current and since >= given.grow_cooldown_seconds and given.pending == 0:
            return SizingDecision(wanted, "no work is waiting: back to the least")
        if wanted < current and capacity < current:
            return SizingDecision(capacity, f"{given.cpu_limit_cores:g} cores carry {capacity} threads")
        return SizingDecision(current, "enough workers for what is waiting")
    calm = not (
        given.cpu_utilization_ratio > given.cpu_warning_ratio * CALM_SHARE
        or given.memory_utilization_ratio > given.memory_warning_ratio * CALM_SHARE
    )
    if not calm:
        return SizingDecision(current, "close to a warning level: not growing")
    if since < given.grow_cooldown_seconds:
        return SizingDecision(current, "waiting for the last change to take effect")
    affordable = wanted
    if given.cpu_utilization_ratio > 0:
        affordable = math.floor(current * given.cpu_warning_ratio * CALM_SHARE / given.cpu_utilization_ratio)
    if affordable <= current:
        return SizingDecision(
            current, f"CPU at {given.cpu_utilization_ratio:.0%}: one more would near the warning level"
        )
    return SizingDecision(min(wanted, affordable), f"{given.pending} waiting or running, resources are calm")
