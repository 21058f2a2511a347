"""The mapped ring and the schedule, alone and with a writer in another process."""

from __future__ import annotations

import gc
import math
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wiseflow_nb.records import SAMPLE_COLUMNS, Sample
from wiseflow_nb.resources._ring import RingReader, RingWriter
from wiseflow_nb.resources._schedule import Schedule, is_gap


def test_rows_come_back_and_the_oldest_go(tmp_path: Path) -> None:
    path = str(tmp_path / "ring.bin")
    writer = RingWriter(path, capacity=10)
    reader = RingReader(path)
    assert reader.latest() is None
    assert reader.read()[1].shape == (0, len(SAMPLE_COLUMNS))
    for number in range(25):
        writer.append(Sample(time_seconds=float(number)))
        assert reader.latest() == pytest.approx(Sample(time_seconds=float(number)), nan_ok=True)
    first, rows = reader.read()
    assert first + len(rows) == 25
    assert list(rows[:, 0]) == [float(number) for number in range(first, 25)]
    assert len(rows) >= 9
    assert list(reader.read(since_count=23)[1][:, 0]) == [23.0, 24.0]
    assert len(reader.read(since_count=99)[1]) == 0
    reader.close()
    writer.close()


def test_a_resumed_ring_goes_on_where_it_was(tmp_path: Path) -> None:
    path = str(tmp_path / "ring.bin")
    writer = RingWriter(path, capacity=10)
    writer.append(Sample(time_seconds=1.0))
    writer.close()
    writer = RingWriter.resume(path)
    writer.append(Sample(time_seconds=2.0))
    reader = RingReader(path)
    assert list(reader.read()[1][:, 0]) == [1.0, 2.0]
    reader.close()
    writer.close()
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600


def test_what_is_not_a_ring_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nonsense" * 100)
    with pytest.raises(ValueError, match="not a ring"):
        RingReader(str(tmp_path / "x"))
    with pytest.raises(ValueError, match="not a ring"):
        RingWriter.resume(str(tmp_path / "x"))


_WRITER = """
import sys
from wiseflow_nb.resources._ring import RingWriter
from wiseflow_nb.records import SAMPLE_COLUMNS
ring = RingWriter(sys.argv[1], capacity=64)
print("ready", flush=True)
for number in range(200_000):
    ring.append([float(number)] * len(SAMPLE_COLUMNS))
"""


def test_what_was_taken_after_a_moment_is_found_also_past_the_turn_of_the_ring(tmp_path: Path) -> None:
    path = str(tmp_path / "ring")
    writer = RingWriter(path, capacity=4)
    assert writer.after(-math.inf) == []
    for number in range(6):
        # The wall clock goes back all the while.
        writer.append(Sample(time_seconds=-float(number), monotonic_seconds=float(number)))
    writer.close()
    again = RingWriter.resume(path)
    for moment, times in ((3.0, [4.0, 5.0]), (-math.inf, [2.0, 3.0, 4.0, 5.0]), (5.0, []), (9.0, [])):
        assert [row[1] for row in again.after(moment)] == times
    again.close()


def test_a_reader_never_sees_a_torn_row_of_a_writer_in_full_flight(tmp_path: Path) -> None:
    path = str(tmp_path / "ring.bin")
    child = subprocess.Popen([sys.executable, "-c", _WRITER, path], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    reader = RingReader(path)
    while child.poll() is None:
        first, rows = reader.read()
        assert (rows == rows[:, :1]).all(), "a row of two generations"
        if len(rows):
            assert rows[0, 0] == first
            assert (np.diff(rows[:, 0]) == 1).all()
    child.stdout.close()
    assert reader.latest()[0] == 199_999.0
    reader.close()


@given(st.floats(0.02, 100), st.lists(st.floats(0, 500), max_size=50))
def test_the_schedule_stays_on_its_grid_and_never_bursts(interval: float, waits: list[float]) -> None:
    schedule, now = Schedule(50.0, interval), 50.0
    for wait in waits:
        now = max(now, schedule.deadline) + wait
        schedule.advance(now)
        assert now < schedule.deadline <= (now + interval) * 1.0001
        ticks = (schedule.deadline - 50.0) / interval
        assert abs(ticks - round(ticks)) < 1e-6 * max(1.0, ticks)


def test_a_shorter_interval_takes_effect_at_once() -> None:
    schedule = Schedule(0.0, 10.0)
    schedule.advance(0.0)
    schedule.set_interval(1.0, 2.0)
    assert schedule.deadline == 3.0


@pytest.mark.parametrize(
    ("measured", "interval", "gap"), [(0.11, 0.1, False), (1.2, 0.1, True), (25, 10, False), (31, 10, True)]
)
def test_what_counts_as_a_gap(measured: float, interval: float, gap: bool) -> None:
    assert is_gap(measured, interval) is gap


def test_a_ring_begun_anew_kills_no_reader_that_has_it_open(tmp_path: Path) -> None:
    path = str(tmp_path / "ring.bin")
    writer = RingWriter(path)
    writer.append(Sample(time_seconds=1.0))
    reader = RingReader(path)
    again = RingWriter(path)
    assert reader.latest() is None
    again.append(Sample(time_seconds=2.0))
    assert reader.latest().time_seconds == 2.0
    for item in (reader, writer, again):
        item.close()


def test_a_ring_that_is_still_being_made_is_refused_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "ring.bin"
    path.touch()
    with pytest.raises(ValueError, match="not a ring"):
        RingReader(str(path))
    path.write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="not a ring"):
        RingReader(str(path))
    writer = RingWriter(str(path))
    reader = RingReader(str(path))
    assert reader.count == 0
    reader.close()
    writer.close()


def test_the_whole_file_is_there_from_the_start(tmp_path: Path) -> None:
    writer = RingWriter(str(tmp_path / "ring.bin"))
    status = (tmp_path / "ring.bin").stat()
    assert status.st_size == 64 + 3600 * len(SAMPLE_COLUMNS) * 8
    writer.close()


@pytest.mark.parametrize("capacity", [9, 3600])
def test_a_sample_takes_eight_bytes_a_column_and_eight(tmp_path: Path, capacity: int) -> None:
    writer = RingWriter(str(tmp_path / "ring.bin"), capacity=capacity)
    writer.close()
    assert (tmp_path / "ring.bin").stat().st_size / capacity <= 8 * len(SAMPLE_COLUMNS) + 8


def test_appends_keep_no_memory(tmp_path: Path) -> None:
    writer, sample = RingWriter(str(tmp_path / "ring.bin")), Sample(time_seconds=1.0)
    tracemalloc.start()
    try:
        for _ in range(1000):
            writer.append(sample)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in range(100_000):
            writer.append(sample)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert writer.count == 101_000
    # The count itself grew from a small number to a larger one, and no more; in flight a row's floats.
    assert after - before <= 256
    assert peak - before <= 4096
    writer.close()


def test_a_million_appends_leave_no_object_behind(tmp_path: Path) -> None:
    writer, sample = RingWriter(str(tmp_path / "ring.bin")), Sample(time_seconds=1.0)
    # Tracing each allocation would take six times as long; the interpreter counts its blocks anyway.
    writer.append(sample)
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(1_000_000):
        writer.append(sample)
    gc.collect()
    grown = sys.getallocatedblocks() - before
    assert writer.count == 1_000_001
    # The two counts, a loop's own few, and nothing for each of a million.
    assert grown <= 100
    writer.close()
