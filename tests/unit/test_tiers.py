"""Buckets of samples: rolled up one by one, merged from parts, written once, forgotten in steps."""

from __future__ import annotations

import contextlib
import itertools
import math
import sqlite3
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wiseflow_nb.records import COUNTER_COLUMNS, GAUGE_COLUMNS, LAST_COLUMNS, SAMPLE_COLUMNS, Sample
from wiseflow_nb.store._samples import BLOCK_ROWS, FORGET_BLOCKS
from wiseflow_nb.store.tiers import (
    BUCKET_WIDTH,
    PENDING_LIMIT,
    WIDTH,
    BucketRow,
    Rollup,
    bucket_start,
    merge,
    roll_up,
    summarise,
)
from wiseflow_nb.store.writer import StoreWriter

AT = {name: index for index, name in enumerate(SAMPLE_COLUMNS)}
DISK = "disk_read_bytes_total"
LOAD = "system_load1"


def planes(row: Sequence[float], column: str) -> tuple[float, float, float, float]:
    """Value, low, high and count of a column."""
    at = AT[column]
    return row[at], row[WIDTH + at], row[2 * WIDTH + at], row[3 * WIDTH + at]


def same(first: Sequence[float], second: Sequence[float]) -> bool:
    return len(first) == len(second) and all(
        (a != a and b != b) or math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-6)
        for a, b in zip(first, second, strict=True)
    )


values = st.one_of(st.just(math.nan), st.floats(-1e12, 1e12))


@st.composite
def series(draw: st.DrawFn, most: int = 40) -> list[Sample]:
    """Samples at any spacing, with gaps, and with NaN in a gauge and a counter."""
    now, counter, made = draw(st.floats(0, 1e6)), 0.0, []
    for _ in range(draw(st.integers(1, most))):
        step = draw(st.one_of(st.floats(0.1, 3), st.floats(5, 200)))
        now += step
        counter += draw(st.integers(0, 10**6))
        made.append(
            Sample(
                time_seconds=1.7e9 + now,
                monotonic_seconds=now,
                interval_seconds=step if made else math.nan,
                gap=float(step > 30),
                disk_read_bytes_total=draw(st.sampled_from([counter, counter, math.nan])),
                process_cpu_seconds_total=counter,
                system_load1=draw(values),
            )
        )
    return made


def test_what_a_bucket_holds() -> None:
    samples = [
        Sample(100.0, 50.0, 1.0, 0.0, disk_read_bytes_total=10.0, system_load1=1.0),
        Sample(101.0, 51.0, 1.0, 0.0, disk_read_bytes_total=30.0),
        Sample(109.0, 59.0, 8.0, 1.0, disk_read_bytes_total=70.0, system_load1=4.0),
    ]
    row = summarise(samples, 10.0)
    assert len(row) == BUCKET_WIDTH
    assert planes(row, "time_seconds") == (100.0, 100.0, 109.0, 3.0)
    assert planes(row, "monotonic_seconds") == (59.0, 50.0, 59.0, 3.0)
    assert planes(row, "interval_seconds") == (2.0, 1.0, 8.0, 3.0)
    assert planes(row, "gap") == (1.0, 0.0, 1.0, 3.0)
    assert planes(row, DISK) == (70.0, 10.0, 70.0, 3.0)
    assert planes(row, LOAD) == (2.5, 1.0, 4.0, 2.0)
    assert all(math.isnan(value) for value in planes(row, "memory_limit_bytes")[:3])
    assert planes(row, "memory_limit_bytes")[3] == 0.0


def test_every_column_has_its_kind() -> None:
    assert {"time_seconds", "interval_seconds", "gap", *LAST_COLUMNS, *GAUGE_COLUMNS} == set(SAMPLE_COLUMNS)
    assert not set(LAST_COLUMNS) & set(GAUGE_COLUMNS)
    assert set(COUNTER_COLUMNS) < set(LAST_COLUMNS)


@settings(deadline=None)
@given(series(), st.sampled_from([10.0, 60.0]))
def test_rolling_up_one_by_one_is_summing_up_each_run(samples: list[Sample], span: float) -> None:
    runs: list[list[Sample]] = []
    for sample in samples:
        if not runs or sample[0] // span != runs[-1][0][0] // span:
            runs.append([])
        runs[-1].append(sample)
    rows = roll_up(samples, span)
    assert all(same(row, summarise(run, span)) for row, run in zip(rows, runs, strict=True))


