"""Alert rules as a pure state machine: samples in, transitions out, no clock, no thread.

A condition must hold for ``for_seconds`` before it fires and stay below a lower, separate level for
``keep_seconds`` before it resolves. One alert keeps one id from fired to resolved; escalation and
de-escalation are moves of the same alert. A missing value or a gap makes the state unknown: timers
start again, and an open alert stays open until samples tell that it is over. At the end every open
alert is resolved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from wiseflow_nb.quantities import duration, shown
from wiseflow_nb.records import NAN, AlertState, AlertTransition, AlertView, Sample, Severity
from wiseflow_nb.resources._rules import FUNCTION, NEVER, AlertRule, columns_of
from wiseflow_nb.resources._signals import Signals

TopProcesses = Callable[[], tuple[tuple[int, str, float, float], ...]]
Key = tuple[str, str]
#: A blank is what names have most: it becomes the shortest. Nothing else that is written so is left as it is.
_IN_ID = {" ": "_", "_": "%5F", "-": "%2D", "%": "%25"}


@dataclass(frozen=True, slots=True)
class _Status:
    """What one rule remembers. ``*_at`` and ``*_since`` are monotonic; None: the condition does not hold."""

    state: AlertState = AlertState.UNKNOWN
    severity: Severity = Severity.NONE
    alert_id: str = ""
    started_seconds: float = NAN
    started_at: float = NAN
    peak: float = NAN
    value: float = NAN
    message: str = ""
    over_warning_since: float | None = None
    over_critical_since: float | None = None
    under_warning_since: float | None = None
    under_critical_since: float | None = None
    told_at: float = NAN

    @property
    def open(self) -> bool:
        return self.alert_id != ""


def _held(since: float | None, now: float, seconds: float) -> bool:
    return since is not None and now - since >= seconds


def _since(condition: bool, before: float | None, now: float) -> float | None:
    return (now if before is None else before) if condition else None


def step(rule: AlertRule, before: _Status, value: float, gap: bool, now: float, wall: float) -> tuple[_Status, str]:
    """Return the next status and the kind of transition (empty: none).

    ``now`` is monotonic, ``wall`` is seconds since the epoch; both are the sample's.
    """
    if math.isnan(value) or (gap and not rule.survives_gaps):
        return replace(
            before,
            state=AlertState.UNKNOWN,
            over_warning_since=None,
            over_critical_since=None,
            under_warning_since=None,
            under_critical_since=None,
        ), ""
    status = replace(
        before,
        value=value,
        over_warning_since=_since(rule.over(value, rule.warning), before.over_warning_since, now),
        over_critical_since=_since(rule.over(value, rule.critical), before.over_critical_since, now),
        under_warning_since=_since(rule.clear(value, rule.warning), before.under_warning_since, now),
        under_critical_since=_since(rule.clear(value, rule.critical), before.under_critical_since, now),
    )
    critical = _held(status.over_critical_since, now, rule.for_seconds)
    if not status.open:
        if _held(status.over_warning_since, now, rule.for_seconds):
            return replace(
                status,
                state=AlertState.FIRING,
                severity=Severity.CRITICAL if critical else Severity.WARNING,
                # Both names: two rules on one resource, or one on two, can fire in the same instant.
                alert_id=f"{_word(rule.name)}-{_word(rule.resource)}-{wall:.3f}",
                started_seconds=wall,
                started_at=now,
                peak=_worst(rule, before, value),
                told_at=now,
            ), "fired"
        if status.over_warning_since is None:
            return replace(status, state=AlertState.OK, peak=NAN), ""
        return replace(status, state=AlertState.PENDING, peak=_worst(rule, before, value)), ""
    status = replace(status, peak=rule.worse(status.peak, value))
    if _held(status.under_warning_since, now, rule.keep_seconds):
        return replace(status, state=AlertState.OK, severity=Severity.NONE, alert_id="", told_at=NAN), "resolved"
    recovering = status.under_warning_since is not None
    status = replace(status, state=AlertState.RECOVERING if recovering else AlertState.FIRING)
    if status.severity is Severity.WARNING and critical:
        return replace(status, severity=Severity.CRITICAL, told_at=now), "escalated"
    if status.severity is Severity.CRITICAL and _held(status.under_critical_since, now, rule.keep_seconds):
        return replace(status, severity=Severity.WARNING, told_at=now), "de-escalated"
    if rule.repeat_seconds > 0 and not recovering and now - status.told_at >= rule.repeat_seconds:
        return replace(status, told_at=now), "repeated"
    return status, ""


def _word(name: str) -> str:
    """A name as a part of an id: two names that differ, or that are divided elsewhere, never give the same."""
    return "".join(_IN_ID.get(letter, letter) for letter in name)


def _worst(rule: AlertRule, before: _Status, value: float) -> float:
    return rule.worse(before.peak, value) if before.over_warning_since is not None else value


class AlertEngine:
    """Rules and their states. Not thread-safe: one thread observes.

    Examples
    --------
    >>> rule = AlertRule("cpu high", "cpu", "cpu_utilization_ratio", 0.7, 0.9, for_seconds=0)
    >>> engine = AlertEngine([rule])
    >>> [item.kind for item in engine.observe(Sample(1.0, 1.0, cpu_utilization_ratio=0.95))]
    ['fired']
    >>> [item.kind for item in engine.finish(2.0)]
    ['resolved']
    """

    def __init__(self, rules: Iterable[AlertRule] = ()) -> None:
        self._rules: dict[Key, AlertRule] = {(rule.name, rule.resource): rule for rule in rules}
        self._status: dict[Key, _Status] = dict.fromkeys(self._rules, _Status())
        self._signals = Signals(columns_of(self._rules.values()))
        self._acknowledged: set[str] = set()
        self._silenced: dict[str, float] = {}
        # The monotonic and the wall time of the last look.
        self._judged = (NAN, NAN)

    def observe(
        self, sample: Sample, top_processes: TopProcesses | None = None, expected_interval: float = NAN
    ) -> list[AlertTransition]:
        """Take one sample; return the transitions.

        ``expected_interval`` (seconds) is what the schedule asked for; without it nobody can tell
        whether the sample is late.
        """
        self._signals.observe(sample, expected_interval)
        values = {key: self._signals.value(rule.column) for key, rule in self._rules.items()}
        return self.judge(
            values,
            gap=bool(sample.gap),
            now=sample.monotonic_seconds,
            wall=sample.time_seconds,
            top_processes=top_processes,
        )

    def judge(
        self,
        values: Mapping[Key, float],
        *,
        now: float,
        wall: float,
        gap: bool = False,
        top_processes: TopProcesses | None = None,
        details: Mapping[Key, str] | None = None,
    ) -> list[AlertTransition]:
        """Judge one value a rule, by (name, resource); a rule without one is left as it is.

        ``now`` is monotonic, ``wall`` seconds since the epoch; ``details`` go into the messages.
        """
        found = []
        self._judged = (now, wall)
        for key, value in values.items():
            rule, before = self._rules[key], self._status[key]
            status, kind = step(rule, before, value, gap, now, wall)
            if kind == "repeated" and status.alert_id in self._acknowledged:
                kind = ""
            if kind:
                top = top_processes() if top_processes is not None and kind in ("fired", "escalated") else ()
                detail, lasted = (details or {}).get(key, ""), now - before.started_at
                transition = _transition(rule, before, status, kind, value, wall, lasted, top, detail)
                status = replace(status, message=transition.message)
                if kind not in ("fired", "resolved") and now < self._silenced.get(transition.alert_id, -math.inf):
                    transition = replace(transition, silenced=True)
                found.append(transition)
                if kind == "resolved":
                    self._forget(transition.alert_id)
            self._status[key] = status
        return found

    def add_rule(self, rule: AlertRule, now: float) -> None:
        """Take one more rule, or other levels of one that is there; see ``replace_rules``."""
        key = (rule.name, rule.resource)
        before, known = self._status.get(key, _Status()), self._rules.get(key)
        if known != rule:
            self._rules[key] = rule
            self._status[key] = step(rule, before, NAN, True, now, now)[0]
        if rule.column != FUNCTION and (known is None or known.column != rule.column):
            self._signals.want(columns_of(self._rules.values()))

    def replace_rules(self, rules: Iterable[AlertRule], now: float) -> list[AlertTransition]:
        """Take new rules. A rule with the same levels keeps its timers; one that is gone resolves its alert.

        An open alert whose levels changed stays open; the next samples judge it by the new levels.
        """
        fresh: dict[Key, AlertRule] = {(rule.name, rule.resource): rule for rule in rules}
        gone = self._rules.keys() - fresh.keys()
        resolved = [item for key in gone for item in self._resolve(key, now, "its rule was removed")]
        status = {}
        for key, rule in fresh.items():
            before = self._status.get(key, _Status())
            status[key] = before if self._rules.get(key) == rule else step(rule, before, NAN, True, now, now)[0]
        self._rules, self._status = fresh, status
        self._signals.want(columns_of(fresh.values()))
        return resolved

    def acknowledge(self, alert_id: str) -> bool:
        """Mark an open alert as seen; return whether there is one with that id."""
        if self._is_open(alert_id):
            self._acknowledged.add(alert_id)
            return True
        return False

    def silence(self, alert_id: str, until: float) -> bool:
        """Say nothing of an open alert's ups and downs until a monotonic moment; its end is always told."""
        if self._is_open(alert_id):
            self._silenced[alert_id] = until
            return True
        return False

    def finish(self, now: float) -> list[AlertTransition]:
        """Resolve every open alert: sampling ends at ``now`` (epoch seconds)."""
        return [item for key in self._rules for item in self._resolve(key, now, "watching ended")]

    def active(self) -> tuple[AlertView, ...]:
        """The open alerts."""
        return tuple(
            AlertView(
                alert_id=status.alert_id,
                rule=rule.name,
                resource=rule.resource,
                severity=status.severity,
                state=status.state,
                value=status.value,
                threshold=_level(rule, status.severity),
                peak=status.peak,
                started_seconds=status.started_seconds,
                resolved_seconds=NAN,
                message=status.message,
                acknowledged=status.alert_id in self._acknowledged,
                unit=rule.unit,
            )
            for key, rule in self._rules.items()
            if (status := self._status[key]).open
        )

    def _is_open(self, alert_id: str) -> bool:
        return bool(alert_id) and any(status.alert_id == alert_id for status in self._status.values())

    def _resolve(self, key: Key, now: float, why: str) -> list[AlertTransition]:
        before = self._status[key]
        if not before.open:
            return []
        after = _Status(value=before.value)
        self._status[key] = after
        self._forget(before.alert_id)
        last, wall = self._judged
        # How long ago the last look was only the wall clock tells, and it may have been set back.
        lasted = last - before.started_at + max(now - wall, 0.0)
        return [_transition(self._rules[key], before, after, "resolved", before.value, now, lasted, ended=why)]

    def _forget(self, alert_id: str) -> None:
        self._acknowledged.discard(alert_id)
        self._silenced.pop(alert_id, None)


