"""How many workers the resources allow: a pure function of what is seen now and of its own past.

Demand: no more workers than there is work for. Capacity: never outside the bounds, nor far more than
the effective cores can serve. Pressure: at a warning level a few less, at a critical level half; then
no more than what is left for a while, twice as long each time the same turns out to have been too
soon. Growth: only while CPU and memory are calm, at most to twice as many, and only as far as what
one worker was seen to cost (the slope over earlier growth) keeps both calm. Between calm and warning
lies a dead band in which nothing moves, so the size comes to rest instead of swinging.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

#: Threads mostly wait (files, network, code that gives up the interpreter lock).
THREADS_PER_CORE = 4.0
#: Growing is allowed below this share of the warning level.
CALM_SHARE = 0.9
#: One noisy reading of the CPU moves what is acted on by as much as this time constant lets it.
CPU_SMOOTHING_SECONDS = 4.0
#: What the CPU has been for a while says whether there is room for more.
CPU_STEADY_SECONDS = 20.0
#: Memory that rises is taken to go on rising so long.
MEMORY_OUTLOOK_SECONDS = 10.0
MEMORY_SMOOTHING_SECONDS = 4.0
#: After pressure, the size does not grow beyond what was left for so long; doubled up to the cap.
HOLD_SECONDS = 30.0
HOLD_CAP_SECONDS = 960.0
#: What costs less than this share costs nothing.
NO_COST = 1e-6
#: Without work for so long, the pool goes back to its least.
IDLE_SECONDS = 30.0
#: At a warning level, one worker in so many goes, and at least one.
WARNING_STEP = 8


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
    grow_cooldown_seconds: float = 5.0
    shrink_cooldown_seconds: float = 4.0

    @property
    def active(self) -> int:
        """Workers that have something to do."""
        return min(self.workers, self.pending)


@dataclass(frozen=True, slots=True)
class SizingPast:
    """What one decision hands to the next; None where nothing is known yet.

    ``mark_...`` is what was seen when the size last grew; ``..._per_worker`` what one more worker
    added since; ``proven`` the largest size that was busy and calm.
    """

    changed_seconds: float = -math.inf
    grew: bool = False
    seen_seconds: float | None = None
    cpu: float | None = None
    cpu_steady: float | None = None
    memory: float | None = None
    memory_trend: float = 0.0
    mark_active: int = 0
    mark_cpu: float | None = None
    mark_memory: float | None = None
    cpu_per_worker: float | None = None
    memory_per_worker: float | None = None
    ceiling: int | None = None
    ceiling_until_seconds: float = -math.inf
    hold_seconds: float = HOLD_SECONDS
    idle_since_seconds: float | None = None
    proven: int = 0


_FRESH = SizingPast()


@dataclass(frozen=True, slots=True)
class SizingDecision:
    """The target and why. ``pressure`` is none, warning or critical; ``past`` is for the next decision."""

    target: int
    reason: str
    pressure: str = "none"
    past: SizingPast = _FRESH

    def __index__(self) -> int:
        return self.target


def pressure_of(value: float, warning: float, critical: float) -> int:
    """Return 2 at or over critical, 1 at or over warning, 0 below or unknown."""
    if math.isnan(value):
        return 0
    return 2 if value >= critical else 1 if value >= warning else 0


def decide_workers(given: SizingInput, past: SizingPast = _FRESH) -> SizingDecision:
    """Return the number of workers to have now.

    Never outside ``min_workers..max_workers``. Same input and same past, same answer.

    Parameters
    ----------
    given
        What is seen now.
    past
        ``past`` of the decision before; without it, the first.

    Examples
    --------
    >>> calm = SizingInput(2.0, 0.1, 0.2, 0.72, 0.9, 0.68, 0.85, workers=2, pending=6,
    ...                    min_workers=2, max_workers=8, now_seconds=100.0)
    >>> first = decide_workers(calm)
    >>> first.target, first.reason
    (4, '6 waiting or running, resources are calm')
    """
    seen = _observe(given, past)
    target, reason, level = _choose(given, seen)
    return SizingDecision(target, reason, ("none", "warning", "critical")[level], _remember(given, seen, target, level))


# -- what is seen -----------------------------------------------------------------------------


def _observe(given: SizingInput, past: SizingPast) -> SizingPast:
    elapsed = 0.0 if past.seen_seconds is None else max(0.0, given.now_seconds - past.seen_seconds)
    cpu = _smoothed(past.cpu, given.cpu_utilization_ratio, elapsed, CPU_SMOOTHING_SECONDS)
    steady = _smoothed(past.cpu_steady, given.cpu_utilization_ratio, elapsed, CPU_STEADY_SECONDS)
    memory, trend = past.memory, past.memory_trend
    if math.isnan(given.memory_utilization_ratio):
        memory, trend = None, 0.0
    else:
        if memory is not None and elapsed > 0:
            rate = (given.memory_utilization_ratio - memory) / elapsed
            trend = _smoothed(trend, rate, elapsed, MEMORY_SMOOTHING_SECONDS) or 0.0
        memory = given.memory_utilization_ratio
    idle = None
    if given.pending <= 0:
        idle = given.now_seconds if past.idle_since_seconds is None else past.idle_since_seconds
    seen = replace(
        past,
        seen_seconds=given.now_seconds,
        cpu=cpu,
        cpu_steady=steady,
        memory=memory,
        memory_trend=trend,
        idle_since_seconds=idle,
    )
    # From the first look after growth: pressure may come before things have settled, and is the lesson.
    if past.grew and given.active > past.mark_active:
        more = given.active - past.mark_active
        seen = replace(
            seen,
            cpu_per_worker=_slope(cpu, past.mark_cpu, more, given.active, past.cpu_per_worker),
            memory_per_worker=_slope(memory, past.mark_memory, more, given.active, past.memory_per_worker),
        )
    return seen


def _smoothed(before: float | None, value: float, elapsed: float, constant: float) -> float | None:
    if math.isnan(value):
        return None
    if before is None:
        return value
    return before + (value - before) * (1.0 - math.exp(-elapsed / constant))


def _slope(now: float | None, then: float | None, more: int, active: int, known: float | None) -> float | None:
    if now is None or then is None:
        return known
    # No worker can have cost more than an equal share of all there is.
    return min(max(0.0, (now - then) / more), now / active)


# -- what to do -------------------------------------------------------------------------------


def _choose(given: SizingInput, seen: SizingPast) -> tuple[int, str, int]:
    low, high = given.min_workers, given.max_workers
    current = min(max(given.workers, low), high)
    if current != given.workers:
        return current, f"brought within the bounds {low}-{high}", 0
    since = given.now_seconds - seen.changed_seconds
    cpu = math.nan if seen.cpu is None else seen.cpu
    memory = pressure_of(given.memory_utilization_ratio, given.memory_warning_ratio, given.memory_critical_ratio)
    level = max(memory, pressure_of(cpu, given.cpu_warning_ratio, given.cpu_critical_ratio))
    if level:
        what, ratio = ("memory", given.memory_utilization_ratio) if memory == level else ("CPU", cpu)
        return (*_shrink(given, current, since, level, f"{what} at {ratio:.0%}"), level)
    capacity = high
    if not math.isnan(given.cpu_limit_cores):
        capacity = min(high, max(low, math.ceil(given.cpu_limit_cores * THREADS_PER_CORE)))
    if capacity < current:
        return capacity, f"{given.cpu_limit_cores:g} cores carry {capacity} threads", 0
    wanted = min(capacity, max(low, given.pending))
    if wanted > current:
        return (*_grow(given, seen, current, wanted, since), 0)
    if seen.idle_since_seconds is not None and current > low:
        if given.now_seconds - seen.idle_since_seconds >= IDLE_SECONDS:
            return low, "no work is waiting: back to the least", 0
        return current, "no work is waiting", 0
    return current, "enough workers for what is waiting", 0


def _shrink(given: SizingInput, current: int, since: float, level: int, phrase: str) -> tuple[int, str]:
    phrase = f"{phrase} is {('', 'warning', 'critical')[level]}"
    fewer = current // 2 if level == 2 else current - max(1, current // WARNING_STEP)
    wanted = max(given.min_workers, fewer)
    if wanted == current:
        return current, f"{phrase}; already at the least of {given.min_workers}"
    if since < given.shrink_cooldown_seconds:
        return current, f"{phrase}; waiting for the last change to take effect"
    return wanted, f"{phrase}: fewer workers"


def _grow(given: SizingInput, seen: SizingPast, current: int, wanted: int, since: float) -> tuple[int, str]:
    # Smoothed figures lag behind what the last growth did, and with noise a low one comes if one waits
    # for it long enough: so the highest counts.
    cpu = 0.0 if seen.cpu is None else max(seen.cpu, seen.cpu_steady or 0.0, given.cpu_utilization_ratio)
    cpu_room = math.inf if seen.cpu is None else given.cpu_warning_ratio * CALM_SHARE - cpu
    memory_room = math.inf
    if seen.memory is not None:
        ahead = seen.memory + max(0.0, seen.memory_trend) * MEMORY_OUTLOOK_SECONDS
        memory_room = given.memory_warning_ratio * CALM_SHARE - ahead
    if cpu_room < 0 or memory_room < 0:
        return current, f"{'CPU' if cpu_room < 0 else 'memory'} is close to its warning level: not growing"
    if since < given.grow_cooldown_seconds:
        return current, "waiting for the last change to take effect"
    if seen.ceiling is not None and given.now_seconds < seen.ceiling_until_seconds:
        wanted = min(wanted, seen.ceiling)
        if wanted <= current:
            left = seen.ceiling_until_seconds - given.now_seconds
            return current, f"more than {seen.ceiling} were too many; trying again in {left:.0f} s"
    by_cpu = _affordable(cpu_room, seen.cpu_per_worker)
    if cpu and given.active:
        # At worst all the CPU in use is these workers'. What was learned is trusted for twice what that
        # allows, since it was read with noise; where nothing is left, one more is a trial.
        by_cpu = min(by_cpu, max(1.0, 2.0 * _affordable(cpu_room, cpu / given.active)))
    by_memory = _affordable(memory_room, seen.memory_per_worker)
    if seen.memory_per_worker is None and seen.memory is not None and seen.memory > given.memory_warning_ratio / 2:
        by_memory = 1.0
    more = min(by_cpu, by_memory)
    if more < 1:
        what, ratio = ("memory", seen.memory) if by_memory < 1 else ("CPU", cpu)
        return current, f"{what} at {ratio:.0%}: one more would near the warning level"
    target = min(wanted, max(2 * current, seen.proven), current + more)
    return int(target), f"{given.pending} waiting or running, resources are calm"


def _affordable(room: float, cost: float | None) -> float:
    return math.inf if cost is None or cost < NO_COST or math.isinf(room) else math.floor(room / cost)


# -- what to remember -------------------------------------------------------------------------


def _remember(given: SizingInput, seen: SizingPast, target: int, level: int) -> SizingPast:
    now = given.now_seconds
    settled = now - seen.changed_seconds >= given.grow_cooldown_seconds
    if level == 0 and settled and given.active == given.workers and target >= given.workers:
        seen = replace(seen, proven=max(seen.proven, given.workers))
    if seen.ceiling is not None and now >= seen.ceiling_until_seconds + seen.hold_seconds and level == 0:
        # It held without pressure as long again: what was too many belongs to the past.
        seen = replace(seen, ceiling=None, hold_seconds=HOLD_SECONDS)
    if target == given.workers:
        return seen
    if target > given.workers:
        return replace(
            seen,
            changed_seconds=now,
            grew=True,
            cpu_steady=None,
            mark_active=given.active,
            mark_cpu=seen.cpu,
            mark_memory=seen.memory,
        )
    seen = replace(seen, changed_seconds=now, grew=False, cpu_steady=None)
    if level == 0:
        return seen
    hold = seen.hold_seconds
    if seen.ceiling is not None and now >= seen.ceiling_until_seconds:
        hold = min(HOLD_CAP_SECONDS, 2.0 * hold)
    return replace(
        seen, ceiling=target, ceiling_until_seconds=now + hold, hold_seconds=hold, proven=min(seen.proven, target)
    )