@settings(deadline=None)
@given(series(), st.data())
def test_parts_of_a_bucket_merge_to_the_same_whatever_the_split(samples: list[Sample], data: st.DataObject) -> None:
    span = 1e9
    cuts = sorted(data.draw(st.sets(st.integers(1, len(samples)), max_size=5)) | {0, len(samples)})
    parts = [summarise(samples[a:b], span) for a, b in itertools.pairwise(cuts)]
    left = parts[0]
    for part in parts[1:]:
        left = merge(left, part)
    right: BucketRow = parts[-1]
    for part in reversed(parts[:-1]):
        right = merge(part, right)
    # The time of a part is the bucket's: all lie in one.
    whole = summarise(samples, span)
    assert same(left, whole)
    assert same(right, whole)


@settings(deadline=None)
@given(series())
def test_a_mean_lies_between_its_bounds_and_nan_is_no_value(samples: list[Sample]) -> None:
    for row in roll_up(samples, 10.0):
        mean, low, high, count = planes(row, LOAD)
        there = [s for s in samples if bucket_start(s[0], 10.0) == row[0] and s.system_load1 == s.system_load1]
        assert count == len(there)
        if there:
            assert low <= mean <= high
        else:
            assert math.isnan(mean)
            assert math.isnan(low)
            assert math.isnan(high)


@settings(deadline=None)
@given(series(), st.sampled_from([10.0, 60.0]))
def test_rates_over_buckets_are_the_raw_differences(samples: list[Sample], span: float) -> None:
    rows = roll_up(samples, span)
    last = {bucket_start(sample[0], span): sample for sample in samples}
    for before, after in itertools.pairwise(rows):
        first, second = last[before[0]], last[after[0]]
        at, mono = AT["process_cpu_seconds_total"], AT["monotonic_seconds"]
        assert after[at] - before[at] == second.process_cpu_seconds_total - first.process_cpu_seconds_total
        assert after[mono] - before[mono] == second.monotonic_seconds - first.monotonic_seconds


@settings(deadline=None)
@given(series())
def test_the_mark_of_a_gap_stays_and_its_time_is_not_covered(samples: list[Sample]) -> None:
    rows = roll_up(samples, 60.0)
    marked = {bucket_start(sample[0], 60.0) for sample in samples if sample.gap}
    assert {row[0] for row in rows if row[AT["gap"]]} == marked
    covered = sum(s.interval_seconds for s in samples if not s.gap and s.interval_seconds == s.interval_seconds)
    kept = [row[AT["interval_seconds"]] for row in rows]
    assert math.isclose(sum(value for value in kept if value == value), covered, abs_tol=1e-6)


def test_a_bucket_of_many_samples_is_bounded_in_memory() -> None:
    rollup = Rollup(60.0)
    for number in range(10 * PENDING_LIMIT):
        assert rollup.add(Sample(time_seconds=number * 0.01, system_load1=float(number))) is None
        assert len(rollup._pending) < PENDING_LIMIT
    row = rollup.close()
    assert row is not None
    assert planes(row, LOAD) == pytest.approx((319.5, 0.0, 639.0, 640.0))
    assert rollup.close() is None


def test_a_clock_that_was_set_back_begins_a_bucket() -> None:
    rows = roll_up([Sample(time_seconds=value) for value in (100.0, 105.0, 41.0, 101.0)], 10.0)
    assert [row[0] for row in rows] == [100.0, 40.0, 100.0]


# In the file.


def stored(path: Path, tier: int) -> list[BucketRow]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        blocks = db.execute("SELECT data, count FROM samples WHERE tier = ? ORDER BY start_seconds", (tier,)).fetchall()

    rows = []
    for data, count in blocks:
        assert len(data) == count * BUCKET_WIDTH * 8
        rows.extend(struct.iter_unpack(f"<{BUCKET_WIDTH}d", data))
    return rows


def at_one_hertz(count: int, start: float = 1_700_000_003.0) -> list[Sample]:
    return [
        Sample(start + n, float(n), 1.0 if n else math.nan, 0.0, system_load1=n % 7, disk_read_bytes_total=float(n))
        for n in range(count)
    ]


