"""What a history says in a few rows: a summary, and the busiest minutes. Pure functions of frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wiseflow_nb.errors import UsageError
from wiseflow_nb.records import GAUGE_COLUMNS, SAMPLE_COLUMNS
from wiseflow_nb.resources._history import RATES, rate

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

#: The column that each resource's thresholds are about.
THRESHOLD_COLUMNS = {
    "cpu": "cpu_utilization_ratio",
    "memory": "memory_utilization_ratio",
    "disk": "filesystem_utilization_ratio",
}
MINUTE_SECONDS = 60.0


def summary(history: pd.DataFrame, thresholds: Mapping[str, tuple[float, float]] | None = None) -> pd.DataFrame:
    """Summarise a history: one row a gauge and one row a counter's rate.

    Each sample stands for the interval before it; gaps stand for nothing. In a history of buckets the
    minimum and maximum are those of the samples, while the 95th percentile and the seconds over a
    threshold are those of the buckets' means.

    Parameters
    ----------
    history
        As ``history()`` gives it, at any resolution. Rates that it lacks are computed.
    thresholds
        (warning, critical) ratios of 0-1 by ``cpu``, ``memory``, ``disk``.

    Returns
    -------
    DataFrame
        Indexed by ``column``: ``min``, ``mean``, ``p95``, ``max``, ``last`` in the column's own unit
        (mean and p95 weighted by time), ``warning_seconds`` and ``critical_seconds`` at or over the
        threshold (critical time counts as warning too; NaN where the column has no threshold).

    Raises
    ------
    UsageError
        If ``history`` is no history.

    Examples
    --------
    >>> import numpy as np
    >>> from wiseflow_nb.records import Sample
    >>> from wiseflow_nb.resources._history import frame
    >>> rows = np.array([Sample(float(n), float(n), 1.0, cpu_utilization_ratio=n / 4) for n in range(5)])
    >>> made = summary(frame(rows), {"cpu": (0.7, 0.9)})
    >>> made.loc["cpu_utilization_ratio", ["mean", "max", "warning_seconds", "critical_seconds"]].tolist()
    [0.5, 1.0, 2.0, 1.0]
    """
    import numpy as np
    import pandas as pd

    _check(history)
    weights = _weights(history)
    limits = {THRESHOLD_COLUMNS[name]: pair for name, pair in (thresholds or {}).items() if name in THRESHOLD_COLUMNS}
    rows = {}
    for name in (*GAUGE_COLUMNS, *RATES):
        values = _values(history, name)
        lows, highs = (history.get(f"{name}_{end}", pd.Series(values)).to_numpy() for end in ("min", "max"))
        known = np.flatnonzero(~np.isnan(values))
        warning, critical = limits.get(name, (np.nan, np.nan))
        rows[name] = (
            _extreme(np.fmin, lows),
            _mean(values[known], weights[known]),
            _quantile(values[known], weights[known], 0.95),
            _extreme(np.fmax, highs),
            values[known[-1]] if len(known) else np.nan,
            weights[values >= warning].sum() if warning == warning else np.nan,
            weights[values >= critical].sum() if critical == critical else np.nan,
        )
    names = ["min", "mean", "p95", "max", "last", "warning_seconds", "critical_seconds"]
    made = pd.DataFrame.from_dict(rows, orient="index", columns=names, dtype="float64")
    made.index.name = "column"
    made.attrs.update(history.attrs)
    return made


def busiest(
    history: pd.DataFrame,
    n: int = 10,
    *,
    by: str = "cpu_utilization_ratio",
    cells: pd.DataFrame | None = None,
    tasks: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Return the busiest minutes of a history, busiest first, and what ran in them.

    Parameters
    ----------
    history
        As ``history()`` gives it, at a resolution of 60 s or finer for minutes to be minutes.
    n
        How many minutes, at least 1.
    by
        A column of the schema, or ``<counter>_per_second``; minutes are ordered by its mean.
    cells, tasks
        As ``cell_history()`` and ``task_history()`` give them.

    Returns
    -------
    DataFrame
        Indexed by ``time``, the start of the minute (UTC): ``mean`` (weighted by time) and ``max`` in
        the column's unit, ``seconds`` that samples cover, and ``cells`` (numbers) and ``tasks``
        (names): tuples of those whose time overlaps the minute, in order of their start.

    Raises
    ------
    UsageError
        If there is no such column or ``n`` is not a whole number above 0.

    Examples
    --------
    >>> import numpy as np
    >>> from wiseflow_nb.records import Sample
    >>> from wiseflow_nb.resources._history import frame
    >>> rows = np.array([Sample(float(n), float(n), 1.0, cpu_utilization_ratio=n // 60) for n in range(180)])
    >>> busiest(frame(rows), 2)["mean"].tolist()
    [2.0, 1.0]
    """
    import numpy as np
    import pandas as pd

    _check(history)
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise UsageError(f"n is {n!r}; give a whole number of minutes above 0")
    values, weights = _values(history, by), _weights(history)
    highs = history[f"{by}_max"].to_numpy() if f"{by}_max" in history else values
    known = ~np.isnan(values)
    minutes = np.floor(history["time_seconds"].to_numpy() / MINUTE_SECONDS)
    rows = []
    for minute in np.unique(minutes[known]):
        at = known & (minutes == minute)
        rows.append(
            (minute * MINUTE_SECONDS, _mean(values[at], weights[at]), _extreme(np.fmax, highs[at]), weights[at].sum())
        )
    rows.sort(key=lambda row: (-row[1], row[0]))
    rows = rows[:n]
    times = pd.to_datetime([row[0] for row in rows], unit="s", utc=True)
    made = pd.DataFrame(
        [row[1:] for row in rows],
        columns=["mean", "max", "seconds"],
        index=pd.DatetimeIndex(times, name="time"),
        dtype="float64",
    )
    made["cells"] = _during(rows, cells, "number")
    made["tasks"] = _during(rows, tasks, "name")
    made.attrs.update({**history.attrs, "by": by})
    return made


