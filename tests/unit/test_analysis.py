"""Summaries and busiest minutes of a history."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings

from tests.unit.test_tiers import series as sample_series
from wiseflow_nb.errors import UsageError
from wiseflow_nb.frames import cell_frame, task_frame
from wiseflow_nb.records import GAUGE_COLUMNS, CellRecord, Sample, TaskRecord, TaskState
from wiseflow_nb.resources._analysis import busiest, summary
from wiseflow_nb.resources._history import RATES, raw_history

CPU = "cpu_utilization_ratio"
START = 1_700_000_040.0  # a whole minute


def history(values: list[float], *, interval: float = 1.0, gap_at: int = -1, **options: object) -> pd.DataFrame:
    rows = [
        Sample(
            START + n * interval,
            n * interval,
            interval if n else math.nan,
            float(n == gap_at),
            cpu_utilization_ratio=value,
            disk_read_bytes_total=n * 100.0,
        )
        for n, value in enumerate(values)
    ]
    return raw_history(np.array(rows, dtype=float), **options)


def test_each_sample_weighs_as_long_as_it_lasted() -> None:
    rows = [
        Sample(0.0, 0.0, math.nan, 0.0, cpu_utilization_ratio=0.9),
        Sample(10.0, 10.0, 10.0, 0.0, cpu_utilization_ratio=0.1),
        Sample(11.0, 11.0, 1.0, 0.0, cpu_utilization_ratio=0.8),
        Sample(12.0, 12.0, 1.0, 0.0),
        Sample(600.0, 600.0, 588.0, 1.0, cpu_utilization_ratio=1.0),
        Sample(602.0, 602.0, 2.0, 0.0, cpu_utilization_ratio=0.7),
    ]
    made = summary(raw_history(np.array(rows, dtype=float)), {"cpu": (0.7, 0.8), "memory": (0.5, 0.6)}).loc[CPU]
    assert made["min"] == 0.1
    assert made["max"] == 1.0
    assert made["last"] == 0.7
    assert made["mean"] == pytest.approx((10 * 0.1 + 1 * 0.8 + 2 * 0.7) / 13)
    assert made["p95"] == 0.8
    assert made["warning_seconds"] == 3.0
    assert made["critical_seconds"] == 1.0


def test_a_summary_has_a_row_for_each_gauge_and_each_rate() -> None:
    made = summary(history([0.5] * 100), {"cpu": (0.4, 0.6)})
    assert list(made.index) == [*GAUGE_COLUMNS, *RATES]
    assert made.index.name == "column"
    assert made.loc["disk_read_bytes_per_second", ["min", "mean", "p95", "max", "last"]].tolist() == [100.0] * 5
    assert made.loc["system_load1"].isna().all()
    assert made.loc[CPU, ["warning_seconds", "critical_seconds"]].tolist() == [99.0, 0.0]
    assert made["warning_seconds"].notna().sum() == 1
    assert summary(history([0.5] * 3, rates=True)).loc["disk_read_bytes_per_second", "mean"] == 100.0


def test_buckets_keep_the_extremes_of_the_samples() -> None:
    values = [0.1, 0.9, 0.2] * 200
    raw, rolled = summary(history(values)), summary(history(values, resolution=60))
    for column in ("min", "max"):
        assert raw.loc[CPU, column] == rolled.loc[CPU, column]
    assert rolled.loc[CPU, "mean"] == pytest.approx(raw.loc[CPU, "mean"], rel=0.01)
    assert rolled.loc[CPU, "p95"] < raw.loc[CPU, "p95"]
    assert rolled.attrs["resolution_seconds"] == 60.0


@settings(deadline=None)
@given(sample_series())
def test_a_summary_is_in_order_whatever_the_series(samples: list[Sample]) -> None:
    for resolution in ("raw", 10.0):
        made = summary(raw_history(np.array(samples, dtype=float), resolution=resolution)).dropna(subset=["mean"])
        slack = 1e-9 * made[["min", "max"]].abs().max(axis=1)
        assert (made["min"] <= made["mean"] + slack).all()
        assert (made["mean"] <= made["max"] + slack).all()
        assert (made["min"] <= made["p95"]).all()
        assert (made["p95"] <= made["max"]).all()


def test_nothing_is_summarised_as_nothing() -> None:
    made = summary(history([]), {"cpu": (0.7, 0.9)})
    assert made[["min", "mean", "p95", "max", "last"]].isna().all(axis=None)
    assert made.loc[CPU, "warning_seconds"] == 0.0
    assert len(busiest(history([]))) == 0
    assert summary(history([0.25])).loc[CPU, "mean"] == 0.25


def test_the_busiest_minutes_come_first_with_what_ran_in_them() -> None:
    values = [0.1] * 60 + [0.8] * 60 + [0.3] * 60 + [0.9] * 60
    cells = cell_frame(
        [
            CellRecord("a", 1, "x", START + 10, START + 130),
            CellRecord("b", 2, "y", START + 131, START + 135),
            CellRecord("c", 3, "z", START + 200),
        ]
    )
    tasks = task_frame(
        [
            TaskRecord("t1", "load", TaskState.COMPLETED, started_seconds=START + 60, finished_seconds=START + 70),
            TaskRecord("t2", "waits", TaskState.PENDING),
            TaskRecord("t3", "long", TaskState.RUNNING, started_seconds=START + 30),
        ]
    )
    made = busiest(history(values), 3, cells=cells, tasks=tasks)
    assert [stamp.timestamp() - START for stamp in made.index] == [180.0, 60.0, 120.0]
    assert (made.index.name, str(made.index.tz)) == ("time", "UTC")
    assert made["mean"].tolist() == pytest.approx([0.9, 0.8, 0.3])
    assert made["max"].tolist() == [0.9, 0.8, 0.3]
    assert made["seconds"].tolist() == [60.0] * 3
    assert made["cells"].tolist() == [(3,), (1,), (1, 2)]
    assert made["tasks"].tolist() == [("long",), ("long", "load"), ("long",)]
    assert made.attrs["by"] == CPU


def test_any_column_or_rate_can_be_asked_for() -> None:
    plain = history([0.5] * 180)
    for frame in (plain, history([0.5] * 180, rates=True), history([0.5] * 180, resolution=10)):
        made = busiest(frame, 1, by="disk_read_bytes_per_second")
        assert made["mean"].tolist() == pytest.approx([100.0])
        assert made["cells"].tolist() == [()]
    peaks = history([0.0] * 59 + [1.0] + [0.5] * 60, resolution=10)
    assert busiest(peaks, 2)["max"].tolist() == [0.5, 1.0]
    with pytest.raises(UsageError, match=r"no column 'cpu'.*cpu_utilization_ratio"):
        busiest(plain, by="cpu")
    for bad in (0, -1, 1.5, "3", True):
        with pytest.raises(UsageError, match="whole number"):
            busiest(plain, bad)  # type: ignore[arg-type]
    for call in (summary, busiest):
        with pytest.raises(UsageError, match="what history"):
            call(pd.DataFrame({"x": [1]}))


def test_a_rate_across_the_row_of_a_gap_is_unknown() -> None:
    made = summary(history([0.5] * 10, gap_at=5))
    assert made.loc["disk_read_bytes_per_second", "mean"] == 100.0
    assert made.loc[CPU, "mean"] == 0.5
    assert history([0.5] * 10, gap_at=5).isna().all(axis=1).sum() == 1
