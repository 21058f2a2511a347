"""Alert rules: what is watched, from where it is too much, and how long it must hold."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real

from wiseflow_nb.errors import UsageError
from wiseflow_nb.resources._signals import WATCHABLE

#: The column of a rule whose value comes from a function.
FUNCTION = "function"
#: Of the time to a limit that is a warning, this share is critical.
CRITICAL_SHARE = 0.2
#: The critical level (with ``below``: its negative) of a rule that never gets worse than a warning: a
#: number that JSON can write.
NEVER = sys.float_info.max


@dataclass(frozen=True, slots=True)
class AlertRule:
    """When something is too high (or, with ``below``, too low).

    Levels are in the column's unit, durations in seconds.

    Parameters
    ----------
    name
        One word or phrase; a rule is known by its name and resource.
    resource
        What people are told it is about (``cpu``, ``memory``, ``disk`` are also drawn in the charts).
    column
        A column of the samples, a rate (``<counter>_per_second``), or one of
        ``memory_seconds_to_limit``, ``filesystem_seconds_to_limit`` (seconds, at the trend of the last
        ten minutes), ``sampler_late_ratio`` (late by so many intervals, or seconds if those are
        shorter), ``container_recent_oom_kills`` (within the last minute).
    warning, critical
        From here on it is one; the same number twice makes it critical at once.
    for_seconds
        The condition must hold so long to fire; default 5.
    keep_seconds
        It must stay clear so long to resolve; default 15.
    clear_factor
        It is clear below ``level x clear_factor`` (above ``level / clear_factor`` with ``below``; of a
        negative level, as far beyond it).
    unit
        What people read: ``ratio`` is shown in percent, ``seconds`` as a duration, any other as it is.
    below
        The condition is "at or below the level".
    repeat_seconds
        While it fires, say so again so often; default 0: never. An acknowledged one is not repeated.
    survives_gaps
        A gap in the samples does not make it unknown.
    phrase
        The message's beginning, with ``{value}`` in it; default ``<resource> at {value}``.

    Notes
    -----
    A rule sees the samples, not what is between them. Whatever the interval, what holds for ``for_seconds``
    and two intervals fires exactly once, by then at the latest, and one that is over is told within
    ``keep_seconds`` and two intervals; what is shorter than ``for_seconds`` does not fire unless it comes
    again and again. So at 10 s between samples (an idle session) an alert may come 20 s later than at
    once, and a peak of less than 10 s may not be seen.

    Examples
    --------
    >>> AlertRule("many files", "descriptors", "process_open_fds", 500, 900, unit="files").unit
    'files'
    """

    name: str
    resource: str
    column: str
    warning: float
    critical: float
    for_seconds: float = 5.0
    keep_seconds: float = 15.0
    clear_factor: float = 0.95
    unit: str = "ratio"
    below: bool = False
    repeat_seconds: float = 0.0
    survives_gaps: bool = False
    phrase: str = ""

    def over(self, value: float, level: float) -> bool:
        """Whether a value is at the level or worse; no value, not an infinite one either, is at ``NEVER``."""
        return (value <= level if self.below else value >= level) and abs(level) < NEVER

    def clear(self, value: float, level: float) -> bool:
        """Whether a value is so far from the level that it may resolve."""
        # By the level's size, so that a negative level, too, clears beyond itself and not before.
        size = abs(level)
        if self.below:
            return value > level + size * (1.0 / self.clear_factor - 1.0)
        return value < level - size * (1.0 - self.clear_factor)

    def worse(self, one: float, other: float) -> float:
        """The worse of two values; a NaN loses."""
        if math.isnan(one) or math.isnan(other):
            return other if math.isnan(one) else one
        return min(one, other) if self.below else max(one, other)


def checked(rule: AlertRule) -> AlertRule:
    """Return the rule, its numbers as floats, if it can be judged.

    Raises
    ------
    UsageError
        Names the field, its value and what is allowed.
    """
    for name in ("name", "resource", "column", "unit", "phrase"):
        if not isinstance(getattr(rule, name), str):
            raise UsageError(f"rule {str(rule.name)[:64]!r}: {name}={getattr(rule, name)!r} is not a text; give one")
    where = f"rule {rule.name[:64]!r}"
    for name in ("below", "survives_gaps"):
        if not isinstance(getattr(rule, name), bool):
            raise UsageError(f"{where}: {name}={getattr(rule, name)!r} is neither True nor False; give one of them")
    if not rule.name or not rule.resource:
        raise UsageError(f"{where}: name and resource must not be empty; give both a word")
    if rule.column != FUNCTION and rule.column not in WATCHABLE:
        raise UsageError(
            f"{where}: column {rule.column[:64]!r} is not one of the samples'; give one of "
            "Sample._fields, <counter>_per_second, or " + ", ".join(WATCHABLE[-4:])
        )
    numbers: dict[str, float] = {}
    for name in ("warning", "critical", "for_seconds", "keep_seconds", "clear_factor", "repeat_seconds"):
        value = getattr(rule, name)
        if not math.isfinite(number := _as_float(value)):
            raise UsageError(f"{where}: {name}={repr(value)[:64]} is not a finite number; give one")
        numbers[name] = number
    # As floats from here on: numpy compares its narrow ones in their own width, and warns.
    rule = replace(rule, **numbers)  # type: ignore[arg-type]
    if (rule.critical > rule.warning) if rule.below else (rule.critical < rule.warning):
        wanted = "at most" if rule.below else "at least"
        raise UsageError(f"{where}: critical={rule.critical:g} must be {wanted} warning={rule.warning:g}")
    if min(rule.for_seconds, rule.keep_seconds, rule.repeat_seconds) < 0:
        raise UsageError(f"{where}: for_seconds, keep_seconds and repeat_seconds must be 0 or more")
    if not 0 < rule.clear_factor <= 1:
        raise UsageError(f"{where}: clear_factor={rule.clear_factor:g} must be above 0 and at most 1")
    return rule


def _as_float(value: object) -> float:
    """A number of any kind, numpy's too, as a float; NaN for what is none, or is beyond all floats."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def rule_from(values: Mapping[str, object]) -> AlertRule:
    """Return a rule from its JSON form, checked; unknown fields are left out."""
    known = {item.name for item in fields(AlertRule)}
    return checked(AlertRule(**{name: value for name, value in values.items() if name in known}))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class AlertPlan:
    """What the built-in rules are made from. Ratios of 0-1, seconds; 0 switches a trend rule off."""

    thresholds: Mapping[str, tuple[float, float]]
    for_seconds: float = 5.0
    keep_seconds: float = 15.0
    clear_factor: float = 0.95
    repeat_seconds: float = 0.0
    memory_full_within: float = 600.0
    disk_full_within: float = 3600.0


