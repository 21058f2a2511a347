"""Samples rolled up into buckets of 10 s and 60 s, in plain Python: the recorder loads no numpy.

A bucket is a run of samples whose time falls into the same span. Its row has four values for each
column of the samples, in four planes one after another: value, low, high, count.

=====================  =================================  ==============  ===============
column                 value                              low, high       count
=====================  =================================  ==============  ===============
``time_seconds``       start of the bucket                first, last     samples
``LAST_COLUMNS``       at the last sample                 first, last     values there are
``interval_seconds``   seconds covered, gaps left out     min, max        values there are
``gap``                1 if any sample had the mark       min, max        samples
all others (gauges)    mean                               min, max        values there are
=====================  =================================  ==============  ===============

NaN counts as "no value there"; a column without any is NaN with a count of 0. Since the value of a
counter is the one at the bucket's last sample, and ``monotonic_seconds`` is of that same moment,
the rate from bucket to bucket is exact. A row merges with the one that goes on where it ended,
whatever the split, so that a bucket may be written in parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from wiseflow_nb.records import LAST_COLUMNS, NAN, SAMPLE_COLUMNS

WIDTH = len(SAMPLE_COLUMNS)
#: Values in a row: four planes.
BUCKET_WIDTH = 4 * WIDTH
#: So many samples of an open bucket wait for one pass over them; bounds its memory at any sampling rate.
PENDING_LIMIT = 64

_TIME = SAMPLE_COLUMNS.index("time_seconds")
_INTERVAL = SAMPLE_COLUMNS.index("interval_seconds")
_GAP = SAMPLE_COLUMNS.index("gap")
_LAST = frozenset(SAMPLE_COLUMNS.index(name) for name in LAST_COLUMNS)

BucketRow = tuple[float, ...]


def bucket_start(time_seconds: float, span: float) -> float:
    """Return the start of the bucket that a moment falls into.

    Examples
    --------
    >>> bucket_start(129.5, 60.0)
    120.0
    """
    return math.floor(time_seconds / span) * span


def summarise(samples: Sequence[Sequence[float]], span: float) -> BucketRow:
    """Return the row of one bucket from its samples, oldest first, at least one."""
    values: list[float] = []
    lows: list[float] = []
    highs: list[float] = []
    counts: list[float] = []
    gaps = [sample[_GAP] for sample in samples]
    for index, column in enumerate(zip(*samples, strict=True)):
        there = [value for value in column if value == value]
        if index == _TIME:
            value, low, high = bucket_start(column[0], span), column[0], column[-1]
        elif index in _LAST:
            value = column[-1]
            low, high = (there[0], there[-1]) if there else (NAN, NAN)
        elif not there:
            value = low = high = NAN
        else:
            low, high = min(there), max(there)
            if index == _GAP:
                value = high
            elif index == _INTERVAL:
                covered = [value for value, gap in zip(column, gaps, strict=True) if value == value and not gap]
                value = math.fsum(covered) if covered else NAN
            else:
                value = _between(math.fsum(there) / len(there), low, high)
        values.append(value)
        lows.append(low)
        highs.append(high)
        counts.append(float(len(there)))
    return (*values, *lows, *highs, *counts)


def merge(first: Sequence[float], second: Sequence[float]) -> BucketRow:
    """Return the row of two parts of one bucket, the older part first."""
    row = [NAN] * BUCKET_WIDTH
    for index in range(WIDTH):
        low, high, count = WIDTH + index, 2 * WIDTH + index, 3 * WIDTH + index
        many, more = first[count], second[count]
        row[count] = many + more
        if index in _LAST or index == _TIME:
            row[index] = first[index] if index == _TIME else second[index]
            row[low] = first[low] if many else second[low]
            row[high] = second[high] if more else first[high]
        elif not more or not many:
            source = first if many else second
            row[index], row[low], row[high] = source[index], source[low], source[high]
        else:
            row[low], row[high] = min(first[low], second[low]), max(first[high], second[high])
            if index == _GAP:
                row[index] = row[high]
            elif index == _INTERVAL:
                row[index] = _sum(first[index], second[index])
            else:
                mean = first[index] + (second[index] - first[index]) * (more / (many + more))
                row[index] = _between(mean, row[low], row[high])
    return tuple(row)


def roll_up(samples: Iterable[Sequence[float]], span: float) -> list[BucketRow]:
    """Return the buckets of a series of samples, the last one as far as it goes."""
    rollup = Rollup(span)
    closed = [row for sample in samples if (row := rollup.add(sample)) is not None]
    last = rollup.close()
    return closed if last is None else [*closed, last]


class Rollup:
    """Take samples one by one; give each bucket once, when the next one begins.

    Parameters
    ----------
    span
        Seconds a bucket spans.

    Examples
    --------
    >>> from wiseflow_nb.records import Sample
    >>> rollup = Rollup(10.0)
    >>> rollup.add(Sample(time_seconds=1.0, system_load1=1.0))
    >>> rollup.add(Sample(time_seconds=2.0, system_load1=3.0))
    >>> row = rollup.add(Sample(time_seconds=11.0, system_load1=9.0))
    >>> row[SAMPLE_COLUMNS.index("system_load1")]
    2.0
    """

    def __init__(self, span: float) -> None:
        self.span = span
        self._slot = NAN
        self._merged: BucketRow | None = None
        self._pending: list[Sequence[float]] = []

    def add(self, sample: Sequence[float]) -> BucketRow | None:
        """Take a sample; return the bucket before it if the sample begins another one."""
        # Not "later": a clock that was set back begins a bucket too, rather than filling a wrong one.
        slot = bucket_start(sample[_TIME], self.span)
        closed = self.close() if slot != self._slot else None
        self._slot = slot
        self._pending.append(sample)
        if len(self._pending) >= PENDING_LIMIT:
            self._fold()
        return closed

    def close(self) -> BucketRow | None:
        """Return the open bucket as far as it goes, if it has any sample; the next sample begins another row."""
        self._fold()
        row, self._merged, self._slot = self._merged, None, NAN
        return row

    def _fold(self) -> None:
        if self._pending:
            part = summarise(self._pending, self.span)
            self._merged = part if self._merged is None else merge(self._merged, part)
            self._pending = []


def _sum(first: float, second: float) -> float:
    if first != first:
        return second
    return first if second != second else first + second


def _between(value: float, low: float, high: float) -> float:
    # Rounding can carry a mean out of its own bounds by one bit.
    return min(max(value, low), high)
