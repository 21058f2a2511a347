"""The alert machine over arbitrary signals: what holds whatever comes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from wiseflow_nb.records import AlertTransition, Sample, Severity
from wiseflow_nb.resources._alerts import AlertEngine
from wiseflow_nb.resources._rules import AlertRule

RULE = AlertRule("cpu high", "cpu", "cpu_utilization_ratio", 0.7, 0.9, for_seconds=3, keep_seconds=5)
BELOW = replace(RULE, warning=0.3, critical=0.1, below=True)
RULES = st.sampled_from(
    [
        RULE,
        BELOW,
        replace(RULE, for_seconds=0, keep_seconds=0),
        replace(RULE, repeat_seconds=4.0),
        replace(RULE, survives_gaps=True),
        replace(RULE, critical=0.7, clear_factor=1.0),
    ]
)

#: (value, seconds since the last, whether it is a gap)
STEPS = st.lists(
    st.tuples(
        st.one_of(
            st.floats(0, 1.2),
            st.just(math.nan),
            # On the levels themselves, and on the levels of clearing.
            st.sampled_from([0.7, 0.9, 0.7 * 0.95, 0.9 * 0.95, 0.3, 0.1, 0.3 / 0.95]),
        ),
        st.floats(0.01, 20),
        st.booleans(),
    ),
    max_size=150,
)
#: Pieces of a signal that stay on one side of every level: (value, quarters of a second).
LEVELS = st.sampled_from([0.05, 0.2, 0.5, 0.68, 0.75, 0.87, 0.95])


def play(rule: AlertRule, steps: list[tuple[float, float, bool]]) -> tuple[list[AlertTransition], float]:
    engine, at, found = AlertEngine([rule]), 0.0, []
    for value, step, gap in steps:
        at += step
        found += engine.observe(Sample(at, at, step, float(gap), cpu_utilization_ratio=value))
    found += engine.finish(at)
    assert engine.active() == ()
    assert engine.finish(at) == []
    return found, at


@given(RULES, STEPS)
@settings(max_examples=300)
def test_every_fired_has_one_resolved_and_no_state_is_told_twice(
    rule: AlertRule, steps: list[tuple[float, float, bool]]
) -> None:
    found, _ = play(rule, steps)
    open_id, severity = "", Severity.NONE
    ids = set()
    for item in found:
        if item.kind == "fired":
            assert open_id == ""
            assert item.alert_id not in ids
            open_id = item.alert_id
            ids.add(open_id)
        else:
            assert item.alert_id == open_id
        if item.kind == "repeated":
            assert item.severity is severity
        else:
            assert item.severity is not severity
        assert (item.kind == "resolved") == (item.severity is Severity.NONE)
        severity = item.severity
        open_id = "" if item.kind == "resolved" else open_id
    assert open_id == ""


@given(RULES, STEPS)
@settings(max_examples=300)
def test_nothing_flaps_faster_than_for_and_keep(rule: AlertRule, steps: list[tuple[float, float, bool]]) -> None:
    found, end = play(rule, steps)
    for before, after in itertools.pairwise(found):
        elapsed = after.time_seconds - before.time_seconds
        if after.kind == "resolved" and after.time_seconds == end:
            continue  # the end of sampling resolves at once
        if after.kind in ("resolved", "de-escalated") and before.kind in ("fired", "escalated"):
            assert elapsed >= rule.keep_seconds - 1e-9
        if after.kind in ("fired", "escalated") and before.kind in ("resolved", "de-escalated"):
            assert elapsed >= rule.for_seconds - 1e-9
        if after.kind == "repeated":
            assert elapsed >= rule.repeat_seconds - 1e-9


@given(RULES, STEPS)
def test_the_peak_is_the_worst_value_that_was_told(rule: AlertRule, steps: list[tuple[float, float, bool]]) -> None:
    found, _ = play(rule, steps)
    for item in found:
        if not math.isnan(item.value):
            assert item.peak <= item.value if rule.below else item.peak >= item.value


def sampled(
    rule: AlertRule, ends: list[tuple[float, float]], interval: float, phase: float = 0.0
) -> list[AlertTransition]:
    """Transitions of a signal of (value, until when), looked at once an interval from a phase on, as the loop does."""
    engine, found, at = AlertEngine([rule]), [], phase
    length = ends[-1][1]
    while at < length:
        value = next(level for level, until in ends if at < until)
        found += engine.observe(Sample(at, at, interval, cpu_utilization_ratio=value))
        at += interval
    return found + engine.finish(length)


INTERVALS = [0.25, 0.5, 1.0, 2.0, 5.0, 10.0]


@given(
    st.sampled_from([RULE, BELOW]),
    st.lists(st.tuples(LEVELS, st.integers(1, 4)), min_size=1, max_size=20),
    st.sampled_from(INTERVALS),
    st.sampled_from(INTERVALS),
)
@settings(max_examples=300)
def test_the_same_signal_gives_the_same_alerts_at_any_interval(
    rule: AlertRule, pieces: list[tuple[float, int]], one: float, other: float
) -> None:
    """Of a signal whose every level lasts longer than ``keep_seconds`` (and ``for_seconds``) and two intervals.

    So that no sampling can miss it. Nothing of the kind holds of what is shorter: at 10 s between samples
    a level of 12 s may be seen once, or twice.
    """
    longer = max(one, other)
    lengths = [length * (max(rule.keep_seconds, rule.for_seconds) + 2 * longer) for _, length in pieces]
    ends = list(zip([value for value, _ in pieces], itertools.accumulate(lengths), strict=True))
    first, second = sampled(rule, ends, one), sampled(rule, ends, other)
    assert [(item.kind, item.severity) for item in first] == [(item.kind, item.severity) for item in second]
    for mine, theirs in zip(first, second, strict=True):
        # A change is seen one interval late at most, and its time is up one interval late at most.
        assert abs(mine.time_seconds - theirs.time_seconds) <= 2 * longer


@given(
    st.sampled_from([RULE, BELOW, replace(RULE, for_seconds=0, keep_seconds=0), replace(RULE, for_seconds=12)]),
    st.sampled_from(INTERVALS),
    st.floats(0, 1, exclude_max=True),
    st.floats(0.01, 60),
)
@settings(max_examples=400)
def test_what_lasts_long_enough_fires_once_at_any_interval_and_what_is_too_short_never(
    rule: AlertRule, interval: float, phase: float, lasts: float
) -> None:
    """One time over the level: what holds from 0.25 s to 10 s between samples, wherever the samples fall.

    Longer than ``for_seconds`` and two intervals: it fires exactly once, less than that after it began, and is
    resolved less than ``keep_seconds`` and two intervals after it ended. Shorter than ``for_seconds``: never.
    What lies between fires once or never.
    """
    quiet, over = (0.68, 0.2) if rule.below else (0.2, 0.75)
    began = 100.0
    ended = began + lasts
    length = ended + rule.keep_seconds + 3 * interval
    found = sampled(rule, [(quiet, began), (over, ended), (quiet, length)], interval, phase * interval)
    kinds = [item.kind for item in found]
    assert kinds in ([], ["fired", "resolved"])
    rounding = 1e-9
    if lasts >= rule.for_seconds + 2 * interval + rounding:
        assert kinds
    if lasts < rule.for_seconds - rounding:
        assert not kinds
    if kinds:
        fired, resolved = (item.time_seconds for item in found)
        assert -rounding <= fired - began - rule.for_seconds <= 2 * interval + rounding
        assert -rounding <= resolved - ended - rule.keep_seconds <= 2 * interval + rounding
