"""Alert rules: the built-in ones on scripted incidents, those of users, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from wiseflow_nb.errors import UsageError
from wiseflow_nb.quantities import shown
from wiseflow_nb.records import AlertTransition, Sample, Severity, to_json_dict
from wiseflow_nb.resources._alerts import AlertEngine
from wiseflow_nb.resources._rules import NEVER, AlertPlan, AlertRule, builtin_rules, checked, rule_from

PLAN = AlertPlan({"cpu": (0.72, 0.9), "memory": (0.68, 0.85), "disk": (0.72, 0.9)})
GIB = float(2**30)


def run(samples: list[Sample], expected: float = 1.0, plan: AlertPlan = PLAN) -> list[AlertTransition]:
    engine = AlertEngine(builtin_rules(plan))
    found = [item for sample in samples for item in engine.observe(sample, expected_interval=expected)]
    return found + engine.finish(samples[-1].time_seconds)


def at(second: float, **values: float) -> Sample:
    return Sample(second, second, 1.0, **values)


@pytest.mark.parametrize("seed", range(8))
def test_a_noisy_incident_of_forty_minutes_is_two_notifications(seed: int) -> None:
    noise = random.Random(seed)

    def busy() -> float:
        # Around the level, as often far above and below it: one in ten is a spike or a dip.
        spread = noise.choice((0.98, 0.99, 0.2, 0.1)) if noise.random() < 0.1 else noise.gauss(0.76, 0.09)
        return min(max(spread, 0.0), 1.0)

    signal = [0.3] * 60 + [busy() for _ in range(2400)] + [0.3] * 60
    naive = sum((one >= 0.72) != (other >= 0.72) for one, other in itertools.pairwise(signal))
    assert naive > 1000
    assert max(signal) - min(signal) > 0.8
    told = run([at(second, cpu_utilization_ratio=value) for second, value in enumerate(signal)])
    assert [item.kind for item in told] == ["fired", "resolved"]
    assert told[0].alert_id == told[1].alert_id
    assert told[1].time_seconds - told[0].time_seconds > 2200


def test_a_suspended_machine_is_one_gap_and_no_alert() -> None:
    before = [at(second, cpu_utilization_ratio=0.95 if second > 57 else 0.5) for second in range(60)]
    woke = at(9000, cpu_utilization_ratio=0.99)._replace(interval_seconds=8941.0, gap=1.0)
    after = [at(second, cpu_utilization_ratio=0.4) for second in range(9001, 9060)]
    assert run([*before, woke, *after]) == []


def test_a_starved_sampler_is_an_alert() -> None:
    late = [Sample(6.0 * number, 6.0 * number, 6.0, gap=1.0) for number in range(6)]
    on_time = [at(40 + number) for number in range(60)]
    told = run([*late, *on_time])
    assert [(item.rule, item.kind, item.severity) for item in told] == [
        ("sampler starved", "fired", Severity.CRITICAL),
        ("sampler starved", "resolved", Severity.NONE),
    ]
    assert "late by 5 intervals" in told[0].message


def test_a_few_milliseconds_late_at_a_short_interval_is_no_starvation() -> None:
    assert run([Sample(0.06 * number, 0.06 * number, 0.06) for number in range(1000)], expected=0.02) == []


def memory(second: float, used: float, limit: float = 16 * GIB) -> Sample:
    return at(
        second,
        memory_limit_bytes=limit,
        memory_working_set_bytes=used,
        memory_available_bytes=limit - used,
        memory_utilization_ratio=used / limit,
    )


def test_memory_that_is_full_soon_warns_long_before_it_is_high() -> None:
    noise = random.Random(3)
    leak = [memory(second, GIB + second * 20e6 + noise.uniform(-50e6, 50e6)) for second in range(400)]
    calm = [memory(second, leak[-1].memory_working_set_bytes) for second in range(400, 1400)]
    told = run([*leak, *calm])
    assert [(item.rule, item.kind) for item in told if item.rule == "memory full soon"] == [
        ("memory full soon", "fired"),
        ("memory full soon", "resolved"),
    ]
    first = told[0]
    assert first.rule == "memory full soon"
    assert first.time_seconds < 300
    assert first.value == pytest.approx(leak[int(first.time_seconds)].memory_available_bytes / 20e6, rel=0.1)
    assert first.message.startswith("memory is full in ")


def test_memory_that_only_wobbles_is_not_full_soon() -> None:
    noise = random.Random(4)
    assert run([memory(second, 8 * GIB + noise.uniform(-2e9, 2e9)) for second in range(2000)]) == []


def test_a_new_limit_begins_the_trend_anew() -> None:
    grow = [memory(second, GIB + second * 20e6) for second in range(100)]
    moved = [memory(second, 2 * GIB, limit=4 * GIB) for second in range(100, 400)]
    assert run([*grow, *moved]) == []


def test_an_oom_kill_is_seen_at_once_and_over_after_a_minute() -> None:
    kills = [0.0] * 10 + [2.0] * 100
    samples = [at(second, container_memory_oom_kills_total=value) for second, value in enumerate(kills)]
    told = run(samples)
    assert [(item.kind, item.time_seconds, item.severity) for item in told] == [
        ("fired", 10, Severity.CRITICAL),
        ("resolved", 70, Severity.NONE),
    ]
    assert "ended 2 processes" in told[0].message


def test_kills_of_before_and_a_missing_counter_are_no_news() -> None:
    assert run([at(second, container_memory_oom_kills_total=5.0) for second in range(100)]) == []
    assert run([at(second) for second in range(100)]) == []


def test_an_oom_kill_in_a_gap_is_told() -> None:
    told = run(
        [
            at(0, container_memory_oom_kills_total=0.0),
            at(100, container_memory_oom_kills_total=1.0)._replace(gap=1.0),
        ]
    )
    assert [item.kind for item in told] == ["fired", "resolved"]


def test_it_is_said_again_while_it_fires_until_somebody_has_seen_it() -> None:
    rule = AlertRule("cpu high", "cpu", "cpu_utilization_ratio", 0.7, 0.9, for_seconds=0, repeat_seconds=60)
    engine = AlertEngine([rule])
    found = [item for second in range(200) for item in engine.observe(at(second, cpu_utilization_ratio=0.8))]
    assert [(item.kind, item.time_seconds) for item in found] == [
        ("fired", 0),
        ("repeated", 60),
        ("repeated", 120),
        ("repeated", 180),
    ]
    engine.acknowledge(found[0].alert_id)
    assert [item for second in range(200, 400) for item in engine.observe(at(second, cpu_utilization_ratio=0.8))] == []


def test_a_rule_of_the_users_on_a_rate() -> None:
    rule = AlertRule(
        "download",
        "network",
        "network_receive_bytes_per_second",
        1e6,
        1e9,
        for_seconds=2,
        keep_seconds=2,
        unit="bytes/s",
    )
    engine = AlertEngine([rule])
    total, found = 0.0, []
    for second in range(20):
        total += 2e6 if 5 <= second < 12 else 10.0
        found += engine.observe(at(second, network_receive_bytes_total=total))
    assert [(item.kind, item.time_seconds) for item in found] == [("fired", 7), ("resolved", 14)]


def test_a_rule_can_watch_for_too_little() -> None:
    rule = AlertRule(
        "little disk",
        "disk",
        "filesystem_avail_bytes",
        5e9,
        1e9,
        for_seconds=0,
        keep_seconds=0,
        unit="bytes",
        below=True,
    )
    engine = AlertEngine([checked(rule)])
    left = [9e9, 5e9, 0.5e9, 5.1e9, 6e9]
    found = [
        item for second, value in enumerate(left) for item in engine.observe(at(second, filesystem_avail_bytes=value))
    ]
    assert [item.kind for item in found] == ["fired", "escalated", "de-escalated", "resolved"]
    assert found[-1].peak == 0.5e9
    assert found[1].message == "disk at 500 MB is critical (from 1.0 GB, escalated)"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"column": "cpu_utilisation"}, "column 'cpu_utilisation'"),
        ({"critical": 0.1}, "critical=0.1 must be at least warning=0.7"),
        ({"below": True}, "critical=0.9 must be at most"),
        ({"warning": math.nan}, "warning=nan is not a finite number"),
        ({"for_seconds": -1.0}, "for_seconds"),
        ({"clear_factor": 0.0}, "clear_factor=0"),
        ({"name": ""}, "name and resource"),
        ({"repeat_seconds": "often"}, "repeat_seconds='often'"),
        ({"phrase": 7}, "phrase=7 is not a text"),
        ({"unit": 5}, "unit=5 is not a text"),
        ({"name": 3}, "name=3 is not a text"),
        ({"resource": None}, "resource=None is not a text"),
        ({"below": "x"}, "below='x' is neither True nor False"),
    ],
)
def test_a_rule_that_cannot_be_judged_is_refused(change: dict[str, object], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        checked(replace(AlertRule("cpu high", "cpu", "cpu_utilization_ratio", 0.7, 0.9), **change))


def test_a_rule_travels_as_json() -> None:
    for rule in builtin_rules(PLAN):
        assert rule_from(json.loads(json.dumps(to_json_dict(rule)))) == rule


def test_what_people_read() -> None:
    assert shown(math.nan, "ratio") == "an unknown value"
    assert shown(math.inf, "seconds") == "no foreseeable time"
    assert shown(4321.0, "fds") == "4321 fds"


def test_no_trend_rule_where_the_settings_say_never() -> None:
    names = {rule.name for rule in builtin_rules(replace(PLAN, memory_full_within=0.0, disk_full_within=0.0))}
    assert names == {"cpu high", "memory high", "disk high", "out of memory", "sampler starved"}


def test_numbers_of_numpy_are_numbers() -> None:
    rule = checked(AlertRule("n", "r", "process_count", np.int64(5), np.float32(6.0)))
    assert (rule.warning, rule.critical) == (5.0, 6.0)
    assert json.loads(json.dumps(to_json_dict(rule)))["warning"] == 5.0


@pytest.mark.parametrize("below", [False, True])
def test_a_negative_level_clears_beyond_itself(below: bool) -> None:
    rule = AlertRule("n", "r", "system_load1", -1.0, -1.0, for_seconds=0, keep_seconds=0, clear_factor=0.5, below=below)
    engine = AlertEngine([checked(rule)])
    just, beyond = (-1.3, 0.5) if below else (-0.7, -2.6)
    found = [item.kind for second in range(20) for item in engine.observe(at(second, system_load1=just))]
    assert found == ["fired"]
    assert [item.kind for item in engine.observe(at(20, system_load1=beyond))] == ["resolved"]


def test_an_alert_that_ends_with_the_watching_does_not_claim_to_be_over() -> None:
    engine = AlertEngine([AlertRule("cpu high", "cpu", "cpu_utilization_ratio", 0.7, 0.9, for_seconds=0)])
    engine.observe(at(0, cpu_utilization_ratio=0.8))
    (ended,) = engine.finish(10.0)
    assert ended.message == "cpu high: cpu was at 80 % when watching ended, after 10.0 s (worst: 80 %)"


@pytest.mark.filterwarnings("error")
def test_narrow_numbers_of_numpy_are_compared_as_floats() -> None:
    level = np.float32(1)
    rule = replace(AlertRule("r", "cpu", "cpu_utilization_ratio", level, NEVER), keep_seconds=np.float32(2))
    assert checked(rule) == AlertRule("r", "cpu", "cpu_utilization_ratio", 1.0, NEVER, keep_seconds=2.0)


def test_a_number_beyond_all_floats_is_refused() -> None:
    with pytest.raises(UsageError, match=r"warning=10000.* is not a finite number; give one"):
        checked(AlertRule("r", "cpu", "cpu_utilization_ratio", 10**400, 10**400))


def test_rules_one_by_one_are_judged_as_all_at_once() -> None:
    first = AlertRule("a", "a", "cpu_utilization_ratio", 0.7, 0.9, for_seconds=0)
    rules = [first, AlertRule("b", "b", "disk_read_bytes_per_second", 5, 9, for_seconds=0, unit="bytes")]
    one_by_one, at_once = AlertEngine([first]), AlertEngine([first])
    assert [item.kind for item in one_by_one.observe(at(0, cpu_utilization_ratio=0.8))] == ["fired"]
    at_once.observe(at(0, cpu_utilization_ratio=0.8))
    # The same rule again changes nothing; other levels leave its alert open.
    for rules_now in ([first], rules, [replace(first, warning=0.5), rules[1]]):
        for rule in rules_now:
            one_by_one.add_rule(rule, 0.0)
        at_once.replace_rules(rules_now, 0.0)
        assert one_by_one._rules == at_once._rules
        assert one_by_one._status == at_once._status
    samples = [at(second, cpu_utilization_ratio=0.6, disk_read_bytes_total=second * 10.0) for second in (1, 2, 3)]
    told = [[item for sample in samples for item in engine.observe(sample)] for engine in (one_by_one, at_once)]
    assert told[0] == told[1]
    assert [item.rule for item in told[0]] == ["b"]
