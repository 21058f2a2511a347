"""Histories over the tiers: the file and the ring together, at any resolution."""

from __future__ import annotations

import itertools
import math
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_tiers import series as sample_series
from wiseflow_nb.errors import UsageError
from wiseflow_nb.records import GAUGE_COLUMNS, SAMPLE_COLUMNS, Sample
from wiseflow_nb.resources._archive import Archive
from wiseflow_nb.resources._buckets import coarsen, joined, lift
from wiseflow_nb.resources._history import raw_history, span_of
from wiseflow_nb.store.paths import private_directory
from wiseflow_nb.store.reader import StoreReader, fit_columns
from wiseflow_nb.store.schema import MIGRATIONS, MONOTONIC_VERSION
from wiseflow_nb.store.tiers import WIDTH, roll_up
from wiseflow_nb.store.writer import StoreWriter

AT = {name: index for index, name in enumerate(SAMPLE_COLUMNS)}
START = 1_700_000_003.0
EMPTY = np.empty((0, WIDTH))


def signal(count: int, start: float = START) -> list[Sample]:
    """One hertz; the CPU is busy in every seventh second only."""
    return [
        Sample(
            start + n,
            float(n),
            1.0 if n else math.nan,
            0.0,
            cpu_utilization_ratio=float(n % 7 == 0),
            disk_read_bytes_total=float(n * n),
        )
        for n in range(count)
    ]


def array(samples: list[Sample]) -> np.ndarray:
    return np.array(samples, dtype=float).reshape(-1, WIDTH)


@pytest.fixture
def make(tmp_path: Path):
    """A file that has recorded samples, and its archive with the newest ``ring`` of them."""
    readers = []

    def made(
        samples: list[Sample],
        *,
        ring: int = 0,
        forget: tuple[float, ...] = (),
        end: bool = False,
        replaced: tuple[int, ...] = (),
    ) -> Archive:
        directory = tmp_path / "sessions" / f"20260101-00000{len(readers)}-abcdef"
        private_directory(directory.parent)
        private_directory(directory)
        writer = StoreWriter(directory / "session.sqlite")
        for at, sample in enumerate(samples):
            if at in replaced:
                # Killed, all its samples in the file: another one goes on.
                writer.write_blocks(partial=True)
                writer.close()
                writer = StoreWriter(directory / "session.sqlite")
            writer.sample(sample)
        writer.write_blocks(partial=True)
        if end:
            writer.close_tiers()
        writer.commit()
        while forget and writer.forget_samples(samples[-1].monotonic_seconds, forget):
            pass
        writer.close()
        readers.append(StoreReader(directory))
        return Archive(readers[-1], array(samples[len(samples) - ring :]) if ring else EMPTY)

    yield made
    for reader in readers:
        reader.close()


Make = Callable[..., Archive]


@settings(deadline=None)
@given(sample_series(), st.sampled_from([10.0, 60.0]))
def test_arrays_are_rolled_up_by_the_recorders_rule(samples: list[Sample], span: float) -> None:
    expected = np.array(roll_up(samples, span)).reshape(-1, 4, WIDTH)
    np.testing.assert_allclose(coarsen(lift(array(samples)), span), expected, rtol=1e-9, atol=1e-3)


@settings(deadline=None)
@given(sample_series(), st.data())
def test_any_way_through_finer_spans_gives_the_same(samples: list[Sample], data: st.DataObject) -> None:
    rows = array(samples)
    direct = coarsen(lift(rows), 300.0)
    through = coarsen(coarsen(coarsen(lift(rows), 10.0), 60.0), 300.0)
    cut = data.draw(st.integers(0, len(rows)))
    parts = joined(coarsen(lift(rows[:cut]), 10.0), lift(rows[cut:]), 10.0)
    np.testing.assert_allclose(through, direct, rtol=1e-9, atol=1e-3)
    np.testing.assert_allclose(parts, coarsen(lift(rows), 10.0), rtol=1e-9, atol=1e-3)


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("ring", [0, 100])
def test_every_tier_reaches_to_the_newest_sample(make: Make, end: bool, ring: int) -> None:
    samples = signal(2500)
    archive = make(samples, end=end, ring=ring)
    for name, span in (("10s", 10.0), ("60s", 60.0)):
        made = archive.history(resolution=name)
        expected = np.array(roll_up(samples, span)).reshape(-1, 4, WIDTH)
        assert made.attrs["tier"] == name
        assert made.attrs["resolution_seconds"] == span
        np.testing.assert_allclose(made[list(SAMPLE_COLUMNS)], expected[:, 0])
        np.testing.assert_allclose(made.cpu_utilization_ratio_max, expected[:, 2, AT["cpu_utilization_ratio"]])
        np.testing.assert_allclose(made.cpu_utilization_ratio_min, expected[:, 1, AT["cpu_utilization_ratio"]])
        assert made.sample_count.sum() == 2500
    assert len(archive.history(resolution="raw")) == 2500


