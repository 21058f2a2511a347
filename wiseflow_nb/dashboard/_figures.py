"""A figure of a history, for analysis and export: a pure function of frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from wiseflow_nb.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_PERCENT = (
    ("CPU (% of limit)", "cpu", "cpu_utilization_ratio", 0),
    ("Memory (% of limit)", "memory", "memory_utilization_ratio", 1),
    ("Disk (%)", "disk", "filesystem_utilization_ratio", 2),
)
_RATES = (
    ("Disk I/O (MB/s)", (("disk_read_bytes", "read", 0), ("disk_written_bytes", "written", 3))),
    ("Network (MB/s)", (("network_receive_bytes", "received", 2), ("network_transmit_bytes", "sent", 1))),
)
_SERIES = {
    "light": ("#2563eb", "#7c3aed", "#0d9488", "#d97706"),
    "dark": ("#60a5fa", "#a78bfa", "#2dd4bf", "#fbbf24"),
}
_INK = {"light": ("#1f2430", "#e3e6ec", "#ffffff"), "dark": ("#e4e7ee", "#363b45", "#1b1e24")}
_WARNING, _CRITICAL = "rgba(245,158,11,0.13)", "rgba(239,68,68,0.14)"


def figure(
    history: pd.DataFrame,
    thresholds: Mapping[str, tuple[float, float]] | None = None,
    cells: pd.DataFrame | None = None,
    alerts: pd.DataFrame | None = None,
    theme: Literal["light", "dark"] = "light",
) -> go.Figure:
    """Return CPU, memory, disk, disk I/O and network over time as one figure.

    Parameters
    ----------
    history
        A frame as ``session.history()`` gives it: UTC ``DatetimeIndex``, columns of the schema
        (ratios of 0-1). Rates are taken from ``*_per_second`` columns, else made from the counters.
    thresholds
        ``{"cpu": (warning, critical), ...}`` as ratios of 0-1; drawn as bands.
    cells, alerts
        Frames with ``started_seconds`` and ``finished_seconds`` or ``resolved_seconds`` (epoch);
        drawn on the time axis.
    theme
        ``"light"`` or ``"dark"``.

    Raises
    ------
    UsageError
        If the theme is neither, or the frame has no time index.

    Examples
    --------
    >>> import pandas as pd
    >>> index = pd.date_range("2025-01-01", periods=3, freq="s", tz="UTC")
    >>> frame = pd.DataFrame({"cpu_utilization_ratio": [0.1, 0.5, 0.2]}, index=index)
    >>> figure(frame, {"cpu": (0.72, 0.9)}).layout.title.text
    'Resources'
    """
    import pandas as pd
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    if theme not in _SERIES:
        raise UsageError(f"theme={theme!r} is not known; give 'light' or 'dark'")
    if not isinstance(history.index, pd.DatetimeIndex):
        raise UsageError("history has no time index; give what session.history() returns")
    colours = _SERIES[theme]
    titles = [item[0] for item in _PERCENT] + [item[0] for item in _RATES]
    drawn = make_subplots(rows=5, cols=1, shared_xaxes=True, vertical_spacing=0.045, subplot_titles=titles)
    for row, (title, resource, column, colour) in enumerate(_PERCENT, start=1):
        values = history[column] * 100.0 if column in history else pd.Series(index=history.index, dtype="float64")
        drawn.add_trace(_line(go, history.index, values, title.partition(" (")[0], colours[colour], True), row, 1)
        drawn.update_yaxes(range=[0, 100], row=row, col=1)
        if thresholds and resource in thresholds:
            warning, critical = (level * 100.0 for level in thresholds[resource])
            drawn.add_hrect(y0=warning, y1=critical, fillcolor=_WARNING, line_width=0, layer="below", row=row, col=1)
            drawn.add_hrect(y0=critical, y1=100, fillcolor=_CRITICAL, line_width=0, layer="below", row=row, col=1)
        for start, end, severity in _spans(alerts, resource, "resolved_seconds", "severity", history.index):
            shade = "#ef4444" if severity == "critical" else "#f59e0b"
            drawn.add_vrect(x0=start, x1=end, fillcolor=shade, opacity=0.12, line_width=0, row=row, col=1)
    for row, (_, members) in enumerate(_RATES, start=len(_PERCENT) + 1):
        for column, name, colour in members:
            drawn.add_trace(
                _line(go, history.index, _rate(history, column) / 1e6, name, colours[colour], False), row, 1
            )
        drawn.update_yaxes(rangemode="tozero", row=row, col=1)
    for start, end, status in _spans(cells, None, "finished_seconds", "status", history.index):
        shade = "#ef4444" if status == "error" else colours[0]
        span = {"type": "rect", "xref": "x", "yref": "paper", "x0": start, "x1": end, "y0": -0.012, "y1": -0.004}
        drawn.add_shape(**span, fillcolor=shade, opacity=0.7, line_width=0)
    ink, grid, paper = _INK[theme]
    drawn.update_xaxes(gridcolor=grid, zeroline=False, linecolor=grid)
    # Room for the cells' bars between the lowest chart and its labels.
    drawn.update_xaxes(ticks="outside", ticklen=12, tickcolor="rgba(0,0,0,0)", row=5, col=1)
    drawn.update_yaxes(gridcolor=grid, zeroline=False)
    drawn.update_annotations(font={"size": 13, "color": ink}, x=0, xanchor="left")
    drawn.update_layout(
        title={"text": "Resources"},
        height=980,
        margin={"l": 56, "r": 24, "t": 84, "b": 48},
        font={"family": "system-ui, sans-serif", "color": ink},
        paper_bgcolor=paper,
        plot_bgcolor=paper,
        hovermode="x unified",
        showlegend=False,
        modebar={"remove": ["sendChartToCloud"]},
    )
    return drawn


def _line(go: Any, x: Any, y: Any, name: str, colour: str, filled: bool) -> Any:
    return go.Scatter(
        x=x,
        y=y,
        name=name,
        mode="lines",
        line={"color": colour, "width": 1.6},
        fill="tozeroy" if filled else None,
        fillcolor=_faint(colour) if filled else None,
        hovertemplate="%{y:.1f}",
    )


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.14)"


def _rate(history: pd.DataFrame, counter: str) -> Any:
    import pandas as pd

    if f"{counter}_per_second" in history:
        return history[f"{counter}_per_second"]
    if f"{counter}_total" not in history:
        return pd.Series(index=history.index, dtype="float64")
    change = history[f"{counter}_total"].diff()
    seconds = history.index.to_series().diff().dt.total_seconds()
    return (change / seconds).where(change >= 0)


def _spans(
    frame: pd.DataFrame | None, resource: str | None, end_column: str, tag_column: str, index: pd.DatetimeIndex
) -> list[tuple[Any, Any, str]]:
    import pandas as pd

    if frame is None or frame.empty or "started_seconds" not in frame or not len(index):
        return []
    if resource is not None and "resource" in frame:
        frame = frame[frame["resource"] == resource]
    ends = frame[end_column] if end_column in frame else pd.Series(float("nan"), index=frame.index)
    tags = frame[tag_column] if tag_column in frame else pd.Series("", index=frame.index)
    zone = index.tz
    last = index[-1]
    spans = []
    for start, end, tag in zip(frame["started_seconds"], ends, tags, strict=True):
        begin = pd.Timestamp(start, unit="s", tz="UTC").tz_convert(zone)
        finish = last if pd.isna(end) else pd.Timestamp(end, unit="s", tz="UTC").tz_convert(zone)
        spans.append((begin, finish, str(getattr(tag, "value", tag))))
    return spans