def builtin_rules(plan: AlertPlan) -> tuple[AlertRule, ...]:
    """CPU, memory and disk at (warning, critical); time to limit; OOM kills; a starved sampler."""
    levels = {"cpu": "cpu", "memory": "memory", "disk": "filesystem"}
    rules = [
        AlertRule(
            f"{name} high",
            name,
            f"{prefix}_utilization_ratio",
            *plan.thresholds[name],
            for_seconds=plan.for_seconds,
            keep_seconds=plan.keep_seconds,
            clear_factor=plan.clear_factor,
            repeat_seconds=plan.repeat_seconds,
        )
        for name, prefix in levels.items()
        if name in plan.thresholds
    ]
    for name, prefix, within in (
        ("memory", "memory", plan.memory_full_within),
        ("disk", "filesystem", plan.disk_full_within),
    ):
        if within > 0:
            rules.append(
                AlertRule(
                    f"{name} full soon",
                    name,
                    f"{prefix}_seconds_to_limit",
                    within,
                    within * CRITICAL_SHARE,
                    for_seconds=max(plan.for_seconds, 10.0),
                    keep_seconds=max(plan.keep_seconds, 30.0),
                    clear_factor=min(plan.clear_factor, 0.8),
                    unit="seconds",
                    below=True,
                    repeat_seconds=plan.repeat_seconds,
                    phrase=f"{name} is full in {{value}} at this rate",
                )
            )
    rules.append(
        AlertRule(
            "out of memory",
            "memory",
            "container_recent_oom_kills",
            1,
            1,
            for_seconds=0.0,
            keep_seconds=0.0,
            unit="processes",
            survives_gaps=True,
            phrase="the kernel's OOM killer ended {value} of this container within a minute",
        )
    )
    rules.append(
        AlertRule(
            "sampler starved",
            "sampler",
            "sampler_late_ratio",
            1.0,
            4.0,
            for_seconds=10.0,
            keep_seconds=30.0,
            unit="intervals",
            # One late sample is a suspended machine; one late sample after the other is a starved sampler.
            survives_gaps=True,
            phrase="samples are late by {value}",
        )
    )
    return tuple(rules)


def columns_of(rules: Iterable[AlertRule]) -> tuple[str, ...]:
    """The columns that rules watch."""
    return tuple({rule.column: None for rule in rules})
