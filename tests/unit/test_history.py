"""Frames and chart data from rows of samples."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wiseflow_nb.errors import UsageError
from wiseflow_nb.records import SAMPLE_COLUMNS
from wiseflow_nb.resources._buckets import coarsen, lift
from wiseflow_nb.resources._history import (
    EARLIEST,
    LATEST,
    bucket_series,
    decimate,
    frame,
    moment,
    raw_history,
    series,
    span_of,
)

AT = {name: index for index, name in enumerate(SAMPLE_COLUMNS)}


def rows(count: int) -> np.ndarray:
    made = np.full((count, len(SAMPLE_COLUMNS)), np.nan)
    made[:, AT["time_seconds"]] = made[:, AT["monotonic_seconds"]] = np.arange(count)
    made[:, AT["gap"]] = 0
    made[:, AT["disk_read_bytes_total"]] = np.arange(count) * 100.0
    return made


def test_a_frame_is_a_copy_with_a_utc_index_and_rates() -> None:
    source = rows(10)
    made = frame(source, rates=True, attrs={"host": "here"})
    source[:] = 0
    assert str(made.index.tz) == "UTC"
    assert made.index.name == "time"
    assert made.attrs["host"] == "here"
    assert np.isnan(made.disk_read_bytes_per_second.iloc[0])
    assert (made.disk_read_bytes_per_second.iloc[1:] == 100.0).all()
    assert len(frame(rows(0))) == 0


def test_no_rate_across_a_gap_and_a_hole_is_drawn_there() -> None:
    source = rows(10)
    source[5:, :2] += 100
    source[5, AT["gap"]] = 1
    times, values = series(source, ["disk_read_bytes_per_second", "disk_read_bytes_total"], 0.0, 100)
    assert len(times) == 11
    assert np.isnan(values["disk_read_bytes_total"][5])
    assert (np.diff(times) > 0).all()
    assert np.isnan(values["disk_read_bytes_per_second"][[0, 5, 6]]).all()


def test_a_rate_goes_from_one_reading_to_the_next_that_there_is() -> None:
    source = rows(13)
    name = "disk_read_bytes_total"
    source[3:, AT[name]] += 100
    # Read every other sample from the fourth on; the newest reading is three samples old.
    source[[4, 6, 8, 10, 11, 12], AT[name]] = np.nan
    made = frame(source, rates=True).disk_read_bytes_per_second
    assert np.isnan(made.iloc[0])
    # Between two readings the mean of that time; then, until the next is due, the last one.
    assert list(made.iloc[1:12]) == [100, 100, 200, *[100] * 8]
    assert np.isnan(made.iloc[12])
    source[6, AT["gap"]] = 1
    _, values = series(source, ["disk_read_bytes_per_second"], 0.0, 100)
    # The row of the hole is one more.
    assert np.isnan(values["disk_read_bytes_per_second"][[0, 6, 7, 8]]).all()
    assert (values["disk_read_bytes_per_second"][[4, 5, 9, 10]] == 100).all()


def test_a_counter_that_was_there_at_each_sample_and_is_lost_is_unknown_at_once() -> None:
    source = rows(6)
    source[4:, AT["disk_read_bytes_total"]] = np.nan
    made = frame(source, rates=True).disk_read_bytes_per_second
    assert (made.iloc[1:4] == 100).all()
    assert made.iloc[4:].isna().all()


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=500), st.integers(2, 60))
def test_decimation_keeps_the_extremes(values: list[float], most: int) -> None:
    times = np.arange(len(values), dtype=float)
    reduced, columns = decimate(times, {"x": np.array(values)}, most)
    assert len(reduced) <= max(most, 2)
    assert len(reduced) == len(columns["x"])
    assert columns["x"].min() == min(values)
    assert columns["x"].max() == max(values)
    assert reduced[0] == 0
    assert reduced[-1] == times[-1]
    assert (np.diff(reduced) >= 0).all()


def test_a_part_of_the_history_keeps_its_first_rate() -> None:
    part = frame(rows(10), rates=True, since=3, until=datetime(1970, 1, 1, 0, 0, 6, tzinfo=UTC), attrs={"host": "h"})
    assert list(part.time_seconds) == [3.0, 4.0, 5.0, 6.0]
    assert (part.disk_read_bytes_per_second == 100.0).all()
    assert part.attrs["host"] == "h"
    assert moment("1970-01-01 01:00+01:00", 9.0) == 0.0
    assert moment(None, 9.0) == 9.0


@pytest.mark.parametrize(
    "number", [np.int64(90), np.float32(90), np.uint8(90), Fraction(90), 90, np.datetime64(90, "s"), 90.0]
)
def test_numbers_of_any_kind_are_seconds_since_the_epoch(number: object) -> None:
    assert moment(number, 0.0) == 90.0  # type: ignore[arg-type]
    assert frame(rows(200), since=number).time_seconds.iloc[0] == 90.0  # type: ignore[arg-type]


def test_durations_of_numpy_are_durations_and_what_has_no_end_can_be_cut() -> None:
    assert moment(np.timedelta64(-15, "m"), 0.0, newest=1000.0) == 100.0
    assert span_of(np.timedelta64(5, "m")) == span_of(np.int64(300)) == span_of(np.float32(300)) == 300.0
    assert (moment(-math.inf, 0.0), moment(math.inf, 0.0)) == (EARLIEST, LATEST)
    assert len(raw_history(rows(100), since=-math.inf, until=math.inf, resolution=10)) == 10


@pytest.mark.parametrize(
    "text",
    ["now", "today", " Now ", "17:00", "9:30:15", "T05:30", "10:00+02:00", "5pm", "5 pm", "May 5", "12/24", "NaT"],
)
def test_a_text_that_means_another_moment_to_each_reader_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no moment; give seconds since the epoch, a date with its year"):
        moment(text, 0.0)


def test_after_a_clock_was_set_back_the_index_can_be_cut_and_rates_are_of_the_true_order() -> None:
    source = rows(120)
    source[60:, 0] -= 30.5
    made = frame(source, rates=True)
    assert len(made) == 120
    assert made.index.is_monotonic_increasing
    assert len(made.loc["1970-01-01 00:00:30":"1970-01-01 00:00:39"]) == 20
    taken = made.sort_values("monotonic_seconds")
    assert (taken.disk_read_bytes_per_second.iloc[1:] == 100.0).all()
    buckets = raw_history(source, resolution=10, rates=True)
    assert buckets.index.is_monotonic_increasing
    assert buckets.sample_count.sum() == 120
    assert (buckets.disk_read_bytes_per_second.dropna() == 100.0).all()


@pytest.mark.parametrize("most", [1000, 20])
def test_chart_data_never_goes_back_after_a_clock_was_set_back(most: int) -> None:
    source = rows(120)
    source[60:, 0] -= 30.5
    source[90, AT["gap"]] = 1.0
    times, values = series(source, ["disk_read_bytes_per_second", "cpu_utilization_ratio"], 0.0, most)
    assert (np.diff(times) >= 0).all()
    speed = values["disk_read_bytes_per_second"]
    assert np.nanmin(speed) == np.nanmax(speed) == 100.0
    if most == 1000:
        assert len(times) == 121
        assert np.isnan(speed).sum() == 3  # the first, the gap, and what ends it


@pytest.mark.parametrize("most", [1000, 8])
def test_chart_data_of_buckets_never_goes_back_after_a_clock_was_set_back(most: int) -> None:
    source = rows(600)
    source[300:, 0] -= 147.5
    names = ("time_seconds", "monotonic_seconds", "gap", "cpu_utilization_ratio")
    columns = [AT[name] for name in names]
    buckets = coarsen(lift(source[:, columns], names), 10.0, names)
    times, values = bucket_series(buckets, names, ["cpu_utilization_ratio"], 0.0, most)
    assert (np.diff(times) >= 0).all()
    assert len(times) == len(values["cpu_utilization_ratio"]) == min(2 * len(buckets), most)


def test_a_counter_that_went_back_has_no_rate() -> None:
    source = rows(4)
    source[2:, AT["disk_read_bytes_total"]] = [0.0, 50.0]
    made = frame(source, rates=True).disk_read_bytes_per_second
    assert np.isnan(made.iloc[2])
    assert made.iloc[3] == 50.0


def test_nothing_gives_empty_frames_and_series() -> None:
    empty = np.empty((0, len(SAMPLE_COLUMNS)))
    assert list(frame(empty).columns) == list(SAMPLE_COLUMNS)
    times, values = series(empty, ["cpu_utilization_ratio", "disk_read_bytes_per_second"], 0.0, 10)
    assert len(times) == len(values["cpu_utilization_ratio"]) == len(values["disk_read_bytes_per_second"]) == 0
    with pytest.raises(KeyError):
        series(empty, ["no_such_column"], 0.0, 10)


def test_a_gap_survives_decimation() -> None:
    source = rows(1000)
    source[:, AT["cpu_utilization_ratio"]] = 0.5
    source[500:, :2] += 600
    source[500, AT["gap"]] = 1
    times, values = series(source, ["cpu_utilization_ratio"], 0.0, 100)
    assert len(times) <= 100
    at = np.flatnonzero(np.isnan(values["cpu_utilization_ratio"]))
    assert len(at) == 2
    assert 450 < times[at[0]] < 1150


@pytest.mark.parametrize("text", ["15", "1.5", "15.", "1h30", "5 10min", " 15 "])
def test_a_text_that_names_no_unit_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match='before the newest sample with its unit such as "-15min"'):
        moment(f"-{text.strip()}", 0.0, newest=1000.0)
    with pytest.raises(UsageError, match='a number of seconds or a text with its unit such as "5min"'):
        span_of(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("15min", 900.0), ("1h 30min", 5400.0), ("00:01:30", 90.0), ("0.5s", 0.5), ("PT2H", 7200.0)]
)
def test_a_text_with_its_unit_is_a_duration(text: str, seconds: float) -> None:
    assert span_of(text) == seconds
    if not text.startswith("P"):
        assert moment(f"-{text}", 0.0, newest=10_000.0) == 10_000.0 - seconds