def _level(rule: AlertRule, severity: Severity) -> float:
    return rule.critical if severity is Severity.CRITICAL else rule.warning


def _kept(rule: AlertRule, value: float) -> float:
    """What is recorded of a value: of a function's infinity the largest number, for a record holds none."""
    return max(-NEVER, min(value, NEVER)) if rule.column == FUNCTION and math.isinf(value) else value


def _transition(
    rule: AlertRule,
    before: _Status,
    after: _Status,
    kind: str,
    value: float,
    wall: float,
    lasted: float,
    top: tuple[tuple[int, str, float, float], ...] = (),
    detail: str = "",
    ended: str = "",
) -> AlertTransition:
    told = before if kind == "resolved" else after
    level = _level(rule, told.severity)
    peak = rule.worse(told.peak, value)
    text = shown(value, rule.unit)
    if kind == "resolved":
        # By the monotonic clock: the wall clock may have been set back meanwhile.
        took = duration(lasted)
        if ended:  # nothing is known to have become better
            message = f"{rule.name}: {rule.resource} was at {text} when {ended}, after {took}"
            message += f" (worst: {shown(peak, rule.unit)})"
        elif rule.phrase:
            message = f"{rule.name} is over after {took} (worst: {shown(peak, rule.unit)})"
        else:
            message = f"{rule.resource} is back at {text} after {took} (peak {shown(peak, rule.unit)})"
    elif rule.phrase:
        message = f"{rule.phrase.replace('{value}', text)} ({after.severity}, {kind})"
    else:
        message = f"{rule.resource} at {text} is {after.severity} (from {shown(level, rule.unit)}, {kind})"
    if detail:
        message = f"{message}: {detail}"
    return AlertTransition(
        alert_id=told.alert_id,
        rule=rule.name,
        resource=rule.resource,
        kind=kind,
        from_state=before.state,
        to_state=after.state,
        severity=after.severity,
        value=_kept(rule, value),
        threshold=level,
        peak=_kept(rule, peak),
        started_seconds=told.started_seconds,
        time_seconds=wall,
        message=message,
        top_processes=top,
        unit=rule.unit,
    )
