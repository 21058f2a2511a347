"""Trouble with the record: each kind is said once, clearly, and no task fails because of any."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from wiseflow_nb.clock import SystemClock
from wiseflow_nb.records import EventRecord, SessionState
from wiseflow_nb.session import Session, open_session, sessions
from wiseflow_nb.store.identity import identify
from wiseflow_nb.store.paths import MEMORY_ROOT
from wiseflow_nb.store.reader import StoreReader
from wiseflow_nb.store.writer import StoreWriter
from wiseflow_nb.view import StoreView

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and process groups are POSIX")


def wait_until(condition, timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)


def heard(session: Session) -> list[EventRecord]:
    events: list[EventRecord] = []
    session.bus.subscribe(events.append)
    return events


def kinds(events: list[EventRecord]) -> list[str]:
    return [event.kind for event in events]


def work(session: Session, count: int = 10) -> None:
    tasks = [session.tasks.options(name=f"work {number}").submit(sum, [number, 1]) for number in range(count)]
    assert [task.result(timeout=30) for task in tasks] == [number + 1 for number in range(count)]


def private_mounts(script: str, *arguments: str) -> dict:
    """Run a script in a mount namespace of its own, where it may mount; return the JSON of its last line."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace of its own")
    done = subprocess.run(
        ["unshare", "-Urm", sys.executable, "-c", _PRELUDE + script, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


_PRELUDE = """
import collections, json, logging, os, subprocess, sys, time
from pathlib import Path
from wiseflow_nb.session import Session
from wiseflow_nb.view import StoreView

def wait_until(condition, timeout=60.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)

def mount(path, size):
    Path(path).mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)

def fill(path):
    with open(path, "wb", buffering=0) as stream:
        for size in (65536, 4096, 1):
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                pass

def work(session, count=20):
    tasks = [session.tasks.options(name=f"work {n}").submit(sum, [n, 1]) for n in range(count)]
    return sum(task.result(timeout=30) == n + 1 for n, task in enumerate(tasks))
"""

_FULL = """
state = sys.argv[1]
mount(state, "6m")
heard = []
with Session(title="full", state_dir=state, resource_check_interval=0.05) as session:
    session.bus.subscribe(heard.append)
    done = work(session)
    assert session.sync(10)
    fill(f"{state}/filler")
    deadline = time.monotonic() + 60
    while not any(event.kind == "store_failed" for event in heard):
        assert time.monotonic() < deadline
        done += work(session)
        time.sleep(0.05)
    synced = session.sync()
    notice = session.info.notice
    done += work(session)
    submitted = len(session.task_records())
    os.unlink(f"{state}/filler")
    wait_until(lambda: any(event.kind == "store_recovered" for event in heard))
    assert session.sync(10)
    after = session.info.notice
    view = StoreView(session.directory)
    stored = int((view.task_history().state == "completed").sum())
    times = view.rows()[:, 0]
    events = collections.Counter(view.events().kind)
    view.close()
print(json.dumps([done, submitted, stored, synced, notice, after, events["store_failed"], events["store_recovered"]]))
"""


def test_a_full_disk_disturbs_no_work_and_recording_goes_on_when_there_is_room(tmp_path: Path) -> None:
    done, submitted, stored, synced, notice, after, failed, recovered = private_mounts(_FULL, str(tmp_path / "small"))
    assert done == submitted == stored
    assert not synced
    assert "cannot be written" in notice
    assert after == ""
    assert (failed, recovered) == (1, 1)


_FULL_AT_END = """
state = sys.argv[1]
mount(state, "6m")
heard, logged = [], []
handler = logging.Handler()
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger("wiseflow_nb.recorder").addHandler(handler)
session = Session(title="full", state_dir=state, resource_check_interval=0.05).start()
session.bus.subscribe(heard.append)
fill(f"{state}/filler")
deadline = time.monotonic() + 60
while not any(event.kind == "store_failed" for event in heard):
    assert time.monotonic() < deadline
    work(session)
    time.sleep(0.05)
work(session, int(sys.argv[2]))
submitted = len(session.task_records())
if sys.argv[3] == "killed":
    os.kill(session.recorder.pid, 9)
    wait_until(lambda: "recorder_failed" in [event.kind for event in heard])
session.close()
# As another process sees it, once this one is gone.
view = StoreView(session.directory)
meta = view._store().meta()
counts, report = view.snapshot().task_counts, view.report()
print(json.dumps([view.info.state, submitted, counts, meta["end_reason"], meta.get("lost_rows", 0),
                  meta.get("lost_tasks", 0), view.info.notice, str(report), report.facts.dropped_rows, logged]))
"""


@pytest.mark.parametrize("how", ["", "killed"])
@pytest.mark.parametrize("count", [20, 1500])
def test_a_session_that_ends_on_a_full_disk_has_its_end_mark(tmp_path: Path, count: int, how: str) -> None:
    told = private_mounts(_FULL_AT_END, str(tmp_path / "small"), str(count), how)
    state, submitted, counts, reason, rows, tasks, notice, report, dropped, logged = told
    assert state == "ended"
    assert reason == ("closed (the recorder did not answer)" if how else "closed")
    # What did not fit is counted, and said.
    assert counts == {"completed": submitted - tasks}
    assert (tasks > 0) == (count == 1500)
    assert sum("database or disk is full" in line and "nothing is recorded" not in line for line in logged) == 1
    assert sum("given up at the end" in line for line in logged) == (rows > 0)
    assert dropped == rows >= tasks
    assert (f"of {tasks:,} tasks the last state is not on record" in notice) == (tasks > 0)
    assert notice in report
    if count == 1500:
        assert f"{rows} rows dropped" in report


_NO_ROOM = """
state, runtime = sys.argv[1:]
mount(state, "6m")
fill(f"{state}/filler")
os.environ["XDG_RUNTIME_DIR"] = runtime
with Session(title="no room", state_dir=state) as session:
    done = work(session)
    kinds = collections.Counter(session.events().kind)
    print(json.dumps([str(session.directory), session.info.notice, done, kinds["state_dir_fallback"]]))
"""


def test_a_disk_that_is_full_from_the_start_is_passed_over(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    directory, notice, done, said = private_mounts(_NO_ROOM, str(tmp_path / "small"), str(runtime))
    assert directory.startswith(str(runtime))
    assert "no room" in notice
    assert "STATE_DIR" in notice
    assert (done, said) == (20, 1)


_READ_ONLY = """
state, runtime = sys.argv[1:]
mount(state, "8m")
subprocess.run(["mount", "-o", "remount,ro", state], check=True)
os.environ["XDG_RUNTIME_DIR"] = runtime
with Session(title="read only", state_dir=state) as session:
    done = work(session)
    view = StoreView(session.directory)
    print(json.dumps([str(session.directory), session.info.notice, view.info.notice, done]))
"""


def test_a_read_only_directory_is_passed_over(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    directory, notice, stored, done = private_mounts(_READ_ONLY, str(tmp_path / "readonly"), str(runtime))
    assert directory.startswith(str(runtime))
    assert str(tmp_path / "readonly") in notice
    assert stored == notice
    assert done == 20


def test_without_any_directory_the_record_is_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    for name in ("WISEFLOW_STATE_DIR", "XDG_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.setenv(name, str(blocked / "below"))
    with Session(title="memory", resource_check_interval=0.05, alert_for_seconds=0) as session:
        assert session.directory.parent == MEMORY_ROOT
        assert "in memory only" in session.info.notice
        work(session)
        session.configure(memory_threshold=0.001)
        wait_until(lambda: len(session.history()) > 3)
        wait_until(lambda: len(session.alert_history()) > 0)
        assert session.view.pause().ok
        assert session.view.resume().ok
        assert len(session.task_history()) == 10
        assert session.commands().verb.tolist() == ["pause", "resume"]
        assert list(session.events().kind).count("state_dir_fallback") == 1
        view = StoreView(session.directory)
        assert len(view.snapshot().tasks) == 10
        assert view.cancel("nobody").message == "no task 'nobody'"
        view.close()
    assert sessions() == []
    assert not Path("memory:").exists()


@pytest.mark.parametrize("what", ["file", "log", "index", "directory"])
@pytest.mark.parametrize("in_process", [False, True], ids=["process", "thread"])
def test_a_file_deleted_under_the_recorder_is_put_back(what: str, in_process: bool) -> None:
    settings = {"resource_check_interval": 0.05, "recorder_enabled": not in_process}
    with Session(title="deleted", **settings) as session:
        events = heard(session)
        work(session)
        assert session.sync()
        wait_until(lambda: session.latest() is not None)
        if what == "directory":
            shutil.rmtree(session.directory)
        else:
            os.unlink(session.directory / f"session.sqlite{ {'file': '', 'log': '-wal', 'index': '-shm'}[what] }")
        work(session)
        wait_until(lambda: "store_remade" in kinds(events))
        work(session)
        newest = session.latest().time_seconds
        wait_until(lambda: session.latest().time_seconds > newest)
        wait_until((session.directory / "ring.bin").exists)
        assert session.sync()
        view = StoreView(session.directory)
        assert len(view.task_history()) == 30
        assert view.pause().ok
        view.close()
        assert len(session.events()) > 0
    view = open_session(session.id)
    assert view.info.state is SessionState.ENDED
    assert list(view.events().kind).count("store_remade") == 1
    assert view._store().query("PRAGMA integrity_check") == [("ok",)]
    view.close()


def test_a_reader_follows_to_the_file_that_was_put_back() -> None:
    with Session(title="followed", resource_check_interval=0.05) as session:
        events = heard(session)
        work(session)
        assert session.sync()
        view = StoreView(session.directory)
        assert view.snapshot().task_counts == {"completed": 10}
        shutil.rmtree(session.directory)
        wait_until(lambda: "store_remade" in kinds(events))
        work(session)
        wait_until(lambda: view.snapshot().task_counts == {"completed": 20})
        newest = view.snapshot().sample.time_seconds
        wait_until(lambda: view.snapshot().sample.time_seconds > newest)
        view.close()


@pytest.mark.parametrize("in_process", [False, True], ids=["process", "thread"])
@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_a_ring_deleted_alone_is_said_once_and_made_again(in_process: bool, replaced: bool) -> None:
    settings = {"resource_check_interval": 0.05, "recorder_enabled": not in_process}
    with Session(title="ring", **settings) as session:
        events = heard(session)
        wait_until(lambda: len(session.history()) > 3)
        first = session.history().index[0]
        view = StoreView(session.directory)
        assert view.snapshot().sample is not None
        ring = session.directory / "ring.bin"
        if replaced:
            (session.directory / "other").write_bytes(b"")
            os.replace(session.directory / "other", ring)
        else:
            ring.unlink()
        wait_until(lambda: "ring_remade" in kinds(events))
        wait_until(lambda: ring.exists() and ring.stat().st_size > 0)
        newest = session.now()
        wait_until(lambda: view.snapshot().sample.time_seconds > newest)
        wait_until(lambda: session.latest().time_seconds > newest)
        assert session.history().index[0] == first
        assert kinds(events).count("ring_remade") == 1
        assert "store_remade" not in kinds(events)
        view.close()


class Shifted(SystemClock):
    """The machine's clock as somebody set it."""

    __slots__ = ("shift",)

    def __init__(self) -> None:
        self.shift = 0.0

    def time(self) -> float:
        return super().time() + self.shift


def test_a_clock_set_back_is_said_once_and_the_record_goes_on() -> None:
    clock = Shifted()
    with Session(title="clock", clock=clock, resource_check_interval=0.05, recorder_enabled=False) as session:
        events = heard(session)
        work(session)
        wait_until(lambda: len(session.history()) > 3)
        clock.shift = -3600.0
        work(session)
        wait_until(lambda: "clock_set_back" in kinds(events))
        rows = len(session.history())
        wait_until(lambda: len(session.history()) > rows)
        assert session.sync()
        view = StoreView(session.directory, clock=clock)
        assert view.info.state is SessionState.LIVE
        assert view.pause().ok
        assert view.resume().ok
        assert len(view.task_history()) == 20
        assert (view.task_history().state == "completed").all()
        view.close()
    view = open_session(session.id)
    assert view.info.state is SessionState.ENDED
    assert list(view.events().kind).count("clock_set_back") == 1
    (message,) = view.events().message[view.events().kind == "clock_set_back"]
    assert "3600 s" in message
    view.close()


def test_a_second_session_with_a_reused_pid_is_another_one() -> None:
    with Session(title="second") as session:
        mine = identify()
        for number, identity in enumerate(
            [replace(mine, start_ticks=mine.start_ticks - 1), replace(mine, boot_id="another boot")]
        ):
            directory = session.directory.parent / f"20200101-00000{number}-abcdef"
            directory.mkdir(mode=0o700)
            writer = StoreWriter(directory / "session.sqlite")
            writer.meta("identity", identity.to_dict())
            writer.meta("heartbeat", time.time() - 100.0)
            writer.close()
        states = {info.session_id: info.state for info in sessions()}
        assert states.pop(session.id) is SessionState.LIVE
        assert set(states.values()) == {SessionState.CRASHED}
        assert len(states) == 2


def test_across_namespaces_only_the_heartbeat_decides(state_dir: Path) -> None:
    directory = state_dir / "sessions" / "20200101-000000-abcdef"
    directory.mkdir(parents=True, mode=0o700)
    writer = StoreWriter(directory / "session.sqlite")
    # A pid that surely runs there, and one that surely does not: neither is asked.
    for pid in (1, 2**22 + 1):
        writer.meta("identity", replace(identify(), pid=pid, pid_namespace="pid:[1]").to_dict())
        writer.meta("heartbeat", 1000.0)
        writer.commit()
        reader = StoreReader(directory)
        assert reader.info(1010.0).state is SessionState.LIVE
        assert reader.info(1020.0).state is SessionState.CRASHED
        reader.close()
    writer.close()


@pytest.mark.parametrize("umask", [0o000, 0o777, 0o022])
def test_modes_are_private_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with Session(
            title="modes", state_dir=str(tmp_path / "deep" / "state"), resource_check_interval=0.05
        ) as session:
            work(session)
            wait_until(lambda: session.latest() is not None)
            paths = [session.directory, *session.directory.iterdir()]
            names = {path.name for path in paths}
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths}
            above = [tmp_path / "deep", tmp_path / "deep" / "state", tmp_path / "deep" / "state" / "sessions"]
            found = [stat.S_IMODE(path.stat().st_mode) for path in above]
    finally:
        os.umask(before)
    assert {"session.sqlite", "session.sqlite-wal", "session.sqlite-shm", "ring.bin", "recorder.log"} <= names
    assert modes.pop(session.id) == 0o700
    assert set(modes.values()) == {0o600}
    assert found == [0o700] * 3