def test_the_finest_tier_that_reaches_back_is_chosen(make: Make) -> None:
    samples = signal(3 * 3600)
    archive = make(samples, ring=600, forget=(1800.0, 7200.0, 604_800.0))
    assert archive.history().attrs["tier"] == "60s"
    assert archive.history(since="-100min").attrs["tier"] == "10s"
    assert archive.history(since=timedelta(minutes=-20)).attrs["tier"] == "raw"
    assert archive.history(since="-20min").attrs["tier"] == "raw"
    assert archive.history(since="-100min", resolution="raw").index[0].timestamp() > START + 2 * 3600
    whole = archive.history()
    assert whole.index[0] == datetime.fromtimestamp(math.floor(START / 60) * 60, UTC)
    assert whole.sample_count.sum() == len(samples)


def test_an_old_file_without_tiers_is_read_at_any_resolution(make: Make, tmp_path: Path) -> None:
    import sqlite3

    samples = signal(1300)
    archive = make(samples)
    with sqlite3.connect(next(tmp_path.rglob("session.sqlite"))) as db:
        db.execute("DELETE FROM samples WHERE tier > 0")
    db.close()
    assert archive.history().attrs["tier"] == "raw"
    assert archive.history(resolution="60s").sample_count.sum() == 1300
    assert len(archive.series(["cpu_utilization_ratio"], START, 100)[0]) <= 100


@pytest.mark.parametrize(
    ("resolution", "tier", "rows"), [(300, "60s", 10), ("5min", "60s", 10), (30, "10s", 85), (25.0, "raw", 101)]
)
def test_any_other_span_is_rolled_up_from_the_coarsest_that_divides_it(
    make: Make, resolution: float | str, tier: str, rows: int
) -> None:
    samples = signal(2500)
    made = make(samples).history(resolution=resolution)
    span = made.attrs["resolution_seconds"]
    assert (made.attrs["tier"], len(made)) == (tier, rows)
    expected = np.array(roll_up(samples, span)).reshape(-1, 4, WIDTH)
    np.testing.assert_allclose(made[list(SAMPLE_COLUMNS)], expected[:, 0], rtol=1e-9)


@pytest.mark.parametrize("resolution", ["fast", "", 0, -10, math.nan, math.inf, "-10s", "8d", True, [10]])
def test_an_unknown_resolution_names_what_is_allowed(make: Make, resolution: object) -> None:
    with pytest.raises(UsageError, match=r"resolution .* \"raw\", \"10s\", \"60s\""):
        make(signal(3)).history(resolution=resolution)
    with pytest.raises(UsageError):
        span_of(resolution)


@pytest.mark.parametrize("value", ["no time", "", math.nan, timedelta(minutes=5), "-x", True, [1]])
def test_what_is_no_moment_is_refused(make: Make, value: object) -> None:
    with pytest.raises(UsageError, match="is no moment; give"):
        make(signal(3)).history(since=value)


def test_moments_in_every_form_mean_the_same(make: Make) -> None:
    archive = make(signal(100))
    newest = START + 99
    stamp = datetime.fromtimestamp(newest - 60, UTC)
    for since in (
        newest - 60,
        stamp,
        stamp.isoformat(),
        str(stamp.replace(tzinfo=None)),
        "-60s",
        timedelta(minutes=-1),
    ):
        made = archive.history(since=since, until=newest - 30)
        assert (len(made), made.time_seconds.iloc[0]) == (31, newest - 60), since


