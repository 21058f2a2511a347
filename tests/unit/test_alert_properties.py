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


@given(
    st.sampled_from([RULE, BELOW]),
    st.lists(st.tuples(LEVELS, st.integers(1, 4)), min_size=1, max_size=20),
    st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    st.sampled_from([0.25, 0.5, 1.0, 2.0]),
)
@settings(max_examples=200)
def test_the_same_signal_gives_the_same_alerts_at_any_interval(
    rule: AlertRule, pieces: list[tuple[float, int]], one: float, other: float
) -> None:
    # Each piece lasts longer than for and keep with both intervals on top: no sampling can miss it.
    lengths = [length * (rule.keep_seconds + 4.0) for _, length in pieces]
    ends = list(zip([value for value, _ in pieces], itertools.accumulate(lengths), strict=True))

    def told(interval: float) -> list[AlertTransition]:
        engine, found = AlertEngine([rule]), []
        length = sum(lengths)
        for number in range(int(length / interval)):
            at = number * interval
            value = next(level for level, until in ends if at < until)
            found += engine.observe(Sample(at, at, interval, cpu_utilization_ratio=value))
        return found + engine.finish(length)

    first, second = told(one), told(other)
    assert [(item.kind, item.severity) for item in first] == [(item.kind, item.severity) for item in second]
    for mine, theirs in zip(first, second, strict=True):
        # A change is seen one interval late at most, and its time is up one interval late at most.
        assert abs(mine.time_seconds - theirs.time_seconds) <= 2 * max(one, other)
