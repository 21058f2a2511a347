"""Which tier answers a question, and its answer: the newest from the ring, older samples from the store."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from wiseflow_nb.records import SAMPLE_COLUMNS, TIER_NAMES, TIER_SECONDS
from wiseflow_nb.resources import _history
from wiseflow_nb.resources._buckets import VALUE, coarsen, joined, lift
from wiseflow_nb.resources._history import EARLIEST, LATEST, RATES, Moment, Resolution

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

#: A rate needs the sample before the range, however long the interval may be.
LONGEST_INTERVAL_SECONDS = 3600.0
_MONOTONIC = SAMPLE_COLUMNS.index("monotonic_seconds")
_STRUCTURE = ("time_seconds", "monotonic_seconds", "gap")


class TierSource(Protocol):
    """What is read of a session's file."""

    def sample_blocks(
        self, since: float = ..., until: float = ..., *, after: float = ..., before: float = ...
    ) -> np.ndarray: ...

    def tier_blocks(
        self, tier: int, since: float = ..., until: float = ..., columns: Sequence[str] = ...
    ) -> tuple[np.ndarray, float]: ...

    def tier_starts(self) -> tuple[float, ...]: ...

    def last_sample_seconds(self) -> float: ...


def choose_tier(starts: Sequence[float], since: float) -> int:
    """Return the finest tier that reaches back to ``since``, or as far as any tier does.

    Examples
    --------
    >>> choose_tier([900.0, 500.0, 0.0], 950.0), choose_tier([900.0, 500.0, 0.0], 600.0)
    (0, 1)
    >>> choose_tier([900.0, 500.0, 0.0], -1e18)
    2
    """
    wanted = max(since, min(starts))
    return next(tier for tier, start in enumerate(starts) if start <= wanted)


def drawn_tier(starts: Sequence[float], since: float, seconds_a_point: float) -> int:
    """Return the tier to draw a chart from: the coarsest that has a row a point at least, and reaches back as far.

    Where raw samples are kept longer than they need be, a week of them is not read to draw 2,000 points.

    Examples
    --------
    >>> drawn_tier([0.0, 0.0, 0.0], 0.0, 302.4), drawn_tier([0.0, 0.0, 0.0], 0.0, 43.2)
    (2, 1)
    >>> drawn_tier([0.0, 0.0, 0.0], 0.0, 1.8), drawn_tier([900.0, 950.0, 990.0], 0.0, 302.4)
    (0, 0)
    """
    tier = choose_tier(starts, since)
    reach = max(since, starts[tier])
    return max(
        item
        for item, start in enumerate(starts)
        if item == tier or (start <= reach and TIER_SECONDS[item] <= seconds_a_point)
    )


def base_tier(span: float) -> int:
    """Return the coarsest tier from which a span can be rolled up exactly: the one that divides it.

    Examples
    --------
    >>> base_tier(300.0), base_tier(30.0), base_tier(25.0), base_tier(0.0)
    (2, 1, 0, 0)
    """
    fitting = [tier for tier, seconds in enumerate(TIER_SECONDS) if seconds and span and span % seconds == 0.0]
    return fitting[-1] if fitting else 0


def tier_for(span: float, starts: Sequence[float], since: float) -> int:
    """Return the tier that a span is rolled up from.

    The one that it is exactly; else the coarsest that divides it, if that reaches back to ``since``;
    else the finest that does. A span below that tier's own cannot be had.

    Examples
    --------
    >>> starts = [900.0, 500.0, 0.0]
    >>> tier_for(25.0, starts, 950.0), tier_for(25.0, starts, 600.0), tier_for(300.0, starts, 950.0)
    (0, 1, 2)
    >>> tier_for(10.0, starts, 0.0)
    1
    """
    base = base_tier(span)
    return base if span == TIER_SECONDS[base] else max(base, choose_tier(starts, since))


def as_taken(rows: np.ndarray, monotonic: np.ndarray) -> np.ndarray:
    """Return rows in the order in which they were taken: a file gives them in order of the wall clock."""
    import numpy as np

    return rows[np.argsort(monotonic, kind="stable")] if (monotonic[1:] < monotonic[:-1]).any() else rows


def whole_spans(since: float, until: float, span: float) -> tuple[float, float]:
    """Return the bounds of the spans that [since, until] touches.

    Examples
    --------
    >>> whole_spans(15.0, 30.0, 10.0)
    (10.0, 40.0)
    """
    return math.floor(since / span) * span, (math.floor(until / span) + 1) * span


