"""What the page is told, as pure values."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from tests.browser.fake_view import FakeView
from wiseflow_nb.dashboard import _payload as payload
from wiseflow_nb.records import NAN, Priority, Sample, SessionState, TaskRecord, TaskState


@pytest.fixture
def view() -> FakeView:
    return FakeView(50, now=lambda: 1_700_000_000.0)


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.5, "50 %"), (0.051, "5.1 %"), (0.0, "0 %"), (NAN, "n/a"), (0.0999, "10 %"), (1.0, "100 %")]
)
def test_percent(ratio: float, text: str) -> None:
    assert payload.percent(ratio) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (200 * 1024**3, "200 GiB"),
        (3 * 1024**5, "3072 TiB"),
        (NAN, "n/a"),
    ],
)
def test_human_bytes(value: float, text: str) -> None:
    assert payload.human_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12 s"), (75, "1 min 15 s"), (3700, "1 h 1 min"), (90_000, "1 d 1 h"), (math.inf, "n/a")]
)
def test_human_seconds(value: float, text: str) -> None:
    assert payload.human_seconds(value) == text


def test_the_level_follows_the_thresholds() -> None:
    pair = (0.72, 0.9)
    assert [payload.level(value, pair) for value in (0.71, 0.72, 0.9, NAN)] == ["ok", "warning", "critical", "none"]


def test_cards_show_effective_limits_and_their_source(view: FakeView) -> None:
    cards = payload.cards(view.snapshot())
    assert cards["card:cpu"]["detail"] == "0.5 cores · cgroup1"
    assert cards["card:memory"]["detail"].endswith("of 23.4 GiB · cgroup2")
    assert cards["card:cpu"]["ticks"] == [0.72, 0.9]
    assert cards["card:workers"]["value"] == "5 / 6"
    assert "memory allows 6" in cards["card:workers"]["detail"]
    assert cards["card:tasks"]["value"] == "6 running"


def test_no_sample_is_a_skeleton_and_nan_is_not_available(view: FakeView) -> None:
    snapshot = view.snapshot()
    assert payload.cards(replace(snapshot, sample=None))["card:cpu"]["value"] is None
    unknown = payload.cards(replace(snapshot, sample=Sample()))["card:cpu"]
    assert unknown["value"] == "n/a"
    assert unknown["ratio"] is None
    json.dumps(unknown, allow_nan=False)


def test_a_live_session_without_heartbeat_is_stale(view: FakeView) -> None:
    info = view.snapshot().info
    assert payload.session_part(info, info.last_seen_seconds + 3)["stale"] == ""
    assert payload.session_part(info, info.last_seen_seconds + 12)["stale"] == "no heartbeat for 12 s"
    ended = replace(info, state=SessionState.ENDED)
    assert payload.session_part(ended, info.last_seen_seconds + 12)["stale"] == ""
    assert "crashed" in payload.why_no_control(replace(info, state=SessionState.CRASHED))


def test_rows_are_compact_and_json() -> None:
    task = TaskRecord(
        "t1", "etl", TaskState.RUNNING, Priority.HIGH, started_seconds=5.04, error="one\ntwo", progress=0.12345
    )
    row = payload.task_row(task)
    assert row == ["t1", "etl", 2, 2, 0.123, 5.0, None, None, None, 0, 1, "one"]
    assert payload.STATES[row[2]] == "running"
    assert payload.task_row(replace(task, state=TaskState.COMPLETED))[4] == 1.0
    assert payload.task_row(replace(task, state=TaskState.FAILED))[4] == 0.123
    assert payload.task_row(TaskRecord("t2", "silent", TaskState.COMPLETED))[4] is None
    waiting = payload.task_row(replace(task, state=TaskState.WAITING, created_seconds=3.0))
    assert waiting[5] == 3.0
    assert payload.task_row(replace(task, state=TaskState.LOST))[5] is None


def test_alerts_come_live_first_with_figures_in_their_unit(view: FakeView) -> None:
    parts = payload.alert_parts(view.snapshot().alerts)
    assert parts["order"] == ["a3", "a2", "a1"]
    assert (parts["live"], parts["past"]) == (1, 2)
    assert parts["alert:a3"]["threshold"] == "90 %"
    alert = view.snapshot().alerts[0]
    assert payload.alert_figure(replace(alert, unit="seconds"), 125.0) == "2 min 5 s"
    assert payload.alert_figure(replace(alert, unit="jobs"), 12.0) == "12 jobs"
    assert payload.alert_figure(alert, NAN) == "n/a"


def test_marks_leave_out_what_ended_before_the_range(view: FakeView) -> None:
    snapshot = view.snapshot()
    marks = payload.mark_part(snapshot.alerts, snapshot.cells, 1_700_000_000.0 - 300)
    assert [cell[0] for cell in marks["cells"]] == [13]
    assert [alert[1] for alert in marks["alerts"]] == ["critical"]


def test_every_live_setting_has_a_range_a_default_and_a_label() -> None:
    fields = payload.setting_fields()
    assert {field["name"] for field in fields} == set(payload.LIVE_SETTINGS)
    for field in fields:
        assert field["low"] is not None
        assert field["high"] is not None
        assert field["label"]
    by_name = {field["name"]: field for field in fields}
    assert by_name["cpu_threshold"]["above"]
    assert by_name["warning_threshold_factor"]["below"]
    assert by_name["max_thread_workers"]["whole"]
    assert by_name["cpu_threshold"]["unit"] == "%"
