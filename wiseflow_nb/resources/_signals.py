"""What rules judge besides the columns themselves: rates, the time to a limit, late samples, OOM kills.

Fed with one sample after the other; each value goes by the samples so far, in monotonic time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from wiseflow_nb.records import COUNTER_COLUMNS, NAN, SAMPLE_COLUMNS, Sample

#: A trend needs this many points, and this many seconds between the first and the last.
TREND_POINTS = 12
TREND_SECONDS = 60.0
#: ... and goes back this far, in this many points at most: one is kept a window / points.
TREND_WINDOW_SECONDS = 600.0
TREND_MOST_POINTS = 60
OOM_WINDOW_SECONDS = 60.0
#: A counter that is read less often than samples are taken is missing in between; its rate holds for
#: this many times the last distance between two readings.
HELD_SPACINGS = 1.5

RATE_COLUMNS = {name.removesuffix("_total") + "_per_second": name for name in COUNTER_COLUMNS}
#: What a trend is drawn through, what is left of the limit, and the column that names the answer.
_TRENDS = {
    "memory_seconds_to_limit": ("memory_working_set_bytes", "memory_available_bytes"),
    "filesystem_seconds_to_limit": ("filesystem_used_bytes", "filesystem_avail_bytes"),
}
DERIVED_COLUMNS = (*_TRENDS, "sampler_late_ratio", "container_recent_oom_kills")
#: Everything that a rule may watch.
WATCHABLE = (*SAMPLE_COLUMNS, *RATE_COLUMNS, *DERIVED_COLUMNS)


def slopes(times: Sequence[float], values: Sequence[float]) -> list[float]:
    """The slopes of all pairs of points, sorted; their median is the Theil-Sen slope.

    Source: P. K. Sen, "Estimates of the regression coefficient based on Kendall's tau", 1968. A
    quarter of the points may be anything without moving the median far.

    Examples
    --------
    >>> slopes([0, 1, 2], [0.0, 2.0, 4.0])
    [2.0, 2.0, 2.0]
    """
    found = []
    for right in range(1, len(times)):
        for left in range(right):
            elapsed = times[right] - times[left]
            if elapsed > 0:
                found.append((values[right] - values[left]) / elapsed)
    found.sort()
    return found


def rising(times: Sequence[float], values: Sequence[float]) -> float:
    """The robust slope per second if the series rises beyond doubt, else 0.0.

    Beyond doubt: three quarters of all pairs of points rise.

    Examples
    --------
    >>> rising([0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0]), rising([0, 1, 2, 3], [1.0, 2.0, 1.0, 2.0])
    (1.0, 0.0)
    """
    found = slopes(times, values)
    if not found or found[len(found) // 4] <= 0:
        return 0.0
    middle = len(found) // 2
    return found[middle] if len(found) % 2 else (found[middle - 1] + found[middle]) / 2


class Trend:
    """A robust slope over the last ten minutes, made anew when a point is kept."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque(maxlen=TREND_MOST_POINTS)
        self._slope = NAN

    def clear(self) -> None:
        """Forget: what comes next has nothing to do with what was."""
        self._points.clear()
        self._slope = NAN

    def slope(self, now: float, value: float) -> float:
        """Take a value; return units per second, 0.0 if it does not rise, NaN while too little is known."""
        if math.isnan(value):
            return NAN
        points = self._points
        if not points or now - points[-1][0] >= TREND_WINDOW_SECONDS / TREND_MOST_POINTS:
            while points and now - points[0][0] > TREND_WINDOW_SECONDS:
                points.popleft()
            points.append((now, value))
            if len(points) >= min(TREND_POINTS, TREND_MOST_POINTS) and now - points[0][0] >= TREND_SECONDS:
                self._slope = rising([at for at, _ in points], [item for _, item in points])
            else:
                self._slope = NAN
        return self._slope


class Rate:
    """Change per second of a counter, from one reading to the next that there is.

    Between readings that are more than a sample apart (too dear for each) the last rate holds until
    the next is due. A counter that was there at each sample and is missing now is unknown at once.

    Examples
    --------
    >>> rate = Rate()
    >>> [rate.change(at, value) for at, value in enumerate([0.0, 5.0, NAN, 25.0, NAN])]
    [nan, 5.0, nan, 10.0, 10.0]
    """

    __slots__ = ("_at", "_per_second", "_seldom", "_skipped", "_spacing", "_value")

    def __init__(self) -> None:
        self._begin(NAN, NAN)

    def _begin(self, now: float, value: float) -> None:
        self._at, self._value = now, value
        self._per_second = self._spacing = NAN
        self._skipped = self._seldom = False

    def change(self, now: float, value: float, gap: bool = False) -> float:
        """Take a reading (NaN: there is none); return the change per second, NaN while it is not known."""
        if gap or self._at != self._at:
            self._begin(now if value == value else NAN, value)
            return NAN
        if value != value:
            self._skipped = True
            return self._per_second if self._seldom and now - self._at < HELD_SPACINGS * self._spacing else NAN
        self._spacing, change = now - self._at, value - self._value
        self._at, self._value = now, value
        self._seldom, self._skipped = self._skipped, False
        # A counter that went back was begun anew.
        self._per_second = change / self._spacing if self._spacing > 0 and change >= 0 else NAN
        return self._per_second


