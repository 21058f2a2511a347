"""The Prometheus text, read back by Prometheus' own parser."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from wiseflow_nb.errors import MissingExtraError
from wiseflow_nb.metrics import help_of, metrics_text
from wiseflow_nb.records import (
    COUNTER_COLUMNS,
    NAN,
    SAMPLE_COLUMNS,
    AlertState,
    AlertView,
    PoolStatus,
    Sample,
    SessionInfo,
    SessionState,
    Severity,
    Snapshot,
    TaskState,
)
from wiseflow_nb.session import Session
from wiseflow_nb.view import StoreView

INFO = SessionInfo("20260101-000000-abcdef", SessionState.LIVE, "etl", "here", 7, 1_700_000_000.0)
ALERT = AlertView("a", "memory high", "memory", Severity.CRITICAL, AlertState.FIRING, 1, 1, 1, 5.0, NAN, "m")
SHOT = Snapshot(
    info=INFO,
    time_seconds=9.0,
    rev=1,
    sample=Sample(*(float(number) for number in range(len(SAMPLE_COLUMNS)))),
    tasks=(),
    task_counts={"running": 2, "failed": 1},
    pool=PoolStatus(workers=3, busy=2, completed=7, failed=1),
    alerts=(ALERT, replace(ALERT, alert_id="b", resolved_seconds=8.0)),
    cells=(),
    settings={},
    thresholds={},
)


def parsed(text: str) -> dict[str, tuple[str, str, dict[tuple[tuple[str, str], ...], float]]]:
    """Family -> (type, help, samples by their labels without session and host)."""
    found = {}
    for family in text_string_to_metric_families(text):
        samples = {}
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("session_id") == INFO.session_id
            assert labels.pop("host") == INFO.host
            assert set(labels) <= {"state", "severity"}
            samples[tuple(labels.items())] = sample.value
        assert family.name not in found
        found[family.name] = (family.type, family.documentation, samples)
    return found


def test_every_column_is_there_with_its_type_and_help() -> None:
    found = parsed(metrics_text(SHOT))
    for number, column in enumerate(SAMPLE_COLUMNS):
        counter = column in COUNTER_COLUMNS
        name = "wiseflow_" + (column.removesuffix("_total") if counter else column)
        kind, text, samples = found[name]
        assert kind == ("counter" if counter else "gauge")
        assert text.endswith(".")
        assert len(text) > 5
        assert samples == {(): float(number)}
    assert "wiseflow_disk_read_bytes_total{" in metrics_text(SHOT)


def test_tasks_pool_and_alerts() -> None:
    found = parsed(metrics_text(SHOT))
    tasks = found["wiseflow_tasks"][2]
    assert {key[0][1] for key in tasks} == {state.value for state in TaskState}
    assert tasks[("state", "running"),] == 2
    assert tasks[("state", "failed"),] == 1
    assert tasks[("state", "lost"),] == 0
    assert found["wiseflow_pool_busy"] == ("gauge", "Threads of the pool that run work now.", {(): 2.0})
    assert found["wiseflow_pool_completed"][0] == "counter"
    assert found["wiseflow_alerts_firing"][2] == {(("severity", "warning"),): 0.0, (("severity", "critical"),): 1.0}
    assert found["wiseflow_up"][2] == {(): 1.0}


def test_what_is_not_available_is_left_out_and_an_ended_session_is_down() -> None:
    ended = replace(SHOT, info=replace(INFO, state=SessionState.CRASHED), sample=Sample(time_seconds=5.0))
    found = parsed(metrics_text(ended))
    assert "wiseflow_memory_limit_bytes" not in found
    assert found["wiseflow_time_seconds"][2] == {(): 5.0}
    assert found["wiseflow_up"][2] == {(): 0.0}
    # Whatever was open when it ended is nobody's alarm any more.
    assert sum(found["wiseflow_alerts_firing"][2].values()) == 0
    assert "wiseflow_time_seconds" not in parsed(metrics_text(replace(SHOT, sample=None)))


@pytest.mark.parametrize("host", ['a"b\\c\nd', "\ud800", "表" * 500, "{x=1}", ""])
def test_a_hostile_host_name_stays_a_label(host: str) -> None:
    text = metrics_text(replace(SHOT, info=replace(INFO, host=host)))
    text.encode("utf-8")
    hosts = {sample.labels["host"] for family in text_string_to_metric_families(text) for sample in family.samples}
    assert hosts == {host[:200].encode("utf-8", "replace").decode()}


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match=r"wiseflow-nb\[prometheus\]"):
        metrics_text(SHOT)


def test_a_column_that_is_not_described_gets_its_name_in_words() -> None:
    assert help_of("gpu_memory_used_bytes") == "Gpu memory used, in bytes."


def test_a_session_and_its_file_give_the_same_names() -> None:
    with Session(title="measured", resource_check_interval=0.05) as session:
        assert session.tasks.submit(int).result(timeout=10) == 0
        assert session.sync(10)
        view = StoreView(session.directory)
        names = [
            {family.name for family in text_string_to_metric_families(text) if "pool" not in family.name}
            for text in (session.metrics(), view.metrics())
        ]
        view.close()
    assert "wiseflow_tasks" in names[0]
    assert names[0] ^ names[1] <= {f"wiseflow_{column.removesuffix('_total')}" for column in SAMPLE_COLUMNS}