def test_full_blocks_come_by_themselves_and_the_rest_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "session.sqlite"
    writer, samples = StoreWriter(path), at_one_hertz(2000)
    for sample in samples:
        writer.sample(sample)
        writer.write_blocks(partial=True)
        writer.commit()
    assert len(stored(path, 1)) == 3 * BLOCK_ROWS[1]
    assert len(stored(path, 2)) == BLOCK_ROWS[2]
    writer.close_tiers()
    writer.commit()
    for number, span in ((1, 10.0), (2, 60.0)):
        rows, expected = stored(path, number), roll_up(samples, span)
        assert all(same(row, wanted) for row, wanted in zip(rows, expected, strict=True))
    writer.close_tiers()
    writer.close()
    assert len(stored(path, 1)) == 201


def rolled(rows: Sequence[BucketRow]) -> list[BucketRow]:
    """Merge the parts of buckets that were written in parts."""
    whole: list[BucketRow] = []
    for row in rows:
        if whole and whole[-1][0] == row[0]:
            whole[-1] = merge(whole[-1], row)
        else:
            whole.append(row)
    return whole


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 1500), st.booleans()), min_size=1, max_size=4))
def test_each_sample_counts_once_whenever_the_recorder_ends(ends: list[tuple[int, bool]]) -> None:
    import tempfile

    path = Path(tempfile.mkdtemp()) / "session.sqlite"
    samples = iter(at_one_hertz(8000))
    taken: list[Sample] = []
    for count, orderly in [*ends, (1, True)]:
        writer = StoreWriter(path)
        for _ in range(count):
            taken.append(next(samples))
            writer.sample(taken[-1])
            if writer.full_blocks:
                writer.write_blocks(partial=False)
                writer.commit()
        # Killed or not, the raw samples are in the file; only in order the upper tiers are too.
        writer.write_blocks(partial=True)
        if orderly:
            writer.close_tiers()
        writer.close()
    for number, span in ((1, 10.0), (2, 60.0)):
        rows, expected = rolled(stored(path, number)), roll_up(taken, span)
        assert all(same(row, wanted) for row, wanted in zip(rows, expected, strict=True))


def test_a_rolled_back_bucket_is_written_again(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "session.sqlite")
    for sample in at_one_hertz(700):
        writer.sample(sample)
    writer.write_blocks(partial=False)
    writer.rollback()
    assert stored(tmp_path / "session.sqlite", 1) == []
    writer.write_blocks(partial=False)
    writer.write_blocks(partial=False)
    writer.commit()
    assert len(stored(tmp_path / "session.sqlite", 1)) == BLOCK_ROWS[1]
    assert writer.full_blocks == 0
    writer.close()


def test_a_block_of_a_moment_that_was_already_is_another_block(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "session.sqlite")
    for _ in range(3):
        for sample in at_one_hertz(25):
            writer.sample(sample)
        writer.close_tiers()
    writer.close()
    assert len(stored(tmp_path / "session.sqlite", 1)) == 9


def test_what_is_too_old_goes_step_by_step_and_no_raw_sample_before_its_bucket(tmp_path: Path) -> None:
    path = tmp_path / "session.sqlite"
    writer, samples = StoreWriter(path), at_one_hertz(60 * 60)
    for sample in samples:
        writer.sample(sample)
    writer.write_blocks(partial=True)
    writer.commit()
    now = samples[-1].monotonic_seconds

    def raw() -> int:
        with contextlib.closing(sqlite3.connect(path)) as db:
            return int(db.execute("SELECT count(*) FROM samples WHERE tier = 0").fetchone()[0])

    assert raw() == 60
    calls = 1
    while writer.forget_samples(now, (0.0, 86_400.0, 604_800.0)):
        calls += 1
        writer.commit()
        assert raw() >= 60 - calls * FORGET_BLOCKS
    writer.commit()
    # The newest half hour is in no block of 60 s buckets yet.
    covered = stored(path, 2)[-1][2 * WIDTH]
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT min(end_seconds) FROM samples WHERE tier = 0").fetchone()[0] >= covered
    assert 0 < raw() < 60
    assert len(stored(path, 1)) == 6 * BLOCK_ROWS[1]
    while writer.forget_samples(now, (3600.0, 0.0, 604_800.0)):
        pass
    writer.close()
    assert stored(path, 1) == []
    assert stored(path, 2) != []
