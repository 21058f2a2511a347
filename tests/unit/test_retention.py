"""Retention: which sessions go, and which rows inside a session's file."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wiseflow_nb.errors import StoreError
from wiseflow_nb.recorder._keeper import Keeper
from wiseflow_nb.recorder._retention import BELIEVED_SECONDS, UNSURE_SECONDS, Pruner, SteadyTime, doomed, prune
from wiseflow_nb.recorder.protocol import RecorderConfig, RecorderSettings
from wiseflow_nb.records import (
    AlertState,
    AlertTransition,
    CellRecord,
    EventRecord,
    Sample,
    SessionInfo,
    SessionState,
    Severity,
    TaskRecord,
    TaskState,
    to_json_dict,
)
from wiseflow_nb.store.trim import CHUNK_ROWS, TABLES, VACUUM_PAGES, Trimmer
from wiseflow_nb.store.writer import StoreWriter
from wiseflow_nb.testing import FakeClock

NOW = 1_000_000.0
DAY = 86_400.0


def info(name: str, state: SessionState, seen: float) -> SessionInfo:
    ended = math.nan if state is SessionState.LIVE else seen
    return SessionInfo(name, state, "", "host", 1, seen - 10.0, ended, seen, path=f"/nowhere/{name}")


SESSIONS = st.lists(
    st.tuples(st.sampled_from(list(SessionState)), st.floats(0.0, NOW), st.integers(0, 1000)),
    max_size=12,
).map(lambda rows: [(info(f"s{number}", state, seen), size) for number, (state, seen, size) in enumerate(rows)])


@settings(deadline=None)
@given(SESSIONS, st.floats(1.0, NOW), st.integers(0, 5000))
def test_what_goes_is_the_oldest_and_never_what_lives(
    sessions: list[tuple[SessionInfo, int]], max_age: float, max_bytes: int
) -> None:
    gone = doomed(sessions, own_id="s0", now=NOW, max_age=max_age, max_bytes=max_bytes)
    names = {item.session_id for item in gone}
    assert "s0" not in names
    assert all(item.state is not SessionState.LIVE for item in gone)
    assert [item.ended_seconds for item in gone] == sorted(item.ended_seconds for item in gone)
    kept = [(item, size) for item, size in sessions if item.session_id not in names]
    total = sum(size for _, size in kept)
    for item, _ in kept:
        if item.state is SessionState.LIVE or item.session_id == "s0":
            continue
        assert NOW - item.ended_seconds <= max_age
        unsure = item.state is SessionState.CRASHED and NOW - item.ended_seconds <= UNSURE_SECONDS
        assert unsure or total <= max_bytes, "over the size, though there was one to remove"
    # And no more than needed: with the newest of them back, something would be over again.
    if gone and NOW - gone[-1].ended_seconds <= max_age:
        assert total + next(size for item, size in sessions if item is gone[-1]) > max_bytes


def make(root: Path, name: str, *, ended: float | None, size: int = 0, heartbeat: float = 0.0) -> Path:
    directory = root / name
    directory.mkdir(parents=True, mode=0o700)
    writer = StoreWriter(directory / "session.sqlite")
    writer.meta("started_seconds", 1.0)
    writer.meta("heartbeat", heartbeat or ended)
    if ended is not None:
        writer.meta("ended_seconds", ended)
    writer.close()
    (directory / "ring.bin").write_bytes(bytes(size))
    return directory


def test_sessions_are_pruned_by_age_and_by_size(tmp_path: Path) -> None:
    now = time.time()
    old = make(tmp_path, "20200101-000000-aaaaaa", ended=now - 20 * DAY)
    large = make(tmp_path, "20200101-000001-aaaaaa", ended=now - 3 * DAY, size=3_000_000)
    small = make(tmp_path, "20200101-000002-aaaaaa", ended=now - 2 * DAY, size=1000)
    live = make(tmp_path, "20200101-000003-aaaaaa", ended=None, size=3_000_000, heartbeat=now)
    own = make(tmp_path, "20200101-000004-aaaaaa", ended=now - 30 * DAY)
    bystander = tmp_path / "not a session"
    bystander.mkdir()
    gone = prune(tmp_path, own_id=own.name, now=now, max_age=14 * DAY, max_bytes=5_000_000)
    assert [Path(item.path) for item in gone] == [old, large]
    assert sorted(tmp_path.iterdir()) == sorted([small, live, own, bystander])


def test_a_wreck_goes_when_it_is_old_and_a_newer_version_s_file_never(tmp_path: Path) -> None:
    now = time.time()
    wreck, fresh, newer = (tmp_path / f"20200101-00000{number}-aaaaaa" for number in range(3))
    for directory in (wreck, fresh):
        directory.mkdir(mode=0o700)
        (directory / "session.sqlite").write_bytes(b"no database at all, but long enough to look like one" * 100)
    make(tmp_path, newer.name, ended=1.0)
    connection = sqlite3.connect(newer / "session.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    for directory in (wreck, newer):
        for path in (*directory.iterdir(), directory):
            os.utime(path, (1.0, 1.0))
    prune(tmp_path, own_id="own", now=now, max_age=DAY, max_bytes=10**12)
    assert sorted(tmp_path.iterdir()) == [fresh, newer]


@pytest.fixture
def writer(tmp_path: Path):
    writer = StoreWriter(tmp_path / "session.sqlite")
    yield writer
    writer.close()


def fill(writer: StoreWriter, count: int, *, age: float, first: int = 0, text: str = "") -> None:
    at = NOW - age
    rows: list = []
    for number in range(first, first + count):
        task = TaskRecord(f"t{number}", "n", TaskState.COMPLETED, finished_seconds=at, output_tail=text, rev=number + 1)
        rows.append(["task", to_json_dict(task)])
        move = {"seq": number, "task_id": "t", "to_state": "completed", "time_seconds": at}
        rows.append(["transition", move])
        rows.append(["event", to_json_dict(EventRecord(at, "kind", "message"))])
        rows.append(["cell", to_json_dict(CellRecord(f"c{number}", number, "", at, finished_seconds=at))])
        alert = AlertTransition(
            f"a{number}", "r", "cpu", "fired", AlertState.OK, AlertState.FIRING, Severity.WARNING, 1, 1, 1, at, at, "m"
        )
        rows.append(["alert", to_json_dict(alert)])
        command = {"created_seconds": at, "who": "me", "verb": "pause", "arguments": "{}", "status": "done"}
        rows.append(["command", command | {"ok": 1, "message": "", "finished_seconds": at}])
    assert writer.apply(rows) == 0
    writer.commit()


def counts(writer: StoreWriter) -> dict[str, int]:
    return {table: writer.connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table, _ in TABLES}


def test_old_rows_go_in_small_steps_and_young_ones_stay(writer: StoreWriter) -> None:
    fill(writer, 1200, age=20 * DAY)
    waiting = TaskRecord("waiting", "n", TaskState.RUNNING, rev=5000)
    writer.apply([["task", to_json_dict(waiting)]])
    fill(writer, 50, age=DAY, first=2000)
    trimmer = Trimmer(14 * DAY, 10**12)
    before, steps = counts(writer), 0
    while trimmer.step(writer.connection, NOW):
        steps += 1
        after = counts(writer)
        assert all(before[table] - after[table] <= 500 for table in after)
        before = after
        assert steps < 1000
    assert steps >= 2
    expected = dict.fromkeys((table for table, _ in TABLES), 50)
    assert counts(writer) == expected | {"tasks": 51}
    assert not trimmer.step(writer.connection, NOW)


def test_tasks_that_never_end_do_not_stand_in_the_way(writer: StoreWriter) -> None:
    rows = [
        ["task", to_json_dict(TaskRecord(f"w{number}", "n", TaskState.WAITING, rev=number + 1))]
        for number in range(600)
    ]
    writer.apply(rows)
    fill(writer, 100, age=20 * DAY, first=1000)
    trimmer = Trimmer(14 * DAY, 10**12)
    for _ in range(100):
        trimmer.step(writer.connection, NOW)
    assert counts(writer)["tasks"] == 600


def test_too_large_a_file_loses_its_oldest_rows_and_gives_the_pages_back(writer: StoreWriter, tmp_path: Path) -> None:
    for number in range(20):
        fill(writer, 100, age=DAY - number, first=100 * number, text="x" * 2000)
    fill(writer, 20, age=60.0, first=10_000, text="x" * 2000)
    writer.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    size = (tmp_path / "session.sqlite").stat().st_size
    trimmer = Trimmer(14 * DAY, size // 2)
    for _ in range(2000):
        if not trimmer.step(writer.connection, NOW):
            break
    writer.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    # What one step may leave free, and the page that it stopped in.
    (page_size,) = writer.connection.execute("PRAGMA page_size").fetchone()
    assert (tmp_path / "session.sqlite").stat().st_size <= size // 2 + (VACUUM_PAGES + 1) * page_size
    left = [row[0] for row in writer.connection.execute("SELECT task_id FROM tasks ORDER BY rowid")]
    assert left[-20:] == [f"t{number}" for number in range(10_000, 10_020)]
    assert len(left) > 100, "no more than needed"
    assert left[0] != "t0"
    assert left == sorted(left, key=lambda name: int(name[1:]))


def test_what_is_young_stays_however_large_the_file(writer: StoreWriter) -> None:
    fill(writer, 200, age=60.0, text="x" * 2000)
    trimmer = Trimmer(14 * DAY, 1)
    for _ in range(50):
        trimmer.step(writer.connection, NOW)
    assert set(counts(writer).values()) == {200}


def test_the_leases_of_who_watches_go_after_a_minute(writer: StoreWriter) -> None:
    for age in (10.0, 100.0):
        lease = {"created_seconds": NOW - age, "who": "me", "verb": "watch", "arguments": "{}", "status": "done"}
        writer.apply([["command", lease | {"ok": 1, "message": "", "finished_seconds": NOW - age}]])
    writer.commit()
    Trimmer(14 * DAY, 10**12).step(writer.connection, NOW)
    assert writer.connection.execute("SELECT finished_seconds FROM commands").fetchall() == [(NOW - 10.0,)]


def test_a_step_ends_when_its_time_is_up_and_each_table_has_its_turn(writer: StoreWriter) -> None:
    fill(writer, 400, age=20 * DAY, text="x" * 2000)
    # Each look at the clock finds that the time is up.
    ticks = itertools.count()
    trimmer, turns = Trimmer(14 * DAY, 10**12, lambda: float(next(ticks))), []
    before, pages, gave_back = counts(writer), 0, 0
    while trimmer.step(writer.connection, NOW):
        after = counts(writer)
        gone = {table: before[table] - after[table] for table in after if before[table] != after[table]}
        assert sum(gone.values()) <= CHUNK_ROWS
        turns += gone
        (free,) = writer.connection.execute("PRAGMA freelist_count").fetchone()
        gave_back += not gone and free < pages
        before, pages = after, free
    assert sorted(turns[:6]) == sorted(table for table, _ in TABLES)
    assert set(counts(writer).values()) == {0}
    # The next round looks at each of them again.
    fill(writer, 20, age=20 * DAY)
    while trimmer.step(writer.connection, NOW):
        pass
    assert set(counts(writer).values()) == {0}
    assert gave_back
    assert pages <= VACUUM_PAGES


def test_free_pages_are_given_back_many_at_a_step(writer: StoreWriter) -> None:
    fill(writer, 400, age=20 * DAY, text="x" * 5000)
    trimmer = Trimmer(14 * DAY, 10**12, lambda: 0.0)
    sizes = []
    for _ in range(100):
        again = trimmer.step(writer.connection, NOW)
        sizes.append(writer.connection.execute("PRAGMA page_count").fetchone()[0])
        if not again:
            break
    given = [before - after for before, after in itertools.pairwise(sizes)]
    assert max(given) == VACUUM_PAGES
    assert writer.connection.execute("PRAGMA freelist_count").fetchone()[0] <= VACUUM_PAGES


def test_a_file_that_can_give_no_page_back_is_done_with(tmp_path: Path) -> None:
    path = tmp_path / "session.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE other (value)")  # before the writer could ask for it
    writer = StoreWriter(path)
    fill(writer, 400, age=20 * DAY, text="x" * 5000)
    trimmer = Trimmer(14 * DAY, 10**12, lambda: 0.0)
    steps = list(itertools.islice(iter(lambda: trimmer.step(writer.connection, NOW), False), 100))
    assert len(steps) < 100
    assert set(counts(writer).values()) == {0}
    assert writer.connection.execute("PRAGMA freelist_count").fetchone()[0] > VACUUM_PAGES
    writer.close()


class SetClock(FakeClock):
    """A clock that can be set: what it shows moves, what it measures does not."""

    set_by = 0.0

    def time(self) -> float:
        return super().time() + self.set_by


YEAR = 365 * DAY


def test_a_clock_set_ahead_is_believed_after_a_day_and_one_set_back_at_once() -> None:
    clock = SetClock(NOW)
    steady = SteadyTime(clock)

    def look() -> float:
        return steady.look()[1] - super(SetClock, clock).time()

    for _ in range(100):
        clock.advance(60.0)
        clock.set_by -= 0.001
        assert look() == pytest.approx(clock.set_by, abs=1.0)
    clock.set_by = YEAR
    for _ in range(20):
        clock.advance(3600.0)
        assert look() == pytest.approx(-0.1)
        assert steady.look()[0] == clock.time()
    clock.set_by = 0.0
    clock.advance(60.0)
    assert look() == pytest.approx(-0.1)
    clock.set_by = YEAR
    look()
    for hours in range(1, 30):
        clock.advance(3600.0)
        # The two clocks drift apart all the while.
        clock.set_by -= 0.001
        assert look() == pytest.approx(YEAR if 3600 * hours > BELIEVED_SECONDS else -0.1, abs=0.5)
    clock.set_by = -YEAR
    assert look() == -YEAR


class Silent:
    """A kernel that says nothing."""

    def send(self, message: dict) -> None: ...


@pytest.fixture
def keeper(writer: StoreWriter, tmp_path: Path) -> Keeper:
    config = RecorderConfig("20200101-000000-aaaaaa", str(tmp_path), 1, "", {}, RecorderSettings())
    return Keeper(config, writer, Silent(), SetClock(NOW), lambda: True)  # type: ignore[arg-type]


def trim_all(keeper: Keeper) -> None:
    while keeper._trim():
        pass
    keeper._forget()
    while keeper._more_to_forget:
        keeper._forget()
    keeper._writer.commit()


def sample_all(writer: StoreWriter, clock: FakeClock, seconds: int) -> None:
    for _ in range(seconds):
        clock.advance(1.0)
        writer.sample(Sample(time_seconds=clock.time(), monotonic_seconds=clock.monotonic()))
    writer.write_blocks(partial=True)
    writer.commit()


def samples_of(writer: StoreWriter) -> dict[int, int]:
    return dict(writer.connection.execute("SELECT tier, sum(count) FROM samples GROUP BY tier"))


def test_one_wrong_reading_of_the_clock_deletes_nothing_of_a_live_session(keeper: Keeper, writer: StoreWriter) -> None:
    clock = keeper._clock
    assert isinstance(clock, SetClock)
    fill(writer, 100, age=60.0)
    sample_all(writer, clock, 3000)
    before, sampled = counts(writer), samples_of(writer)
    for set_by in (YEAR, 0.0, -YEAR, 0.0, YEAR, 50 * YEAR):
        clock.set_by = set_by
        clock.advance(60.0)
        trim_all(keeper)
        assert counts(writer) == before
        assert samples_of(writer) == sampled
    # A clock that stays so is right: it was wrong before.
    clock.advance(BELIEVED_SECONDS + 60.0)
    trim_all(keeper)
    clock.advance(BELIEVED_SECONDS + 60.0)
    trim_all(keeper)
    assert set(counts(writer).values()) == {0}


def test_samples_grow_old_by_the_clock_that_is_never_set(keeper: Keeper, writer: StoreWriter) -> None:
    clock = keeper._clock
    assert isinstance(clock, SetClock)
    sample_all(writer, clock, 3600)
    clock.set_by = -YEAR
    sample_all(writer, clock, 3600)
    clock.advance(1.0)
    trim_all(keeper)
    kept = samples_of(writer)
    # Of the raw ones an hour; not one less for the clock that was set back.
    assert 3540 <= kept[0] <= 3660
    # The bucket in which it was set back is in two parts.
    assert kept[1] in (7200 // 10, 7200 // 10 + 1)


def test_what_a_clock_that_was_ahead_dated_does_not_stand_in_the_way(keeper: Keeper, writer: StoreWriter) -> None:
    fill(writer, 120, age=20 * DAY)
    fill(writer, 120, age=-YEAR, first=1000)
    fill(writer, 120, age=19 * DAY, first=2000)
    fill(writer, 30, age=-YEAR, first=3000)
    fill(writer, 30, age=60.0, first=4000)
    trim_all(keeper)
    trim_all(keeper)
    left = [row[0] for row in writer.connection.execute("SELECT task_id FROM tasks ORDER BY rowid")]
    # Those after the last one that is too old may be young.
    assert left == [f"t{number}" for number in (*range(3000, 3030), *range(4000, 4030))]
    assert set(counts(writer).values()) == {60}


def test_the_size_is_kept_also_where_the_clock_is_ahead(writer: StoreWriter) -> None:
    for number in range(10):
        fill(writer, 100, age=DAY, first=100 * number, text="x" * 2000)
    (pages,) = writer.connection.execute("PRAGMA page_count").fetchone()
    (page_size,) = writer.connection.execute("PRAGMA page_size").fetchone()
    trimmer = Trimmer(14 * DAY, pages * page_size // 2)
    while trimmer.step(writer.connection, NOW + YEAR, NOW):
        pass
    assert 100 < counts(writer)["tasks"] < 900


def test_a_wrong_reading_of_the_clock_removes_no_session(tmp_path: Path) -> None:
    clock = SetClock(NOW)
    ended = make(tmp_path, "20200101-000000-aaaaaa", ended=NOW - DAY)
    elsewhere = make(tmp_path, "20200101-000001-aaaaaa", ended=None, heartbeat=NOW)
    pruner = Pruner(tmp_path, "own", 14 * DAY, 10**12, clock)
    clock.set_by = YEAR
    clock.wait = lambda event, timeout: (clock.advance(timeout), event.set())  # type: ignore[method-assign, assignment]
    pruner._run()
    assert sorted(tmp_path.iterdir()) == [ended, elsewhere]


def test_a_failed_step_changes_nothing(writer: StoreWriter) -> None:
    fill(writer, 100, age=20 * DAY)
    writer.connection.execute(
        "CREATE TRIGGER refuse BEFORE DELETE ON events BEGIN SELECT raise(ABORT, 'not this one'); END"
    )
    trimmer = Trimmer(14 * DAY, 10**12)
    with pytest.raises(sqlite3.Error, match="not this one"):
        trimmer.step(writer.connection, NOW)
    assert set(counts(writer).values()) == {100}
    writer.connection.execute("DROP TRIGGER refuse")
    while trimmer.step(writer.connection, NOW):
        pass
    assert set(counts(writer).values()) <= {0, 100}


def test_a_file_that_cannot_be_put_back_says_so(writer: StoreWriter, tmp_path: Path) -> None:
    assert writer.is_in_place()
    (tmp_path / "session.sqlite").unlink()
    assert not writer.is_in_place()
    (tmp_path / "session.sqlite.new").mkdir()
    with pytest.raises(StoreError, match="cannot be put back"):
        writer.remake()
    (tmp_path / "session.sqlite.new").rmdir()
    fill(writer, 3, age=1.0)
    writer.remake()
    assert writer.is_in_place()
    assert set(counts(writer).values()) == {3}
    (tmp_path / "session.sqlite-wal").unlink()
    assert not writer.is_in_place()
    fill(writer, 3, age=1.0, first=10)
    writer.remake()
    assert writer.is_in_place()
    fill(writer, 3, age=1.0, first=20)
    assert set(counts(writer).values()) == {9}
    other = sqlite3.connect(tmp_path / "session.sqlite")
    assert other.execute("SELECT count(*) FROM tasks").fetchone() == (9,)
    assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    other.close()


def insert_command(path: Path) -> None:
    """As another process does: with locks of its own."""
    code = (
        "import sqlite3, sys\ndb = sqlite3.connect(sys.argv[1], timeout=5)\n"
        "with db: db.execute(\"INSERT INTO commands (created_seconds, who, verb, arguments) VALUES (1, 'w', 'pause', '{}')\")"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=30)


@pytest.mark.skipif(os.name != "posix", reason="an open file cannot be deleted there")
def test_a_lost_index_of_the_log_is_seen_and_the_file_put_back(writer: StoreWriter, tmp_path: Path) -> None:
    path = tmp_path / "session.sqlite"
    fill(writer, 50, age=1.0)
    (tmp_path / "session.sqlite-shm").unlink()
    assert not writer.is_in_place()
    assert writer.lost_part() == "session.sqlite-shm"
    insert_command(path)
    # Another's new index is not the one that is used here.
    (tmp_path / "session.sqlite-shm").touch()
    assert writer.lost_part() == "session.sqlite-shm"
    writer.remake()
    assert writer.is_in_place()
    for first in range(50, 500, 50):
        fill(writer, 50, age=1.0, first=first)
        insert_command(path)
    with contextlib.closing(sqlite3.connect(path)) as other:
        assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert other.execute("SELECT count(*) FROM tasks").fetchone() == (500,)
        assert other.execute("SELECT count(*) FROM commands").fetchone()[0] >= 9
