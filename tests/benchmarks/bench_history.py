"""History: an append to the ring, a day at 1 Hz as a DataFrame, a week of chart data."""

from __future__ import annotations

import math
import os
import sqlite3
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from tests.benchmarks.harness import Bench
from wiseflow_nb.records import SAMPLE_COLUMNS, TIER_SECONDS, Sample
from wiseflow_nb.resources._archive import Archive
from wiseflow_nb.resources._ring import RingWriter
from wiseflow_nb.store.paths import private_directory
from wiseflow_nb.store.reader import StoreReader
from wiseflow_nb.store.tiers import BUCKET_WIDTH
from wiseflow_nb.store.writer import StoreWriter

DAY = 86_400
WEEK = 604_800
END = 1_700_000_000.0
APPENDS = 100_000
#: What the dashboard draws, by and large.
CHARTED = (
    "cpu_utilization_ratio",
    "memory_utilization_ratio",
    "filesystem_utilization_ratio",
    "disk_read_bytes_per_second",
    "disk_written_bytes_per_second",
    "network_receive_bytes_per_second",
    "network_transmit_bytes_per_second",
)


def _sample(second: int) -> Sample:
    values = [float(second % (7 + index)) for index in range(len(SAMPLE_COLUMNS))]
    values[:4] = [END - DAY + second, float(second), 1.0, 0.0]
    return Sample(*values)


def _directory(root: str, name: str) -> Path:
    directory = Path(root) / name
    private_directory(directory)
    return directory


def _full_tiers(path: Path) -> None:
    """A file whose tiers are as full as they get: an hour, a day and a week until ``END``."""
    StoreWriter(path).close()
    db = sqlite3.connect(path)
    spans, reach, block = (1.0, *TIER_SECONDS[1:]), (3600, DAY, WEEK), (60, 60, 30)
    with db:
        for tier, (span, seconds, rows) in enumerate(zip(spans, reach, block, strict=True)):
            width = len(SAMPLE_COLUMNS) if tier == 0 else BUCKET_WIDTH
            planes = width // len(SAMPLE_COLUMNS)
            count = int(seconds / span)
            data = np.random.default_rng(tier).random((count, planes, len(SAMPLE_COLUMNS)))
            data[:, :, 0] = data[:, :, 1] = (END - seconds + np.arange(count) * span)[:, None]
            data[:, :, 3] = 0.0
            for at in range(0, count, rows):
                part = data[at : at + rows]
                first, last = float(part[0, 0, 0]), float(part[-1, 0, 0])
                # Both clocks show the same.
                db.execute(
                    "INSERT INTO samples (tier, start_seconds, end_seconds, start_monotonic, end_monotonic, count, data) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (tier, first, last, first, last, len(part), part.tobytes()),
                )
    db.close()


def run(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as root:
        _append(bench, root)
        _day(bench, root)
        _week(bench, root)


def _append(bench: Bench, root: str) -> None:
    path = os.path.join(root, "ring")
    ring, sample = RingWriter(path), _sample(5)
    best = math.inf
    for _ in range(bench.rounds):
        begin = time.perf_counter()
        for _ in range(APPENDS):
            ring.append(sample)
        best = min(best, (time.perf_counter() - begin) / APPENDS)
    ring.close()
    bench.note("append to the ring", best * 1e6, "us", goal=3.0)
    bench.note("ring, bytes a sample", os.path.getsize(path) / ring.capacity, "B", goal=8 * len(SAMPLE_COLUMNS) + 8)


def _day(bench: Bench, root: str) -> None:
    directory = _directory(root, "20260101-000000-aaaaaa")
    writer = StoreWriter(directory / "session.sqlite")
    samples = [_sample(second) for second in range(DAY)]
    for sample in samples:
        writer.sample(sample)
        if writer.full_blocks >= 60:
            writer.write_blocks(partial=False)
            writer.commit()
    writer.write_blocks(partial=True)
    writer.close()
    reader = StoreReader(directory)
    dicts = [sample._asdict() for sample in samples]
    none = np.empty((0, len(SAMPLE_COLUMNS)))

    def ours() -> float:
        begin = time.perf_counter()
        frame = Archive(reader, none).history(resolution="raw")
        took = time.perf_counter() - begin
        assert frame.shape == (DAY, len(SAMPLE_COLUMNS))
        return took

    def list_of_dicts() -> float:
        begin = time.perf_counter()
        frame = pd.DataFrame(dicts)
        frame.index = pd.DatetimeIndex(pd.to_datetime(frame.time_seconds, unit="s", utc=True), name="time")
        took = time.perf_counter() - begin
        assert frame.shape == (DAY, len(SAMPLE_COLUMNS))
        return took

    bench.pair("a day at 1 Hz to a DataFrame", ours, list_of_dicts, peer_name="list of dicts", goal=1 / 15)
    reader.close()


def _week(bench: Bench, root: str) -> None:
    directory = _directory(root, "20260101-000000-bbbbbb")
    _full_tiers(directory / "session.sqlite")
    reader = StoreReader(directory)
    ring = reader.sample_blocks(END - 3600)
    for name, seconds in (("7 d", WEEK), ("24 h", DAY), ("1 h", 3600)):
        best = math.inf
        for _ in range(bench.rounds):
            begin = time.perf_counter()
            Archive(reader, ring).series(CHARTED, END - seconds, 3600)
            best = min(best, time.perf_counter() - begin)
        bench.note(f"chart data of {name}, {len(CHARTED)} columns", best * 1e3, "ms", goal=20.0)
    reader.close()
