"""Samples as arrays and frames: rates, gaps, decimation. Loads numpy and pandas when first used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from wiseflow_nb.records import COUNTER_COLUMNS, SAMPLE_COLUMNS

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

Moment = float | str | datetime
_AT = {name: index for index, name in enumerate(SAMPLE_COLUMNS)}
RATES = {name.removesuffix("_total") + "_per_second": name for name in COUNTER_COLUMNS}


def rate(times: np.ndarray, values: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Change per second of a counter; NaN for the first, across gaps, and where it went back."""
    import numpy as np

    result = np.full(len(values), np.nan)
    if len(values) > 1:
        elapsed, change = np.diff(times), np.diff(values)
        with np.errstate(divide="ignore", invalid="ignore"):
            result[1:] = np.where((elapsed > 0) & (change >= 0) & (gaps[1:] == 0), change / elapsed, np.nan)
    return result


def moment(value: Moment | None, default: float) -> float:
    """Return seconds since the epoch of a number, a text or a date; one without a zone is UTC.

    Examples
    --------
    >>> moment("1970-01-01 00:01", 0.0)
    60.0
    """
    if value is None:
        return default
    if isinstance(value, (int, float)):
        return float(value)
    import pandas as pd

    stamp = pd.Timestamp(value)
    return float((stamp.tz_localize("UTC") if stamp.tzinfo is None else stamp).timestamp())


def frame(
    rows: np.ndarray,
    *,
    rates: bool = False,
    since: Moment | None = None,
    until: Moment | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Return samples as a DataFrame with a UTC index named ``time``; always a copy.

    Parameters
    ----------
    rows
        Shape (n, columns), float64, in the order of ``SAMPLE_COLUMNS``.
    rates
        Add ``<counter>_per_second`` for each counter.
    since, until
        First and last moment, both included: seconds since the epoch, a text or a date (UTC
        where it names no zone).
    attrs
        Goes to ``DataFrame.attrs``.
    """
    import numpy as np
    import pandas as pd

    rows = rows.reshape(-1, len(SAMPLE_COLUMNS))
    index = pd.to_datetime(rows[:, 0].round(6), unit="s", utc=True)
    result = pd.DataFrame(
        np.array(rows, copy=True), columns=list(SAMPLE_COLUMNS), index=pd.DatetimeIndex(index, name="time")
    )
    if rates:
        monotonic, gaps = rows[:, _AT["monotonic_seconds"]], rows[:, _AT["gap"]]
        added = {name: rate(monotonic, rows[:, _AT[counter]], gaps) for name, counter in RATES.items()}
        result = pd.concat([result, pd.DataFrame(added, index=result.index)], axis=1)
    if since is not None or until is not None:
        # After the rates: the first row of the range has its rate from the row before.
        first, last = moment(since, -math.inf), moment(until, math.inf)
        result = result[(rows[:, 0] >= first) & (rows[:, 0] <= last)].copy()
    result.attrs.update(attrs or {})
    return result


def series(
    rows: np.ndarray, columns: Sequence[str], since_seconds: float, max_points: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Chart data: times and one array a column, a row of NaN in every gap, decimated to ``max_points``.

    Raises
    ------
    KeyError
        If a column is neither of the schema nor the rate of a counter.
    """
    import numpy as np

    gaps = rows[:, _AT["gap"]]
    values = {
        name: rate(rows[:, _AT["monotonic_seconds"]], rows[:, _AT[RATES[name]]], gaps)
        if name in RATES
        else rows[:, _AT[name]].copy()
        for name in columns
    }
    keep = rows[:, 0] >= since_seconds
    times, gaps = rows[keep, 0].copy(), gaps[keep]
    values = {name: array[keep] for name, array in values.items()}
    at = np.flatnonzero(gaps)
    if len(at):
        before = np.where(at > 0, (times[at] + times[np.maximum(at - 1, 0)]) / 2, times[at] - 1e-3)
        times = np.insert(times, at, before)
        values = {name: np.insert(array, at, np.nan) for name, array in values.items()}
    return decimate(times, values, max_points)


def decimate(
    times: np.ndarray, columns: Mapping[str, np.ndarray], max_points: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Reduce to about ``max_points``: each bucket gives its minimum and its maximum, so peaks stay.

    A bucket with a NaN gives NaN: gaps stay visible.
    """
    import numpy as np

    count = len(times)
    buckets = max(1, max_points // 2)
    if count <= max_points or count <= 2 * buckets:
        return times, dict(columns)
    starts = (np.arange(buckets) * count) // buckets
    ends = np.append(starts[1:], count) - 1
    reduced = np.empty(2 * buckets)
    reduced[0::2], reduced[1::2] = times[starts], times[ends]
    result = {}
    for name, array in columns.items():
        contiguous = np.ascontiguousarray(array)
        both = np.empty(2 * buckets)
        both[0::2] = np.minimum.reduceat(contiguous, starts)
        both[1::2] = np.maximum.reduceat(contiguous, starts)
        result[name] = both
    return reduced, result
