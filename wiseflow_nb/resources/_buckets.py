"""Buckets of samples as arrays: the same rows as the recorder writes, rolled up further when read.

An array of buckets has the shape (n, 4, columns): value, low, high and count of each column, as
the recorder's upper tiers hold them. Raw samples can be lifted to this form, each a bucket of
its own, so that one function rolls up both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wiseflow_nb.records import LAST_COLUMNS, SAMPLE_COLUMNS

if TYPE_CHECKING:
    import numpy as np

VALUE, LOW, HIGH, COUNT = range(4)


def lift(rows: np.ndarray, columns: Sequence[str] = SAMPLE_COLUMNS) -> np.ndarray:
    """Return samples, shape (n, columns), as buckets of one sample each."""
    import numpy as np

    buckets = np.empty((len(rows), 4, rows.shape[1]))
    buckets[:, VALUE] = buckets[:, LOW] = buckets[:, HIGH] = rows
    buckets[:, COUNT] = ~np.isnan(rows)
    if "interval_seconds" in columns:
        # The time of a gap is not covered by the sample that ends it.
        buckets[rows[:, columns.index("gap")] != 0, VALUE, columns.index("interval_seconds")] = np.nan
    return buckets


def coarsen(buckets: np.ndarray, span: float, columns: Sequence[str] = SAMPLE_COLUMNS) -> np.ndarray:
    """Merge neighbours that fall into one span; the same rule as the recorder's.

    Parameters
    ----------
    buckets
        Shape (n, 4, columns), in order of time, of any finer span that divides this one.
    span
        Seconds; buckets begin at its multiples since the epoch.
    columns
        The names of the last axis; ``time_seconds`` and ``gap`` must be among them.
    """
    import numpy as np

    if not len(buckets):
        return buckets
    at = {name: index for index, name in enumerate(columns)}
    slots = np.floor(buckets[:, VALUE, at["time_seconds"]] / span)
    first = np.flatnonzero(np.concatenate(([True], slots[1:] != slots[:-1])))
    last = np.append(first[1:], len(slots)) - 1
    count = np.add.reduceat(buckets[:, COUNT], first)
    low = np.fmin.reduceat(buckets[:, LOW], first)
    high = np.fmax.reduceat(buckets[:, HIGH], first)
    there = buckets[:, COUNT] > 0
    weighted = np.where(there, buckets[:, VALUE] * buckets[:, COUNT], 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.add.reduceat(weighted, first) / count
    value = np.minimum(np.maximum(value, low), high)

    steps = [at[name] for name in ("time_seconds", *LAST_COLUMNS) if name in at]
    value[:, steps] = buckets[last][:, VALUE, steps]
    # First and last of the values there are: a counter may have begun again in between.
    number = np.arange(len(buckets))[:, None]
    begin = np.minimum.reduceat(np.where(there[:, steps], number, len(buckets)), first)
    end = np.maximum.reduceat(np.where(there[:, steps], number, -1), first)
    some, across = end >= 0, np.array(steps)[None, :]
    low[:, steps] = np.where(some, buckets[np.minimum(begin, len(buckets) - 1), LOW, across], np.nan)
    high[:, steps] = np.where(some, buckets[end, HIGH, across], np.nan)

    value[:, at["time_seconds"]] = slots[first] * span
    value[:, at["gap"]] = np.maximum.reduceat(buckets[:, VALUE, at["gap"]], first)
    if "interval_seconds" in at:
        covered = buckets[:, VALUE, at["interval_seconds"]]
        known = ~np.isnan(covered)
        total = np.add.reduceat(np.where(known, covered, 0.0), first)
        value[:, at["interval_seconds"]] = np.where(np.logical_or.reduceat(known, first), total, np.nan)
    return np.stack((value, low, high, count), axis=1)


def joined(stored: np.ndarray, tail: np.ndarray, span: float, columns: Sequence[str] = SAMPLE_COLUMNS) -> np.ndarray:
    """Return stored buckets of ``span`` and what goes on where they end, with no bucket in two parts."""
    import numpy as np

    starts = stored[:, VALUE, columns.index("time_seconds")]
    if len(starts) > 1 and (starts[1:] == starts[:-1]).any():
        return coarsen(np.concatenate((stored, tail)), span, columns)
    # The usual case: only the last stored bucket can go on in the tail.
    end = coarsen(np.concatenate((stored[-1:], tail)), span, columns)
    return np.concatenate((stored[:-1], end))
