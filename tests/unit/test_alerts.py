"""The alert machine by table and by property."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wiseflow_nb.config import Settings
from wiseflow_nb.records import Sample, Severity, from_json_dict, to_json_dict
from wiseflow_nb.resources._alerts import AlertEngine
from wiseflow_nb.resources._by_settings import user_rule
from wiseflow_nb.resources._rules import FUNCTION, AlertPlan, AlertRule, builtin_rules

RULE = AlertRule("cpu high", "cpu", "cpu_utilization_ratio", 0.7, 0.9, for_seconds=3, keep_seconds=5)


def sample(at: float, value: float, gap: bool = False) -> Sample:
    return Sample(at, at, gap=float(gap), cpu_utilization_ratio=value)


def kinds(values: list[float], rule: AlertRule = RULE, finish: bool = False) -> list[str]:
    engine = AlertEngine([rule])
    found = [item.kind for at, value in enumerate(values) for item in engine.observe(sample(at, value))]
    return found + ([item.kind for item in engine.finish(len(values))] if finish else [])


def test_a_condition_fires_once_after_for_seconds() -> None:
    assert kinds([0.8] * 3) == []
    assert kinds([0.8] * 100) == ["fired"]
    assert kinds([0.8, 0.8, 0.5, 0.8, 0.8, 0.5] * 10) == []


def test_the_life_of_one_alert() -> None:
    engine = AlertEngine([RULE])
    values = [0.8] * 5 + [0.95] * 5 + [0.8] * 8 + [0.1] * 8
    found = [item for at, value in enumerate(values) for item in engine.observe(sample(at, value))]
    assert [item.kind for item in found] == ["fired", "escalated", "de-escalated", "resolved"]
    assert [item.severity for item in found] == [Severity.WARNING, Severity.CRITICAL, Severity.WARNING, Severity.NONE]
    assert len({item.alert_id for item in found}) == 1
    assert found[-1].peak == 0.95


def test_the_clear_level_is_lower_than_the_warning_level() -> None:
    assert kinds([0.8] * 5 + [0.69] * 50) == ["fired"]
    assert kinds([0.8] * 5 + [0.66] * 50) == ["fired", "resolved"]


def test_a_gap_or_a_missing_value_starts_the_timers_again_and_loses_no_alert() -> None:
    engine = AlertEngine([RULE])
    for at in range(3):
        engine.observe(sample(at, 0.8))
    assert engine.observe(sample(3, math.nan)) == []
    assert [engine.observe(sample(at, 0.8)) for at in (4, 5, 6)] == [[], [], []]
    assert [item.kind for item in engine.observe(sample(7, 0.8))] == ["fired"]
    assert engine.observe(sample(500, 0.1, gap=True)) == []
    assert len(engine.active()) == 1
    assert [item.kind for item in engine.finish(501)] == ["resolved"]
    assert engine.finish(502) == []


def test_new_levels_judge_an_open_alert_and_a_removed_rule_resolves_it() -> None:
    engine = AlertEngine([RULE])
    for at in range(5):
        engine.observe(sample(at, 0.8))
    higher = builtin_rules(AlertPlan({"cpu": (0.85, 0.95)}, 3, 5, 0.95))
    (opened,) = engine.active()
    assert engine.replace_rules(higher, 5) == []
    assert engine.active()[0].alert_id == opened.alert_id
    found = [item.kind for at in range(6, 20) for item in engine.observe(sample(at, 0.8))]
    assert found == ["resolved"]
    for at in range(20, 30):
        engine.observe(sample(at, 0.9))
    assert [item.kind for item in engine.replace_rules((), 30)] == ["resolved"]


def test_acknowledge_and_silence_take_only_open_alerts() -> None:
    engine = AlertEngine([RULE])
    assert not engine.acknowledge("")
    assert not engine.silence("nobody", 9)
    for at in range(4):
        engine.observe(sample(at, 0.8))
    (alert,) = engine.active()
    assert engine.acknowledge(alert.alert_id)
    assert engine.active()[0].acknowledged
    assert engine.silence(alert.alert_id, 1000)
    found = [item for at in range(4, 30) for item in engine.observe(sample(at, 0.95 if at < 10 else 0.1))]
    assert [(item.kind, item.silenced) for item in found] == [("escalated", True), ("resolved", False)]


signals = st.lists(
    st.tuples(st.one_of(st.floats(0, 1.2), st.just(math.nan)), st.floats(0.01, 20), st.booleans()), max_size=120
)


@given(signals)
def test_every_fired_has_its_resolved_and_no_state_is_told_twice(signal: list[tuple[float, float, bool]]) -> None:
    engine, at, found = AlertEngine([RULE]), 0.0, []
    for value, step, gap in signal:
        at += step
        found += engine.observe(sample(at, value, gap and step > 15))
    found += engine.finish(at)
    open_id, severity, last_fired = "", Severity.NONE, -math.inf
    for item in found:
        if item.kind == "fired":
            assert open_id == ""
            open_id, last_fired = item.alert_id, item.time_seconds
        else:
            assert item.alert_id == open_id
        assert item.severity is not severity
        severity = item.severity
        if item.kind == "resolved":
            open_id = ""
            assert item.time_seconds == at or item.time_seconds - last_fired >= RULE.keep_seconds
    assert open_id == ""
    assert engine.active() == ()


def test_a_rule_travels_as_json() -> None:
    rule = AlertRule("many files", "descriptors", "process_open_fds", 500, 900, unit="files")
    assert from_json_dict(AlertRule, json.loads(json.dumps(to_json_dict(rule)))) == rule


def test_names_that_read_alike_give_ids_that_differ() -> None:
    names = [
        ("a b", "c"),
        ("a", "b c"),
        ("a-b", "c"),
        ("a", "b-c"),
        ("a_b", "c"),
        ("a%5Fb", "c"),
        ("a b-c", "d"),
        ("a b", "c-d"),
    ]
    engine = AlertEngine([AlertRule(name, resource, "system_load1", 1, 2, for_seconds=0) for name, resource in names])
    told = engine.observe(Sample(1.0, 1.0, system_load1=5.0))
    assert len({item.alert_id for item in told}) == len(names)
    assert told[0].alert_id == "a_b-c-1.000"


def test_how_long_it_lasted_goes_by_the_clock_that_is_never_set_back() -> None:
    rule = AlertRule("load", "load", "system_load1", 1, 2, for_seconds=0, keep_seconds=0, unit="")
    engine = AlertEngine([rule])
    engine.observe(Sample(10_000.0, 1.0, system_load1=5.0))
    engine.observe(Sample(6400.0, 61.0, system_load1=5.0))
    (told,) = engine.observe(Sample(6460.0, 121.0, system_load1=0.0))
    assert told.message == "load is back at 0 after 2 min 0 s (peak 5)"
    engine.observe(Sample(10_000.0, 200.0, system_load1=5.0))
    engine.observe(Sample(6400.0, 260.0, system_load1=5.0))
    (told,) = engine.finish(6430.0)
    assert "after 1 min 30 s" in told.message


def test_two_rules_on_one_resource_are_two_alerts() -> None:
    engine = AlertEngine([RULE, replace(RULE, name="cpu very high", warning=0.8)])
    found = [item for at in range(4) for item in engine.observe(sample(at, 0.85))]
    assert [item.kind for item in found] == ["fired", "fired"]
    assert found[0].alert_id != found[1].alert_id


def test_the_peak_counts_from_when_the_condition_began() -> None:
    engine = AlertEngine([RULE])
    (fired,) = [item for at, value in enumerate([0.99, 0.8, 0.8, 0.72]) for item in engine.observe(sample(at, value))]
    assert (fired.peak, fired.value) == (0.99, 0.72)
    engine = AlertEngine([RULE])
    values = [0.99, 0.1, 0.8, 0.8, 0.8, 0.8]
    (fired,) = [item for at, value in enumerate(values) for item in engine.observe(sample(at, value))]
    assert fired.peak == 0.8


def test_the_message_is_in_the_unit_of_the_rule() -> None:
    rule = AlertRule("many files", "descriptors", "process_open_fds", 500, 900, for_seconds=0, unit="files")
    (fired,) = AlertEngine([rule]).observe(Sample(1.0, 1.0, process_open_fds=640))
    assert fired.message == "descriptors at 640 files is warning (from 500 files, fired)"
    (fired,) = AlertEngine([replace(RULE, for_seconds=0)]).observe(sample(1.0, 0.95))
    assert fired.message == "cpu at 95 % is critical (from 90 %, fired)"


def test_the_top_processes_are_asked_for_only_when_something_happens() -> None:
    engine, asked = AlertEngine([RULE]), []

    def top() -> tuple[tuple[int, str, float, float], ...]:
        asked.append(1)
        return ((1, "python", 1e9, 3.0),)

    found = [item for at in range(50) for item in engine.observe(sample(at, 0.8), top)]
    assert [item.top_processes for item in found] == [((1, "python", 1e9, 3.0),)]
    assert len(asked) == 1


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_is_never_critical_is_not_so_at_infinity_either_and_can_be_recorded(sign: float) -> None:
    rule = user_rule(
        Settings(),
        "lag",
        FUNCTION,
        warning=1.0,
        critical=None,
        resource="",
        unit="s",
        below=sign < 0,
        phrase="",
        for_seconds=0.0,
        keep_seconds=0.0,
        clear_factor=None,
        repeat_seconds=None,
    ).rule
    engine, key = AlertEngine([rule]), ("lag", "lag")
    told = [item for at in range(3) for item in engine.judge({key: sign * math.inf}, now=at, wall=at)]
    assert [(item.kind, item.severity) for item in told] == [("fired", Severity.WARNING)]
    assert json.loads(json.dumps(to_json_dict(told[0])))["value"] == sign * sys.float_info.max
    assert "inf s" in told[0].message
