"""Samples and buckets as frames and chart data: rates, gaps, decimation. Loads numpy and pandas when first used."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from numbers import Real
from typing import TYPE_CHECKING, Any

from wiseflow_nb.errors import UsageError
from wiseflow_nb.records import COUNTER_COLUMNS, GAUGE_COLUMNS, SAMPLE_COLUMNS
from wiseflow_nb.resources._buckets import COUNT, HIGH, LOW, VALUE, coarsen, lift
from wiseflow_nb.resources._signals import HELD_SPACINGS

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

Moment = float | str | datetime | timedelta
#: Texts that name another moment on each day, or in each zone, in which they are read.
_UNBOUND = re.compile(r"now|today|T?\s*\d{1,2}:\d\d.*|T?\s*\d{1,2}\s*[ap]m", re.IGNORECASE)
#: A number that neither a unit nor the colon of a time follows.
_UNITLESS = re.compile(r"^[^:]*\d\.?\s*$|^[^:]*\d\s+[-+]?\d")
Resolution = float | str | timedelta
#: Before and after every moment; finite, so that it can be cut to whole spans.
EARLIEST, LATEST = -1e18, 1e18
COARSEST_SECONDS = 604_800.0
_AT = {name: index for index, name in enumerate(SAMPLE_COLUMNS)}
_GAUGES = [_AT[name] for name in GAUGE_COLUMNS]
RATES = {name.removesuffix("_total") + "_per_second": name for name in COUNTER_COLUMNS}


def rate(times: np.ndarray, values: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Change per second of a counter; NaN for the first, across gaps, and where it went back.

    Where the counter was read less often than samples were taken, rows without a value have the mean
    rate of the time that they lie in; the newest ones repeat the last rate until the next is due.
    """
    import numpy as np

    result = np.full(len(values), np.nan)
    there = np.flatnonzero(~np.isnan(values))
    if len(there) < 2:
        return result
    whole = len(there) == len(values)
    # How many gaps there were so far: between two readings there must be none.
    number = gaps != 0 if whole else np.cumsum(gaps != 0)
    parted = number[1:] if whole else np.diff(number[there]) != 0
    elapsed, change = np.diff(times if whole else times[there]), np.diff(values if whole else values[there])
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where((elapsed > 0) & (change >= 0) & ~parted, change / elapsed, np.nan)
    if whole:
        result[1:] = found
        return result
    rows, last = np.diff(there), there[-1]
    result[there[0] + 1 : last + 1] = np.repeat(found, rows)
    if rows[-1] > 1:
        due = times[last] + HELD_SPACINGS * elapsed[-1]
        newest = slice(last + 1, None)
        result[newest] = np.where((times[newest] < due) & (number[newest] == number[last]), found[-1], np.nan)
    return result


def moment(value: Moment | None, default: float, newest: float = math.nan) -> float:
    """Return seconds since the epoch of a number, a text or a date; one without a zone is UTC.

    Any real number is seconds since the epoch, numpy's too. A text names its day: ``"now"``,
    ``"today"``, a time of day or a day without a year would mean something else to each reader and
    is refused. A text that begins with a minus sign (``"-15min"``, ``"-2h"``) and a negative ``timedelta``
    are counted back from ``newest``, the time of the newest sample, so that they mean the same for a
    session that has ended. A text without a unit (``"-15"``) is refused: minutes and seconds look alike.

    Raises
    ------
    UsageError
        If it is no moment.

    Examples
    --------
    >>> moment("1970-01-01 00:01", 0.0)
    60.0
    >>> moment("-1min", 0.0, newest=100.0)
    40.0
    >>> moment("today", 0.0)
    Traceback (most recent call last):
    ...
    wiseflow_nb.errors.UsageError: 'today' is no moment; give seconds since the epoch, ...
    """
    if value is None:
        return default
    import pandas as pd

    given = _plain(value)
    if isinstance(given, float) and given == given:
        return min(max(given, EARLIEST), LATEST)
    try:
        if isinstance(given, timedelta) or (isinstance(given, str) and given.strip().startswith("-")):
            back = -_duration(given)
            if back > 0:
                return newest - back if newest == newest else default
        elif not (isinstance(given, str) and _UNBOUND.fullmatch(given.strip())):
            stamp = pd.Timestamp(given)
            seconds = float((stamp.tz_localize("UTC") if stamp.tzinfo is None else stamp).timestamp())
            # A day without a year is taken for one of the year 1.
            if seconds == seconds and stamp.year > 1:
                return seconds
    except (ValueError, TypeError, OverflowError):
        pass
    raise UsageError(
        f"{value!r} is no moment; give seconds since the epoch, a date with its year or the text of one (UTC "
        'where it names no zone), or a time before the newest sample with its unit such as "-15min"'
    )