def _check(history: Any) -> None:
    missing = [
        name for name in ("time_seconds", "interval_seconds", "gap") if name not in getattr(history, "columns", ())
    ]
    if missing:
        raise UsageError(f"a history has the column {missing[0]}, this has not; give what history() returns")


def _weights(history: pd.DataFrame) -> np.ndarray:
    """The seconds that each row stands for."""
    import numpy as np

    seconds = history["interval_seconds"].to_numpy()
    # In buckets the covered time leaves the gap out already.
    gap = np.zeros(len(seconds)) if "sample_count" in history else history["gap"].to_numpy()
    return np.where(np.isnan(seconds) | (gap != 0), 0.0, seconds)


def _values(history: pd.DataFrame, name: str) -> np.ndarray:
    if name in history:
        return history[name].to_numpy(dtype="float64")
    if name not in RATES:
        raise UsageError(
            f"a history has no column {name!r}; it has {', '.join(SAMPLE_COLUMNS)}, "
            "and <counter>_per_second for each <counter>_total"
        )
    # The row of NaN in a gap is no sample; the one after it has the mark of the gap.
    at = history["time_seconds"].notna().to_numpy()
    monotonic, values, gaps = (history[column].to_numpy()[at] for column in ("monotonic_seconds", RATES[name], "gap"))
    made = at * float("nan")
    made[at] = rate(monotonic, values, gaps)
    return made


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    if not len(values):
        return float("nan")
    total = weights.sum()
    # A single sample stands for no time yet.
    return float((values * weights).sum() / total) if total > 0 else float(values.mean())


def _quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    """The least value that at least ``share`` of the time lies at or below."""
    import numpy as np

    if not len(values):
        return float("nan")
    order = np.argsort(values)
    weights = weights if weights.sum() > 0 else np.ones(len(values))
    reached = np.cumsum(weights[order])
    at = np.searchsorted(reached, share * reached[-1] * (1 - 1e-12))
    return float(values[order][min(at, len(values) - 1)])


def _extreme(which: np.ufunc, values: np.ndarray) -> float:
    return float(which.reduce(values)) if len(values) else float("nan")


def _during(rows: Sequence[tuple[float, ...]], records: pd.DataFrame | None, label: str) -> list[tuple[Any, ...]]:
    """For each minute, the labels of the records whose time overlaps it; without an end it is still running."""
    import numpy as np

    if records is None or not len(records):
        return [()] * len(rows)
    table = records.reset_index().dropna(subset=["started"]).sort_values("started", kind="stable")
    labels = table[label].tolist()
    starts, ends = (
        np.array([stamp.timestamp() if stamp == stamp else np.inf for stamp in table[name]])
        for name in ("started", "finished")
    )
    return [
        tuple(labels[at] for at in np.flatnonzero((starts < row[0] + MINUTE_SECONDS) & (ends >= row[0])))
        for row in rows
    ]
