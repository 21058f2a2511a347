"""The figure of a history: bands, marks, rates, themes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from wiseflow_nb.dashboard import figure
from wiseflow_nb.errors import UsageError


@pytest.fixture
def history() -> pd.DataFrame:
    index = pd.date_range("2025-01-01", periods=60, freq="s", tz="UTC")
    return pd.DataFrame(
        {
            "cpu_utilization_ratio": np.linspace(0, 1, 60),
            "memory_utilization_ratio": 0.5,
            "filesystem_utilization_ratio": 0.6,
            "disk_read_bytes_total": np.arange(60) * 2e6,
            "network_receive_bytes_per_second": 3e6,
        },
        index=index,
    )


def test_percent_and_rates_are_in_their_units(history: pd.DataFrame) -> None:
    made = figure(history)
    traces = {trace.name: trace for trace in made.data}
    assert max(traces["CPU"].y) == pytest.approx(100)
    assert traces["read"].y[5] == pytest.approx(2.0)
    assert np.isnan(traces["read"].y[0])
    assert traces["received"].y[0] == pytest.approx(3.0)
    assert np.isnan(np.asarray(traces["sent"].y, dtype=float)).all()
    assert all(trace.type == "scatter" for trace in made.data)


def test_bands_lie_at_the_thresholds(history: pd.DataFrame) -> None:
    made = figure(history, {"cpu": (0.4, 0.5)})
    levels = {(shape.y0, shape.y1) for shape in made.layout.shapes}
    assert levels == {(40.0, 50.0), (50.0, 100)}


def test_cells_and_alerts_are_marked(history: pd.DataFrame) -> None:
    start = history.index[10].timestamp()
    cells = pd.DataFrame({"started_seconds": [start], "finished_seconds": [np.nan], "status": ["running"]})
    alerts = pd.DataFrame(
        {"resource": ["cpu"], "severity": ["critical"], "started_seconds": [start], "resolved_seconds": [start + 5]}
    )
    made = figure(history, cells=cells, alerts=alerts)
    assert len(made.layout.shapes) == 2
    assert {pd.Timestamp(shape.x0) for shape in made.layout.shapes} == {history.index[10]}


def test_themes_differ_and_others_are_refused(history: pd.DataFrame) -> None:
    assert figure(history, theme="dark").layout.paper_bgcolor != figure(history).layout.paper_bgcolor
    with pytest.raises(UsageError, match="theme"):
        figure(history, theme="pink")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="time index"):
        figure(history.reset_index())


def test_an_empty_history_is_an_empty_figure(history: pd.DataFrame) -> None:
    assert len(figure(history.iloc[:0]).data) == 7