def seconds_to_limit(left: float, slope: float) -> float:
    """How long ``left`` units last at ``slope`` units per second: infinite if it does not rise.

    Examples
    --------
    >>> seconds_to_limit(100.0, 2.0), seconds_to_limit(100.0, 0.0)
    (50.0, inf)
    """
    if math.isnan(slope) or math.isnan(left):
        return NAN
    return max(left, 0.0) / slope if slope > 0 else math.inf


class Signals:
    """The derived values of a stream of samples.

    Parameters
    ----------
    columns
        Those that are wanted; the others are not worked out.

    Examples
    --------
    >>> signals = Signals(["disk_read_bytes_per_second"])
    >>> for second in range(2):
    ...     signals.observe(Sample(monotonic_seconds=float(second), disk_read_bytes_total=second * 5.0))
    >>> signals.value("disk_read_bytes_per_second")
    5.0
    """

    def __init__(self, columns: Sequence[str] = ()) -> None:
        self._trends: dict[str, Trend] = {}
        self._rates: dict[str, Rate] = {}
        self._before: Sample | None = None
        self._sample = Sample()
        self._values: dict[str, float] = {}
        self._kills: deque[tuple[float, float]] = deque()
        self._known_kills = NAN
        self._expected = NAN
        self.want(columns)

    def want(self, columns: Sequence[str]) -> None:
        """Set which derived values are worked out; what was followed goes on."""
        self._trends = {name: self._trends.get(name, Trend()) for name in _TRENDS if name in columns}
        self._rates = {name: self._rates.get(name) or self._begun(name) for name in RATE_COLUMNS if name in columns}

    def _begun(self, name: str) -> Rate:
        rate, sample = Rate(), self._sample
        rate.change(sample.monotonic_seconds, getattr(sample, RATE_COLUMNS[name]))
        return rate

    def observe(self, sample: Sample, expected_interval: float = NAN) -> None:
        """Take the next sample; ``expected_interval`` is the one that the schedule asked for (seconds)."""
        before, now = self._before, sample.monotonic_seconds
        gap = bool(sample.gap)
        values = {
            name: rate.change(now, getattr(sample, RATE_COLUMNS[name]), gap) for name, rate in self._rates.items()
        }
        for name, trend in self._trends.items():
            if sample.gap or (before is not None and _another_level(before, sample, name)):
                trend.clear()
            used, left = _TRENDS[name]
            values[name] = seconds_to_limit(getattr(sample, left), trend.slope(now, _used(sample, used)))
        late = sample.interval_seconds - expected_interval
        # A few milliseconds late at a short interval is nobody's trouble: measured in seconds at least.
        values["sampler_late_ratio"] = max(late, 0.0) / max(expected_interval, 1.0) if late == late else NAN
        values["container_recent_oom_kills"] = self._recent_kills(sample)
        self._values, self._before = values, sample
        self._sample = sample

    def value(self, column: str) -> float:
        """A column of the newest sample, or what was worked out of it."""
        derived = self._values.get(column)
        return float(getattr(self._sample, column, NAN)) if derived is None else derived

    def _recent_kills(self, sample: Sample) -> float:
        kills, now = sample.container_memory_oom_kills_total, sample.monotonic_seconds
        if kills == kills:
            if kills > self._known_kills:
                self._kills.append((now, kills - self._known_kills))
            self._known_kills = kills
        elif math.isnan(self._known_kills):
            return NAN
        while self._kills and now - self._kills[0][0] >= OOM_WINDOW_SECONDS:
            self._kills.popleft()
        return sum(count for _, count in self._kills)


def _used(sample: Sample, name: str) -> float:
    if name == "filesystem_used_bytes":
        return sample.filesystem_size_bytes - sample.filesystem_avail_bytes
    return float(getattr(sample, name))


def _another_level(before: Sample, sample: Sample, name: str) -> bool:
    """Whether it is now counted elsewhere: a limit or the watched file system changed."""
    total = "memory_limit_bytes" if name.startswith("memory") else "filesystem_size_bytes"
    was, now = float(getattr(before, total)), float(getattr(sample, total))
    # One that cannot be told is no news.
    return was == was and now == now and was != now