def _plain(value: Any) -> Any:
    """Return numbers of any kind as floats, durations of numpy's as those of pandas, all else as it is."""
    import numpy as np
    import pandas as pd

    if isinstance(value, bool):
        return value
    if isinstance(value, np.timedelta64):  # for numpy a number, too
        return pd.Timedelta(value)
    return float(value) if isinstance(value, Real) else value


def _duration(value: str | timedelta) -> float:
    import pandas as pd

    # "7d" is what people write for days; pandas is about to take "7D" only.
    text = re.sub(r"(?<=\d)\s*d$", "D", value.strip()) if isinstance(value, str) else value
    if isinstance(text, str) and _UNITLESS.search(text):
        # For pandas it would be nanoseconds.
        raise ValueError(f"{value!r} names no unit")
    return float(pd.Timedelta(text).total_seconds())


def span_of(resolution: Resolution | None) -> float | None:
    """Return the seconds of a resolution: 0 for raw, None for the one that fits best.

    Raises
    ------
    UsageError
        If it is none.

    Examples
    --------
    >>> span_of("raw"), span_of("10s"), span_of("5min"), span_of(0.5), span_of(None)
    (0.0, 10.0, 300.0, 0.5, None)
    """
    if resolution is None:
        return None
    if resolution == "raw":
        return 0.0
    given = _plain(resolution)
    seconds = given if isinstance(given, float) else math.nan
    if isinstance(given, (str, timedelta)):
        with contextlib.suppress(ValueError, TypeError):
            seconds = _duration(given)
    if not 0 < seconds <= COARSEST_SECONDS:
        raise UsageError(
            f'resolution {resolution!r} is unknown; give None (the finest that reaches back to since), "raw", '
            f'"10s", "60s", or another span up to 7 days, a number of seconds or a text with its unit such as "5min"'
        )
    return seconds


def _index(times: np.ndarray) -> pd.DatetimeIndex:
    import numpy as np
    import pandas as pd

    # A float of this size is exact to a quarter of a microsecond only; whole ones compare well.
    stamps = np.rint(times * 1e6).astype("int64").view("datetime64[us]")
    return pd.DatetimeIndex(stamps, name="time").as_unit("ns").tz_localize("UTC")


def _frame(
    times: np.ndarray,
    pieces: list[np.ndarray],
    names: list[str],
    gaps: np.ndarray,
    inside: np.ndarray,
    attrs: Mapping[str, Any],
) -> pd.DataFrame:
    """Put columns side by side, cut to a range, with a row of NaN in every gap, in order of time."""
    import numpy as np
    import pandas as pd

    if not inside.all():
        times, gaps, pieces = times[inside], gaps[inside], [piece[inside] for piece in pieces]
    # Boolean choice and concatenation copy; a single whole piece is the caller's own or its copy already.
    values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
    at = np.flatnonzero(gaps)
    at = at[at > 0]
    if len(at):
        times = np.insert(times, at, (times[at] + times[at - 1]) / 2)
        values = np.insert(values, at, np.nan, axis=0)
    order = _order(times)
    if order is not None:
        times, values = times[order], values[order]
    result = pd.DataFrame(values, columns=names, index=_index(times), copy=False)
    result.attrs.update(attrs)
    return result


def _order(times: np.ndarray) -> np.ndarray | None:
    """In which order rows go forward in time; None where they do.

    Where the clock was set back two rows may tell of one moment: what was taken first comes first.
    """
    import numpy as np

    return np.argsort(times, kind="stable") if (times[1:] < times[:-1]).any() else None