def test_a_range_gets_whole_buckets_and_its_first_row_a_rate(make: Make) -> None:
    samples = signal(2500)
    archive = make(samples)
    whole = archive.history(resolution="60s", rates=True)
    part = archive.history(resolution="60s", rates=True, since=START + 1000, until=START + 1900)
    expected = whole[(whole.index >= part.index[0]) & (whole.index <= part.index[-1])]
    assert part.index[0].timestamp() <= START + 1000 < part.index[1].timestamp()
    assert part.index[-1].timestamp() <= START + 1900 < part.index[-1].timestamp() + 60
    np.testing.assert_allclose(part, expected)
    assert not np.isnan(part.disk_read_bytes_per_second.iloc[0])


@settings(max_examples=30, deadline=None)
@given(sample_series(), st.sampled_from([10.0, 60.0, 25.0]))
def test_rates_over_buckets_are_those_of_the_raw_counters(samples: list[Sample], span: float) -> None:
    made = raw_history(array(samples), resolution=span, rates=True).dropna(subset=["time_seconds"])
    last = {math.floor(sample[0] / span) * span: sample for sample in samples}
    for before, after in itertools.pairwise(made.itertuples()):
        first, second = last[before.time_seconds], last[after.time_seconds]
        if after.gap:
            assert math.isnan(after.process_cpu_seconds_per_second)
        else:
            change = second.process_cpu_seconds_total - first.process_cpu_seconds_total
            elapsed = second.monotonic_seconds - first.monotonic_seconds
            assert after.process_cpu_seconds_per_second == pytest.approx(change / elapsed)


@pytest.mark.parametrize("resolution", ["raw", "10s"])
def test_a_gap_is_a_row_of_nan(make: Make, resolution: str) -> None:
    samples = signal(100)
    later = [s._replace(time_seconds=s[0] + 600, monotonic_seconds=s[1] + 600) for s in signal(100)]
    later[0] = later[0]._replace(gap=1.0, interval_seconds=501.0)
    made = make(samples + later).history(resolution=resolution, rates=True)
    (at,) = np.flatnonzero(made.isna().all(axis=1))
    assert made.index[at - 1].timestamp() < START + 100 < made.index[at].timestamp() < START + 600
    assert made.gap.iloc[at + 1] == 1.0
    assert math.isnan(made.disk_read_bytes_per_second.iloc[at + 1])
    assert made.index.is_monotonic_increasing
    if resolution == "10s":
        assert made.interval_seconds.sum() == 198.0


def test_a_frame_never_changes_afterwards(make: Make) -> None:
    ring = array(signal(50))
    archive = Archive(make(signal(10))._store, ring)
    frames = [archive.history(), archive.history(resolution="10s"), archive.history(since=START + 20)]
    before = [frame.copy(deep=True) for frame in frames]
    ring[:] = -1.0
    assert all(frame.equals(copy) for frame, copy in zip(frames, before, strict=True))
    frames[0].iloc[0, 0] = 5.0
    assert frames[0].iloc[0, 0] == 5.0


def test_columns_and_index_of_a_tier(make: Make) -> None:
    made = make(signal(100)).history(resolution="10s")
    expected = [f"{name}_{end}" for end in ("min", "max") for name in GAUGE_COLUMNS]
    assert list(made.columns) == [*SAMPLE_COLUMNS, *expected, "sample_count"]
    assert (made.index.name, str(made.index.tz)) == ("time", "UTC")
    assert "disk_read_bytes_total_min" not in made


@pytest.mark.parametrize("count", [0, 700, 4000])
def test_some_columns_of_a_tier_are_those_of_all(make: Make, count: int) -> None:
    archive = make(signal(count), end=True)
    names = ("monotonic_seconds", "cpu_utilization_ratio", "gap")
    whole, covered = archive._store.tier_blocks(1, START + 100.0, START + 3000.0)
    some = archive._store.tier_blocks(1, START + 100.0, START + 3000.0, names)
    assert some[1] == covered
    np.testing.assert_array_equal(some[0], whole[..., [AT[name] for name in names]])


