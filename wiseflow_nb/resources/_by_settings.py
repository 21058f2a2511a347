"""What the settings say: how to sample, what to judge, and of a user's rules what they leave open."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from wiseflow_nb.config import Settings
from wiseflow_nb.resources._rules import FUNCTION, NEVER, AlertPlan, AlertRule, checked
from wiseflow_nb.resources._sampler import SamplingPlan

#: The fields that may be left out.
FOLLOWING = ("for_seconds", "keep_seconds", "clear_factor", "repeat_seconds")


def sampling_plan(settings: Settings, rules: tuple[AlertRule, ...] = (), revision: int = 0) -> SamplingPlan:
    """What the settings say about sampling and alerts."""
    return SamplingPlan(
        idle_interval=settings.resource_check_interval,
        busy_interval=settings.busy_check_interval,
        interval_is_explicit=settings.source("resource_check_interval") != "default",
        alerts=AlertPlan(
            settings.thresholds(),
            for_seconds=settings.alert_for_seconds,
            keep_seconds=settings.alert_keep_seconds,
            clear_factor=settings.alert_clear_factor,
            repeat_seconds=settings.alert_repeat_seconds,
            memory_full_within=settings.memory_full_within,
            disk_full_within=settings.disk_full_within,
        ),
        rules=rules,
        disk_path=settings.disk_path,
        revision=revision,
    )


@dataclass(frozen=True, slots=True)
class UserRule:
    """A rule as it is now, and the names of its fields that go by the settings."""

    rule: AlertRule
    follows: tuple[str, ...] = ()

    def by(self, settings: Settings) -> UserRule:
        """Return it by these settings."""
        return replace(self, rule=replace(self.rule, **{name: _of(settings, name) for name in self.follows}))  # type: ignore[arg-type]


class UserRules:
    """The rules that were added, by (name, resource); any thread may ask and change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rules: dict[tuple[str, str], UserRule] = {}

    def after_fork(self) -> None:
        """In a forked child: nobody holds the lock."""
        self._lock = threading.Lock()

    def add(self, made: UserRule) -> None:
        """Take one more, in the place of one with its name and resource."""
        with self._lock:
            self._rules[made.rule.name, made.rule.resource] = made

    def remove(self, name: str) -> bool:
        """Forget those of a name; return whether there was one."""
        with self._lock:
            gone = [key for key in self._rules if key[0] == name]
            for key in gone:
                del self._rules[key]
        return bool(gone)

    def follow(self, settings: Settings) -> list[AlertRule]:
        """Go by these settings; return the rules that are others now."""
        with self._lock:
            before, self._rules = self._rules, {key: item.by(settings) for key, item in self._rules.items()}
            return [item.rule for key, item in self._rules.items() if item != before[key]]

    def plan(self, settings: Settings, functions: tuple[tuple[str, str], ...], revision: int) -> SamplingPlan:
        """How to sample and what to judge, without the rules of ``functions``, which are judged elsewhere."""
        elsewhere = frozenset(functions)
        with self._lock:
            rules = tuple(item.rule for key, item in self._rules.items() if key not in elsewhere)
        return replace(sampling_plan(settings, rules, revision), replaced=functions)


def user_rule(
    settings: Settings,
    name: str,
    column: str,
    *,
    warning: float,
    critical: float | None,
    resource: str,
    unit: str,
    below: bool,
    phrase: str,
    **given: float | None,
) -> UserRule:
    """Return a checked rule; what of ``given`` (``FOLLOWING``) is None goes by the settings.

    Raises
    ------
    UsageError
        Names what does not fit.
    """
    follows = tuple(field for field in FOLLOWING if given[field] is None)
    rule = AlertRule(
        name,
        resource or name,
        column,
        warning,
        (-NEVER if below else NEVER) if critical is None else critical,
        unit=unit or _unit_of(column),
        below=below,
        phrase=phrase,
        **{field: _of(settings, field) if value is None else value for field, value in given.items()},  # type: ignore[arg-type]
    )
    return UserRule(checked(rule), follows)


def _of(settings: Settings, field: str) -> float:
    return float(getattr(settings, f"alert_{field}"))


def _unit_of(column: str) -> str:
    """What people read of a column's values, by its name."""
    if column.endswith("_per_second"):
        return column.removesuffix("_per_second").rsplit("_", 1)[1] + "/s"
    words = column.removesuffix("_total").split("_")
    known = {"ratio": "ratio", "bytes": "bytes", "seconds": "seconds", "limit": "seconds", "count": ""}
    return known.get(words[-1], "" if column == FUNCTION else words[-1])