def _rates(values: np.ndarray) -> np.ndarray:
    import numpy as np

    monotonic, gaps = values[:, _AT["monotonic_seconds"]], values[:, _AT["gap"]]
    return np.stack([rate(monotonic, values[:, _AT[counter]], gaps) for counter in RATES.values()], axis=1)


def frame(
    rows: np.ndarray,
    *,
    rates: bool = False,
    since: Moment | None = None,
    until: Moment | None = None,
    attrs: Mapping[str, Any] | None = None,
    owned: bool = False,
) -> pd.DataFrame:
    """Return samples as a DataFrame with a UTC index named ``time``; a copy unless ``owned``.

    Before a sample that ends a gap there is a row of NaN, half way through the gap. The index never
    goes back: where the clock was set back, rows are in the order of their times, rates are those of
    the order in which they were taken (``monotonic_seconds``).

    Parameters
    ----------
    rows
        Shape (n, columns), float64, in the order of ``SAMPLE_COLUMNS``.
    rates
        Add ``<counter>_per_second`` for each counter.
    since, until
        First and last moment, both included; see ``moment``.
    attrs
        Goes to ``DataFrame.attrs``.
    owned
        The rows were read for this frame alone: it may keep them. Fresh memory for a second copy of a
        day costs more than reading it.
    """
    rows = rows.reshape(-1, len(SAMPLE_COLUMNS))
    times, newest = rows[:, 0], rows[-1, 0] if len(rows) else math.nan
    first, last = moment(since, -math.inf, newest), moment(until, math.inf, newest)
    # After the rates: the first row of the range has its rate from the row before.
    inside = (times >= first) & (times <= last)
    whole = not rates and bool(inside.all())
    pieces, names = [rows.copy() if whole and not owned else rows], list(SAMPLE_COLUMNS)
    if rates:
        pieces.append(_rates(rows))
        names.extend(RATES)
    return _frame(times, pieces, names, rows[:, _AT["gap"]], inside, attrs or {})