def test_a_session_without_samples_has_empty_histories(make: Make) -> None:
    archive = make([])
    for resolution in (None, "raw", "10s", 300):
        made = archive.history(resolution=resolution, since="-1h", rates=True)
        assert len(made) == 0
        assert "cpu_utilization_ratio" in made
    assert len(archive.series(["cpu_utilization_ratio"], 0.0, 10)[0]) == 0


def test_chart_data_of_a_long_range_keeps_the_peaks(make: Make) -> None:
    samples = signal(3 * 3600)
    samples[1000] = samples[1000]._replace(cpu_utilization_ratio=5.0)
    archive = make(samples, ring=600, forget=(1800.0, 7200.0, 604_800.0))
    for since, points in ((START, 3600), (START, 50), (START + 5400, 200)):
        times, columns = archive.series(["cpu_utilization_ratio", "disk_read_bytes_per_second"], since, points)
        assert 10 < len(times) <= points
        assert (np.diff(times) >= 0).all()
        assert times[-1] == samples[-1].time_seconds
        assert np.nanmin(columns["cpu_utilization_ratio"]) == 0.0
        assert np.nanmax(columns["cpu_utilization_ratio"]) == (5.0 if since == START else 1.0)
        assert len(columns["disk_read_bytes_per_second"]) == len(times)
    # Recent ranges are drawn from the samples themselves.
    times, _ = archive.series(["cpu_utilization_ratio"], START + 10_000, 3600)
    assert len(times) == 800
    with pytest.raises(KeyError):
        archive.series(["no_such_column"], START, 100)


def test_chart_data_of_buckets_has_a_hole_at_a_gap(make: Make) -> None:
    later = [s._replace(time_seconds=s[0] + 9000, monotonic_seconds=s[1] + 9000) for s in signal(3600)]
    later[0] = later[0]._replace(gap=1.0, interval_seconds=5400.0)
    archive = make(signal(3600) + later, forget=(600.0, 86_400.0, 604_800.0))
    times, columns = archive.series(["cpu_utilization_ratio", "disk_read_bytes_per_second"], START, 3600)
    holes = np.flatnonzero(np.isnan(columns["cpu_utilization_ratio"]))
    assert len(holes) == 2
    assert START + 3600 < times[holes[0]] < START + 9000
    assert (np.diff(times) >= 0).all()


def test_a_file_of_a_version_with_fewer_columns_reads_nan_in_the_new_ones(make: Make, tmp_path: Path) -> None:
    import sqlite3

    archive = make(signal(1300))
    path = next(tmp_path.rglob("session.sqlite"))
    with sqlite3.connect(path) as db:
        for tier, start, count, data in db.execute("SELECT tier, start_seconds, count, data FROM samples").fetchall():
            old = np.frombuffer(data).reshape(count, -1, WIDTH)[:, :, :-1].tobytes()
            db.execute("UPDATE samples SET data = ? WHERE tier = ? AND start_seconds = ?", (old, tier, start))
    db.close()
    for resolution in ("raw", "10s"):
        made = archive.history(resolution=resolution)
        assert made.settings_revision.isna().all()
        assert made.time_seconds.notna().all()
    StoreWriter(path).close()
    assert fit_columns(np.ones((2, WIDTH + 3)), WIDTH).shape == (2, WIDTH)


def test_a_span_that_no_tier_divides_reaches_as_far_back_as_there_is_anything(make: Make) -> None:
    samples = signal(3 * 3600)
    archive = make(samples, ring=600, forget=(3600.0, 86_400.0, 604_800.0))
    assert archive.history(resolution="raw").time_seconds.iloc[0] > START + 7000
    made = archive.history(resolution=25, rates=True)
    assert made.attrs["tier"] == "10s"
    assert made.attrs["resolution_seconds"] == 25.0
    assert made.time_seconds.iloc[0] <= START
    assert made.sample_count.sum() == len(samples)
    # Buckets of 10 s go to the span that they begin in.
    assert set(np.diff(made.time_seconds)) == {25.0}
    assert made.disk_read_bytes_per_second.iloc[1:].notna().all()
    # Finer than what there is cannot be had, and is not made up.
    fine = archive.history(resolution=5)
    assert (fine.attrs["resolution_seconds"], fine.attrs["tier"]) == (10.0, "10s")
    assert fine.sample_count.sum() == len(samples)
    # Within the raw samples it is exact, and a tier that is named reaches as far as it does.
    exact = archive.history(resolution=25, since="-30min")
    assert (exact.attrs["tier"], exact.attrs["resolution_seconds"]) == ("raw", 25.0)
    assert archive.history(resolution="10s").attrs["tier"] == "10s"