class Archive:
    """One look at a session's samples: its file, and the newest rows of its ring as they are now.

    Parameters
    ----------
    store
        The session's file.
    newest
        The ring's rows, shape (n, columns), oldest first; empty where there is no ring.
    """

    def __init__(self, store: TierSource, newest: np.ndarray) -> None:
        self._store, self._newest = store, newest

    def rows(self, since: float = EARLIEST, until: float = LATEST, after: float = -math.inf) -> np.ndarray:
        """The raw samples within [since, until] that were taken later than ``after`` (monotonic); not to be written to."""
        import numpy as np

        newest = self._newest
        # Where the ring begins, and what is wanted already: by the clock that is never set back.
        begin = newest[0, _MONOTONIC] if len(newest) else math.inf
        parts = [newest]
        if not begin <= after:
            stored = self._store.sample_blocks(since, until, after=after, before=begin)
            parts.insert(0, stored[stored[:, _MONOTONIC] < begin] if len(newest) else stored)
        rows = np.concatenate(parts) if all(map(len, parts)) else max(parts, key=len)
        inside = (rows[:, 0] >= since) & (rows[:, 0] <= until)
        if after > -math.inf:
            inside &= rows[:, _MONOTONIC] > after
        rows = rows if inside.all() else rows[inside]
        return as_taken(rows, rows[:, _MONOTONIC])

    def last_seconds(self) -> float:
        """The time of the newest sample; NaN if there is none."""
        if len(self._newest):
            return float(self._newest[-1, 0])
        return self._store.last_sample_seconds()

    def starts(self) -> tuple[float, ...]:
        """The time of the first sample in each tier."""
        raw, *upper = self._store.tier_starts()
        return (min(raw, float(self._newest[0, 0])) if len(self._newest) else raw, *upper)

    def buckets(
        self, tier: int, since: float = EARLIEST, until: float = LATEST, columns: Sequence[str] = SAMPLE_COLUMNS
    ) -> np.ndarray:
        """The buckets of an upper tier; what its blocks do not hold yet comes from raw samples."""
        # Whole buckets at both ends: a part of one has another mean.
        since, until = whole_spans(since, until, TIER_SECONDS[tier])
        stored, covered = self._store.tier_blocks(tier, since, until, columns)
        tail = self.rows(since, until, after=covered)
        stored = as_taken(stored, stored[:, VALUE, columns.index("monotonic_seconds")])
        if columns is not SAMPLE_COLUMNS:
            tail = tail[:, [SAMPLE_COLUMNS.index(name) for name in columns]]
        return joined(stored, lift(tail, columns), TIER_SECONDS[tier], columns)

    def history(
        self,
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        resolution: Resolution | None = None,
        rates: bool = False,
        attrs: Mapping[str, Any] | None = None,
    ) -> pd.DataFrame:
        """The samples as a frame of one resolution; see ``SessionView.history``."""
        import numpy as np

        span = _history.span_of(resolution)
        newest = self.last_seconds()
        begin, end = _history.moment(since, EARLIEST, newest), _history.moment(until, LATEST, newest)
        starts = self.starts()
        tier = choose_tier(starts, begin) if span is None else tier_for(span, starts, begin)
        span = max(span or 0.0, TIER_SECONDS[tier])
        told = {**(attrs or {}), "resolution_seconds": span, "tier": TIER_NAMES[tier]}
        before = begin - LONGEST_INTERVAL_SECONDS - span
        if span == 0.0:
            rows = self.rows(before, end)
            # What came from the file was read for this call; the ring's rows belong to this look.
            owned = not np.may_share_memory(rows, self._newest)
            return _history.frame(rows, since=begin, until=end, rates=rates, attrs=told, owned=owned)
        before, after = whole_spans(before, end, span)
        buckets = lift(self.rows(before, after)) if tier == 0 else self.buckets(tier, before, after)
        if span != TIER_SECONDS[tier]:
            buckets = coarsen(buckets, span)
        return _history.bucket_frame(buckets, since=begin, until=end, rates=rates, attrs=told)

    def series(
        self, columns: Sequence[str], since_seconds: float, max_points: int
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Chart data from the finest tier that is worth its points; see ``SessionView.series``."""
        starts = self.starts()
        span = self.last_seconds() - max(since_seconds, min(starts))
        tier = drawn_tier(starts, since_seconds, span / max(max_points, 1))
        if tier == 0:
            return _history.series(self.rows(since_seconds), columns, since_seconds, max_points)
        names = dict.fromkeys((*_STRUCTURE, *(RATES.get(name, name) for name in columns)))
        for name in names:
            if name not in SAMPLE_COLUMNS:
                raise KeyError(name)
        buckets = self.buckets(tier, since_seconds, columns=tuple(names))
        return _history.bucket_series(buckets, tuple(names), columns, since_seconds, max_points)