def bucket_frame(
    buckets: np.ndarray,
    *,
    rates: bool = False,
    since: float = EARLIEST,
    until: float = LATEST,
    attrs: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Return buckets as a DataFrame like that of samples, indexed by their start.

    Gauges are means, with ``<column>_min`` and ``<column>_max`` beside them; counters and
    ``monotonic_seconds`` are as they were at the last sample, so that rates are exact;
    ``interval_seconds`` is the time that samples cover, gaps left out; ``sample_count`` tells how
    many there are.

    Parameters
    ----------
    buckets
        Shape (n, 4, columns); see ``_buckets``.
    rates
        Add ``<counter>_per_second`` for each counter, from the bucket before to this one.
    since, until
        Seconds since the epoch: a bucket that has a sample in between is there.
    attrs
        Goes to ``DataFrame.attrs``.
    """
    values, lows, highs = buckets[:, VALUE], buckets[:, LOW], buckets[:, HIGH]
    times = values[:, 0]
    inside = (highs[:, 0] >= since) & (lows[:, 0] <= until)
    pieces = [values, lows[:, _GAUGES], highs[:, _GAUGES], buckets[:, COUNT, :1]]
    names = [*SAMPLE_COLUMNS, *(f"{name}_min" for name in GAUGE_COLUMNS), *(f"{name}_max" for name in GAUGE_COLUMNS)]
    names.append("sample_count")
    if rates:
        pieces.append(_rates(values))
        names.extend(RATES)
    return _frame(times, pieces, names, values[:, _AT["gap"]], inside, attrs or {})


def raw_history(
    rows: np.ndarray,
    *,
    since: Moment | None = None,
    until: Moment | None = None,
    resolution: Resolution | None = None,
    rates: bool = False,
    attrs: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Return a history where raw samples are all there is: as they are, or rolled up to ``resolution``."""
    span = span_of(resolution) or 0.0
    told = {**(attrs or {}), "resolution_seconds": span, "tier": "raw"}
    if span == 0.0:
        return frame(rows, since=since, until=until, rates=rates, attrs=told)
    newest = rows[-1, 0] if len(rows) else math.nan
    begin, end = moment(since, EARLIEST, newest), moment(until, LATEST, newest)
    return bucket_frame(coarsen(lift(rows), span), since=begin, until=end, rates=rates, attrs=told)


def series(
    rows: np.ndarray, columns: Sequence[str], since_seconds: float, max_points: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Chart data: times and one array a column, a row of NaN in every gap, decimated to ``max_points``.

    The times never go back: where the clock was set back, points are in the order of their times, as in
    ``frame``; rates are those of the order in which the samples were taken.

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
    order = _order(times)
    if order is not None:
        times, values = times[order], {name: array[order] for name, array in values.items()}
    return decimate(times, values, max_points)


def bucket_series(
    buckets: np.ndarray, names: Sequence[str], columns: Sequence[str], since_seconds: float, max_points: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Chart data of buckets: each gives its minimum and its maximum, so that peaks stay.

    Parameters
    ----------
    buckets
        Shape (n, 4, len(names)).
    names
        What the last axis holds: ``time_seconds``, ``monotonic_seconds``, ``gap`` and what
        ``columns`` needs.
    """
    import numpy as np

    at = {name: index for index, name in enumerate(names)}
    gaps = buckets[:, VALUE, at["gap"]]
    bounds = {}
    for name in columns:
        if name in RATES:
            low = rate(buckets[:, VALUE, at["monotonic_seconds"]], buckets[:, VALUE, at[RATES[name]]], gaps)
            bounds[name] = (low, low)
        else:
            planes = (LOW, HIGH) if name in GAUGE_COLUMNS else (VALUE, VALUE)
            bounds[name] = (buckets[:, planes[0], at[name]], buckets[:, planes[1], at[name]])
    keep = buckets[:, HIGH, at["time_seconds"]] >= since_seconds
    starts, ends = buckets[keep, VALUE, at["time_seconds"]], buckets[keep, HIGH, at["time_seconds"]]
    bounds = {name: (low[keep], high[keep]) for name, (low, high) in bounds.items()}
    holes = np.flatnonzero(gaps[keep])
    holes = holes[holes > 0]
    if len(holes):
        middle = (starts[holes] + ends[holes - 1]) / 2
        starts, ends = np.insert(starts, holes, middle), np.insert(ends, holes, middle)
        bounds = {
            name: (np.insert(low, holes, np.nan), np.insert(high, holes, np.nan))
            for name, (low, high) in bounds.items()
        }
    order = _order(starts)
    if order is not None:
        starts, ends = starts[order], ends[order]
        bounds = {name: (low[order], high[order]) for name, (low, high) in bounds.items()}
    times, values = _pairs(starts, ends, bounds, max(1, min(len(starts), max_points // 2)))
    # Of two buckets of one span, the second begins before the first has ended.
    return times if order is None else np.maximum.accumulate(times), values


def decimate(
    times: np.ndarray, columns: Mapping[str, np.ndarray], max_points: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Reduce to about ``max_points``: each bucket gives its minimum and its maximum, so peaks stay.

    A bucket with a NaN gives NaN: gaps stay visible.
    """
    count = len(times)
    buckets = max(1, max_points // 2)
    if count <= max_points or count <= 2 * buckets:
        return times, dict(columns)
    return _pairs(times, times, {name: (array, array) for name, array in columns.items()}, buckets)


def _pairs(
    starts: np.ndarray, ends: np.ndarray, bounds: Mapping[str, tuple[np.ndarray, np.ndarray]], groups: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Reduce (low, high) to two points a group: the least at its start, the greatest at its end."""
    import numpy as np

    count = len(starts)
    if not count:
        return starts, {name: low for name, (low, _) in bounds.items()}
    first = (np.arange(groups) * count) // groups
    times = np.empty(2 * groups)
    times[0::2], times[1::2] = starts[first], ends[np.append(first[1:], count) - 1]
    result = {}
    for name, (low, high) in bounds.items():
        both = np.empty(2 * groups)
        both[0::2] = np.minimum.reduceat(np.ascontiguousarray(low), first)
        both[1::2] = np.maximum.reduceat(np.ascontiguousarray(high), first)
        result[name] = both
    return times, result