def set_back(count: int, seconds: float) -> list[Sample]:
    """In the middle the wall clock is set back."""
    return [
        item._replace(time_seconds=item.time_seconds - seconds * (at >= count // 2))
        for at, item in enumerate(signal(count))
    ]


@pytest.mark.parametrize("resolution", ["raw", "10s", 25])
@pytest.mark.parametrize("ring", [0, 100, 400])
def test_a_clock_that_was_set_back_loses_no_sample_and_no_rate(make: Make, resolution: object, ring: int) -> None:
    samples = set_back(600, 1800.0)
    made = make(samples, ring=ring).history(resolution=resolution, rates=True)
    assert made.index.is_monotonic_increasing
    assert (len(made) if resolution == "raw" else made.sample_count.sum()) == 600
    rates = made.sort_values("monotonic_seconds").disk_read_bytes_per_second
    assert rates.iloc[1:].notna().all()
    assert (rates.iloc[1:] > 0).all()


def test_of_a_clock_that_was_set_back_what_no_block_holds_yet_is_there(make: Make) -> None:
    samples = set_back(600, 1800.0)
    archive = make(samples[:400])
    archive._newest = array(samples[350:])
    for resolution in ("raw", "10s", "60s"):
        made = archive.history(resolution=resolution)
        assert (len(made) if resolution == "raw" else made.sample_count.sum()) == 600


def stepped(count: int, steps: dict[int, float]) -> list[Sample]:
    """At some samples the wall clock moves by so many seconds."""
    moved = itertools.accumulate(steps.get(at, 0.0) for at in range(count))
    return [item._replace(time_seconds=item[0] + by) for item, by in zip(signal(count), moved, strict=True)]


def counts(archive: Archive, **options: object) -> list[float]:
    """How many samples there are of each resolution."""
    frames = [archive.history(resolution=name, **options) for name in ("raw", "10s", "60s", 25)]
    return [len(frames[0]), *(frame.sample_count.sum() for frame in frames[1:])]


def test_since_a_moment_before_the_clock_was_set_back_every_tier_has_every_sample(make: Make) -> None:
    # Whole minutes, so that no bucket begins before the range.
    samples = signal(3600, 1_700_000_040.0)
    samples += [item._replace(monotonic_seconds=item[1] + 3600) for item in signal(599, 1_700_000_040.25 + 3480)]
    archive = make(samples, ring=3600)
    assert counts(archive, since=1_700_000_040.0 + 3480)[:3] == [719, 719, 719]


@pytest.mark.parametrize("ring", [0, 3600])
@pytest.mark.parametrize(
    "steps",
    [{3600: -120.0}, {3600: -3600.0}, {3000: -600.0}, {3000: 3600.0, 3100: -3600.0}, {3000: 3e6, 3100: -3e6}],
    ids=["back", "an hour back", "to the same times", "ahead and right again", "weeks ahead and right again"],
)
@pytest.mark.parametrize("replaced", [(), (3650,), (3650, 5000)])
def test_no_tier_loses_or_doubles_a_sample_whatever_the_wall_clock_does(
    make: Make, ring: int, steps: dict[int, float], replaced: tuple[int, ...]
) -> None:
    samples = stepped(6000, steps)
    archive = make(samples, ring=ring, replaced=replaced)
    assert counts(archive) == [6000, 6000, 6000, 6000]
    assert archive.last_seconds() == samples[-1].time_seconds
    # A look at a part: what was taken under a wrong clock is where that clock put it.
    begin, end = START + 2400, START + 7300
    inside = [item for item in samples if begin <= item[0] <= end]
    assert len(archive.history(resolution="raw", since=begin, until=end)) == len(inside)
    for span in (10.0, 60.0):
        made = archive.history(resolution=span, since=begin, until=end)
        whole = [item for item in samples if math.floor(item[0] / span) in set(np.array(made.time_seconds) // span)]
        # Of two buckets of one span only one may reach into the range.
        assert len(inside) <= made.sample_count.sum() <= len(whole)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.integers(1, 1499), st.sampled_from([-4000.0, -600.0, -30.0, -1.5, 2.0, 900.0, 1e6]), max_size=4),
    st.sets(st.integers(1, 1499), max_size=3),
    st.integers(0, 1500),
)
def test_any_walk_of_the_wall_clock_leaves_every_tier_whole(
    tmp_path_factory: pytest.TempPathFactory, steps: dict[int, float], replaced: set[int], ring: int
) -> None:
    samples = stepped(1500, steps)
    directory = tmp_path_factory.mktemp("walk")
    private_directory(directory)
    writer = StoreWriter(directory / "session.sqlite")
    for at, sample in enumerate(samples):
        if at in replaced:
            writer.close()  # what it had not written is in the ring, and is handed on
            writer = StoreWriter(directory / "session.sqlite")
            for left in samples[:at]:
                if left.monotonic_seconds > writer.last_sample_monotonic():
                    writer.sample(left)
        writer.sample(sample)
        if at % 7 == 0:
            writer.write_blocks(partial=True)
            writer.commit()
    writer.write_blocks(partial=True)
    writer.close()
    reader = StoreReader(directory)
    assert counts(Archive(reader, array(samples[1500 - ring :]) if ring else EMPTY)) == [1500] * 4
    reader.close()


def as_before_monotonic_times(path: Path) -> None:
    """Give a file the tables of the last version whose blocks had no monotonic times."""
    with sqlite3.connect(path) as db:
        blocks = db.execute("SELECT tier, start_seconds, end_seconds, count, data FROM samples ORDER BY id").fetchall()
    db.close()
    path.unlink()
    with sqlite3.connect(path) as db:
        for statement in itertools.chain(*MIGRATIONS[: MONOTONIC_VERSION - 1]):
            db.execute(statement)
        db.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", blocks)
        db.execute(f"PRAGMA user_version = {MONOTONIC_VERSION - 1}")
    db.close()


@pytest.mark.parametrize("ring", [0, 500])
def test_a_file_of_before_blocks_had_monotonic_times_is_read_and_gone_on_with(make: Make, ring: int) -> None:
    samples = stepped(3000, {2500: -90.0})
    directory = make(samples)._store.directory  # type: ignore[attr-defined]
    path = directory / "session.sqlite"
    as_before_monotonic_times(path)
    newest = array(samples[3000 - ring :]) if ring else EMPTY
    old = StoreReader(directory)
    assert counts(Archive(old, newest)) == [3000] * 4
    assert Archive(old, EMPTY).rows()[0, 1] == 0.0
    old.close()
    writer = StoreWriter(path)
    assert writer.last_sample_monotonic() == 2999.0
    longer = stepped(4000, {2500: -90.0})
    for sample in longer[3000:]:
        writer.sample(sample)
    writer.write_blocks(partial=True)
    writer.close()
    reader = StoreReader(directory)
    assert counts(Archive(reader, array(longer[4000 - ring :]) if ring else EMPTY)) == [4000] * 4
    with sqlite3.connect(path) as db:
        ((missing,),) = db.execute(
            "SELECT count(*) FROM samples WHERE start_monotonic IS NULL OR end_monotonic IS NULL"
        )
    db.close()
    reader.close()
    assert missing == 0


def test_raw_samples_wait_for_the_tiers_above_also_after_a_clock_was_ahead(make: Make) -> None:
    samples = stepped(4000, {1000: 7200.0, 1010: -7200.0})
    archive = make(samples, forget=(60.0, 86_400.0, 604_800.0))
    assert counts(archive)[1:3] == [4000, 4000]
