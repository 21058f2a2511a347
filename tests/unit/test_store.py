"""The session's file: written by one, read by any, steered through its commands table."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
import threading
import time
from pathlib import Path

import pytest

from wiseflow_nb.errors import CommandError, SessionNotFoundError, StoreError, StoreVersionError, UsageError
from wiseflow_nb.frames import task_frame
from wiseflow_nb.recorder._retention import prune
from wiseflow_nb.records import Sample, SessionState, TaskRecord, TaskState, to_json_dict, valid_text
from wiseflow_nb.store import finding
from wiseflow_nb.store.commands import VERBS, send, validate
from wiseflow_nb.store.finding import list_sessions, session_directory
from wiseflow_nb.store.identity import identify, is_alive
from wiseflow_nb.store.paths import (
    DATABASE_NAME,
    file_system_of,
    new_session_id,
    private_directory,
    sessions_root,
    valid_session_id,
)
from wiseflow_nb.store.reader import StoreReader, after_the_end, info_from_meta
from wiseflow_nb.store.schema import MIGRATIONS
from wiseflow_nb.store.writer import MAX_TEXT, StoreWriter
from wiseflow_nb.view import StoreView


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "sessions" / "20260101-000000-abcdef"
    private_directory(path.parent)
    private_directory(path)
    return path


@pytest.fixture
def writer(directory: Path):
    writer = StoreWriter(directory / "session.sqlite")
    yield writer
    writer.close()


def test_what_has_not_ended_is_found_without_a_walk_over_what_has(writer: StoreWriter, directory: Path) -> None:
    reader = StoreReader(directory)
    seen: list[str] = []
    query = reader.query
    reader.query = lambda text, values=(): (seen.append(text), query(text, values))[1]  # type: ignore[method-assign]
    reader.unfinished_tasks(TaskState.PENDING, 10, 1000)
    reader.newest_tasks(10, 1000)
    reader.changed_tasks(1000, 10)
    reader.count_changed(1000, 10)
    reader.unfinished_named("n")
    plans = [str(query(f"EXPLAIN QUERY PLAN {text}", (None,) * text.count("?"))) for text in seen]
    assert "tasks_unfinished (state=? AND rev<?)" in plans[0]
    assert "tasks_by_rev (rev<?)" in plans[1]
    assert "tasks_by_rev (rev>?)" in plans[2]
    assert "COVERING INDEX tasks_by_rev (rev>?)" in plans[3]
    assert "tasks_unfinished (state=?)" in plans[4]
    assert not [plan for plan in plans if "SCAN" in plan]
    assert not [plan for plan in plans[:4] if "TEMP" in plan]
    reader.close()


def test_what_is_written_is_read(writer: StoreWriter, directory: Path) -> None:
    task = TaskRecord("t1", "load", TaskState.RUNNING, dependencies=("t0",), progress=0.5, rev=3)
    writer.apply([("task", to_json_dict(task))])
    writer.commit()
    reader = StoreReader(directory)
    (read,) = reader.changed_tasks()
    assert (read.task_id, read.state, read.dependencies, read.progress) == ("t1", TaskState.RUNNING, ("t0",), 0.5)
    assert read.cpu_seconds != read.cpu_seconds
    assert reader.changed_tasks(since_rev=3) == []
    assert reader.task_counts() == {"running": 1}
    reader.close()


@pytest.mark.parametrize(
    "text",
    ["'; DROP TABLE tasks; --", "<script>alert(1)</script>", "a\x00b\x1b[31m", "\ud800 lone", "x" * 1_000_000, "日本"],
)
def test_any_text_is_stored_as_text(writer: StoreWriter, directory: Path, text: str) -> None:
    writer.apply([("task", to_json_dict(TaskRecord("t1", text, TaskState.FAILED, error=text, rev=1)))])
    writer.commit()
    reader = StoreReader(directory)
    name = reader.changed_tasks()[0].name
    reader.close()
    assert name[:20] == text[:20].replace("\ud800", "?")
    assert len(name) <= 100_000


def test_samples_come_back_in_blocks(writer: StoreWriter, directory: Path) -> None:
    for second in range(150):
        writer.sample(Sample(time_seconds=float(second), cpu_utilization_ratio=second / 150))
        writer.write_blocks(partial=second % 7 == 0)
        writer.commit()
    writer.write_blocks(partial=True)
    writer.commit()
    reader = StoreReader(directory)
    rows = reader.sample_blocks()
    assert list(rows[:, 0]) == [float(second) for second in range(150)]
    reader.close()


def test_a_rolled_back_block_is_written_again(writer: StoreWriter, directory: Path) -> None:
    for second in range(61):
        writer.sample(Sample(time_seconds=float(second)))
    writer.write_blocks(partial=False)
    writer.rollback()
    writer.write_blocks(partial=True)
    writer.commit()
    reader = StoreReader(directory)
    assert len(reader.sample_blocks()) == 61
    reader.close()


def test_a_block_that_was_rolled_back_or_forgotten_takes_no_other_ones_place(
    writer: StoreWriter, directory: Path
) -> None:
    def take(first: int, count: int) -> None:
        for second in range(first, first + count):
            # The wall clock shows the same again and again.
            writer.sample(Sample(time_seconds=float(second % 100), monotonic_seconds=float(second)))

    take(0, 30)
    writer.write_blocks(partial=True)
    writer.rollback()
    take(30, 100)
    writer.write_blocks(partial=True)
    writer.commit()
    # The open block is as old as the rest by a clock that is far ahead.
    take(130, 5)
    writer.write_blocks(partial=True)
    writer.close_tiers()
    while writer.forget_samples(1e9):
        pass
    writer.commit()
    take(135, 5)
    writer.write_blocks(partial=True)
    take(200, 40)
    writer.write_blocks(partial=True)
    writer.commit()
    reader = StoreReader(directory)
    kept = sorted(reader.sample_blocks()[:, 1])
    reader.close()
    assert kept == [float(second) for second in (*range(100, 140), *range(200, 240))]


def test_modes_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        private_directory(tmp_path / "private")
        StoreWriter(tmp_path / "private" / "session.sqlite").close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "private" / "session.sqlite").stat().st_mode) == 0o600


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StoreError, match="symbolic link"):
        private_directory(tmp_path / "link")


def test_a_newer_file_is_refused_and_not_touched(directory: Path) -> None:
    path = directory / "session.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    content = path.read_bytes()
    with pytest.raises(StoreVersionError, match="upgrade wiseflow_nb"):
        StoreReader(directory)
    with pytest.raises(StoreVersionError):
        StoreWriter(path)
    assert path.read_bytes() == content


def test_session_ids_are_names_and_nothing_else(tmp_path: Path) -> None:
    assert valid_session_id(new_session_id(0.0))
    for bad in ("", "..", "a/b", "a b", "é", "x" * 65, "a\x00"):
        assert not valid_session_id(bad)
        with pytest.raises(SessionNotFoundError):
            session_directory(tmp_path, bad)


def test_the_state_directory_setting_wins(tmp_path: Path) -> None:
    root, note = sessions_root(str(tmp_path / "mine"))
    assert root == tmp_path / "mine" / "sessions"
    assert note == ""


def test_the_file_system_is_that_of_the_longest_mount(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 0:1 / / rw - ext4 /dev/a rw\n2 1 0:2 / /home rw shared:1 - nfs4 server:/x rw\n"
        "3 1 0:3 / /home\\040two rw - tmpfs tmpfs rw\n"
    )
    assert file_system_of(Path("/home/me/.local"), str(table)) == "nfs4"
    assert file_system_of(Path("/home two/x"), str(table)) == "tmpfs"
    assert file_system_of(Path("/homely"), str(table)) == "ext4"
    assert file_system_of(Path("/x"), str(tmp_path / "none")) == ""


def test_a_reused_pid_fools_nobody() -> None:
    from dataclasses import replace

    mine = identify()
    assert is_alive(mine) is True
    assert is_alive(replace(mine, start_ticks=mine.start_ticks - 1)) is False
    assert is_alive(replace(mine, start_ticks=0)) is True
    assert is_alive(replace(mine, start_ticks=0, start_seconds=mine.start_seconds - 1000)) is False
    assert is_alive(replace(mine, host="elsewhere")) is None


@pytest.mark.parametrize(
    ("meta", "now", "state"),
    [
        ({"heartbeat": 100.0}, 105.0, SessionState.LIVE),
        ({"heartbeat": 100.0}, 130.0, SessionState.CRASHED),
        ({"heartbeat": 100.0, "ended_seconds": 101.0}, 105.0, SessionState.ENDED),
        ({"heartbeat": 100.0, "ended_seconds": 101.0, "crashed": True}, 105.0, SessionState.CRASHED),
    ],
)
def test_how_a_session_stands(writer: StoreWriter, directory: Path, meta: dict, now: float, state: str) -> None:
    for key, value in meta.items():
        writer.meta(key, value)
    writer.commit()
    (info,) = list_sessions(directory.parent, now)
    assert info.state is state


@pytest.mark.parametrize(
    ("meta", "now", "notice"),
    [
        ({"heartbeat": 100.0}, 109.0, ""),
        ({"heartbeat": 100.0}, 112.0, "nothing has been recorded for 12 s"),
        ({"heartbeat": 100.0, "ended_seconds": 101.0}, 112.0, ""),
        ({}, 112.0, ""),
        ({"heartbeat": 100.0, "dropped_tasks": 1, "lost_tasks": 1200}, 101.0, "of 1,201 tasks the last state is not"),
        ({"heartbeat": 100.0, "dropped_tasks": "x", "lost_tasks": -1}, 101.0, ""),
        ({"heartbeat": 100.0, "dropped_rows": 7, "lost_rows": 7}, 101.0, ""),
    ],
)
def test_what_a_record_says_against_itself(directory: Path, meta: dict, now: float, notice: str) -> None:
    told = info_from_meta(meta, directory, now).notice
    assert told.startswith(notice) if notice else told == ""


@pytest.mark.parametrize("letter", ["x", '"', "é", "\x00"])
@pytest.mark.parametrize("count", [1, 3])
def test_of_tags_that_are_too_long_the_first_is_cut(
    writer: StoreWriter, directory: Path, letter: str, count: int
) -> None:
    task = TaskRecord("t1", "name", TaskState.RUNNING, tags=(letter * 1_000_000,) * count)
    assert writer.apply([("task", to_json_dict(task))]) == 0
    writer.commit()
    with contextlib.closing(StoreReader(directory)) as reader:
        (tag,) = reader.task("t1").tags
    assert tag.endswith("…")
    assert tag[:1000] == valid_text(letter * 1000)
    assert len(tag) <= MAX_TEXT


def test_what_was_in_flight_reads_lost() -> None:
    assert after_the_end(TaskRecord("t", "n", TaskState.RUNNING)).state is TaskState.LOST
    assert after_the_end(TaskRecord("t", "n", TaskState.FAILED)).state is TaskState.FAILED


def test_every_verb_refuses_what_does_not_fit() -> None:
    for verb, arguments in VERBS.items():
        with pytest.raises(UsageError, match=verb):
            validate(verb, {"nonsense": 1})
        for name in arguments:
            with pytest.raises(UsageError):
                validate(verb, dict.fromkeys(arguments, None) | {name: object})
    with pytest.raises(UsageError, match="unknown command"):
        validate("format_disk", {})


def test_an_unanswered_command_is_withdrawn(writer: StoreWriter, directory: Path) -> None:
    connection = sqlite3.connect(directory / "session.sqlite", isolation_level=None)
    with pytest.raises(CommandError, match="withdrawn"):
        send(connection, "pause", {}, who="me", now=0.0, timeout=0.05)
    assert writer.new_commands() == []
    connection.close()


def test_a_command_is_answered(writer: StoreWriter, directory: Path) -> None:
    done = threading.Event()

    def recorder() -> None:
        while not done.is_set():
            for number, *_ in writer.new_commands():
                writer.answer_command(number, True, "as you wish", 1.0)
                writer.commit()
                done.set()

    thread = threading.Thread(target=recorder)
    thread.start()
    connection = sqlite3.connect(directory / "session.sqlite", isolation_level=None)
    result = send(connection, "cancel", {"task_id": "t1"}, who="me", now=0.0)
    thread.join()
    connection.close()
    assert (result.ok, result.message) == (True, "as you wish")


def test_frames_have_utc_times_and_types() -> None:
    frame = task_frame([TaskRecord("t1", "n", TaskState.COMPLETED, created_seconds=0.0)])
    assert str(frame.created.dtype).endswith("UTC]")
    assert frame.loc["t1", "state"] == "completed"
    assert frame.loc["t1", "priority"] == "normal"
    assert len(task_frame([])) == 0


def test_a_file_of_an_earlier_version_is_read_as_it_is(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / DATABASE_NAME, isolation_level=None)
    for statement in MIGRATIONS[0]:
        database.execute(statement)
    database.execute("PRAGMA user_version = 1")
    database.execute(
        "INSERT INTO alerts (alert_id, rule, resource, kind, from_state, to_state, severity, value, threshold, peak, "
        "started_seconds, time_seconds, message, top_processes) VALUES "
        "('a', 'cpu high', 'cpu', 'fired', 'pending', 'firing', 'warning', 0.8, 0.7, 0.8, 1, 2, 'said', '[]')"
    )
    database.close()
    reader = StoreReader(tmp_path)
    (alert,) = reader.alerts()
    reader.close()
    assert (alert.message, alert.unit, alert.silenced) == ("said", "ratio", False)


def recorded(root: Path, name: str) -> Path:
    """The directory of a session that ended at 30."""
    directory = root / name
    directory.mkdir(mode=0o700)
    writer = StoreWriter(directory / "session.sqlite")
    for key, value in {"started_seconds": 10.0, "heartbeat": 29.0, "ended_seconds": 30.0, "title": "t"}.items():
        writer.meta(key, value)
    writer.meta("identity", identify().to_dict())
    writer.close()
    return directory


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("identity", "[1, 2]"),
        ("identity", '{"host": 1}'),
        ("identity", '{"host": "h", "boot_id": "b", "pid_namespace": "", "pid": -7, "start_seconds": 1.0}'),
        ("identity", '{"host": "h", "boot_id": "b", "pid_namespace": "", "pid": 1e999, "start_seconds": 1.0}'),
        ("started_seconds", '"abc"'),
        ("started_seconds", "1e999"),
        ("started_seconds", "9" * 400),
        ("heartbeat", "[]"),
        ("ended_seconds", "{}"),
        ("title", b"\xff\xfe"),
        ("title", "[" * 100_000),
        ("title", "{bad"),
        ("notice", "7"),
        ("thresholds", '{"cpu": 1, "disk": [0.5, 0.9]}'),
        ("pool", '{"workers": []}'),
        ("settings", "null"),
        ("shutdown_at", "[3]"),
    ],
)
def test_a_damaged_row_of_the_meta_table_takes_neither_the_list_nor_the_view_down(
    tmp_path: Path, key: str, value: object
) -> None:
    recorded(tmp_path, "20250101-000000-aaaaaa")
    bad = recorded(tmp_path, "20250101-000000-bbbbbb")
    with contextlib.closing(sqlite3.connect(bad / "session.sqlite")) as db, db:
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
    found = list_sessions(tmp_path, 100.0)
    assert {info.session_id for info in found} == {"20250101-000000-aaaaaa", bad.name}
    view = StoreView(bad)
    snapshot = view.snapshot()
    assert snapshot.info.session_id == bad.name
    assert view.report().to_dict()["session"]
    view.close()
    prune(tmp_path, own_id="own", now=100.0, max_age=1000.0, max_bytes=10**12)
    assert bad.is_dir()


def test_the_files_of_sessions_that_are_over_are_opened_again_only_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, other, live = (recorded(tmp_path, f"20250101-00000{number}-aaaaaa") for number in range(3))
    now = time.time()
    for directory in (ended, other, live):
        with contextlib.closing(StoreWriter(directory / "session.sqlite")) as writer:
            writer.meta("heartbeat", now)
            writer.meta("identity", None)
            writer.meta("ended_seconds", None if directory is live else now)
    opened: list[Path] = []

    class Counted(StoreReader):
        def __init__(self, directory: Path) -> None:
            opened.append(directory)
            super().__init__(directory)

    monkeypatch.setattr(finding, "StoreReader", Counted)
    over: finding.Over = {}

    def listed() -> tuple[dict[str, str], list[Path]]:
        opened.clear()
        return {info.session_id: info.title for info in list_sessions(tmp_path, now, over)}, sorted(opened)

    first = listed()
    assert first[1] == [ended, other, live]
    assert listed() == (first[0], [live])
    with contextlib.closing(StoreWriter(other / "session.sqlite")) as writer:
        writer.meta("title", "another")
    assert listed() == ({**first[0], other.name: "another"}, [other, live])
    # A recorder that goes on writes to the log first.
    writer = StoreWriter(ended / "session.sqlite")
    writer.meta("ended_seconds", None)
    writer.commit()
    assert listed()[1] == [ended, live]
    assert [info.state for info in list_sessions(tmp_path, now, over)].count(SessionState.LIVE) == 2
    writer.close()
    shutil.rmtree(other)
    assert set(listed()[0]) == {ended.name, live.name}


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    bad = recorded(tmp_path, "20250101-000000-bbbbbb")
    with contextlib.closing(sqlite3.connect(bad / "session.sqlite")) as db, db:
        db.execute("UPDATE meta SET value = '[1]' WHERE key = 'identity'")
    assert "damaged and read without: identity" in list_sessions(tmp_path, 100.0)[0].notice


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.parametrize(
    "name", ["session.sqlite", "session.sqlite-wal", "session.sqlite-shm", "session.sqlite-journal"]
)
def test_a_named_pipe_is_passed_over_with_one_warning(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = recorded(tmp_path, "20250101-000000-aaaaaa")
    bad = recorded(tmp_path, "20250101-000000-bbbbbb")
    (bad / name).unlink(missing_ok=True)
    os.mkfifo(bad / name)
    for _ in range(3):
        assert [info.session_id for info in list_sessions(tmp_path, 100.0)] == [good.name]
    prune(tmp_path, own_id="own", now=100.0, max_age=1000.0, max_bytes=10**12)
    assert len([record for record in caplog.records if "is not a regular file" in record.getMessage()]) == 1
    with pytest.raises(StoreError, match="not a regular file"):
        StoreReader(bad)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_neither_the_ring_nor_the_writer_waits_for_a_named_pipe(tmp_path: Path) -> None:
    directory = recorded(tmp_path, "20250101-000000-aaaaaa")
    os.mkfifo(directory / "ring.bin")
    assert StoreView(directory).snapshot().sample is None
    os.mkfifo(tmp_path / "session.sqlite")
    with pytest.raises(StoreError, match="not a regular file"):
        StoreWriter(tmp_path / "session.sqlite")


def test_a_session_that_is_still_being_made_is_neither_listed_nor_pruned(tmp_path: Path) -> None:
    directory = tmp_path / "20250101-000000-cccccc"
    directory.mkdir(mode=0o700)
    StoreWriter(directory / "session.sqlite").close()
    assert list_sessions(tmp_path, time.time()) == []
    prune(tmp_path, own_id="own", now=time.time(), max_age=60.0, max_bytes=10**12)
    assert directory.is_dir()


def test_a_reader_of_a_bad_file_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "20250101-000000-dddddd"
    directory.mkdir(mode=0o700)
    (directory / "session.sqlite").write_bytes(b"none" * 1000)
    opened: list[sqlite3.Connection] = []
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **more: opened.append(connect(*args, **more)) or opened[-1])
    with pytest.raises(StoreError):
        StoreReader(directory)
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        opened[0].execute("SELECT 1")
