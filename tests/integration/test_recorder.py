"""The flight recorder beside a real process: complete while it works, and after it was killed."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import queue
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from wiseflow_nb.config import load_settings
from wiseflow_nb.context import current_task
from wiseflow_nb.errors import RecorderError, StoreVersionError, UsageError
from wiseflow_nb.recorder import _backlog, _outbox, _restarts
from wiseflow_nb.recorder._keeper import Keeper
from wiseflow_nb.records import CommandResult, SessionState
from wiseflow_nb.session import Session, open_session, sessions
from wiseflow_nb.store.reader import StoreReader
from wiseflow_nb.store.writer import StoreWriter
from wiseflow_nb.view import StoreView

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and process groups are POSIX")


def wait_until(condition, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)


def test_the_recorder_loads_neither_pandas_nor_numpy_nor_the_settings_library() -> None:
    code = (
        "import sys, wiseflow_nb.recorder.__main__;"
        "print([name for name in ('pandas', 'numpy', 'pydantic', 'plotly', 'ipywidgets') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("in_process", [False, True], ids=["process", "thread"])
def test_a_session_is_recorded_and_read_back(in_process: bool) -> None:
    settings = load_settings({"resource_check_interval": 0.05, "recorder_enabled": not in_process})
    with Session(settings, title="recorded") as session:
        assert session.recorder.mode == ("thread" if in_process else "process")
        task = session.tasks.options(name="add").submit(sum, [1, 2])
        assert task.result(timeout=10) == 3
        wait_until(lambda: len(session.history()) >= 5)
        assert session.sync()
        view = StoreView(session.directory)
        assert view.snapshot().info.state is SessionState.LIVE
        assert [row.name for row in view.snapshot().tasks] == ["add"]
        view.close()
        number = session.id
    view = open_session(number)
    assert view.info.state is SessionState.ENDED
    assert view.task_history().state.tolist() == ["completed"]
    history = view.history(rates=True)
    assert len(history) >= 5
    assert history.index.is_monotonic_increasing
    assert (history.memory_limit_bytes > 0).all()
    assert not view.cancel("t1").ok
    view.close()
    assert [info.session_id for info in sessions()] == [number]


CAP_SYS_RESOURCE = 24


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="Linux' own")
def test_the_oom_killer_passes_the_recorder_by_where_that_may_be_asked() -> None:
    own = Path("/proc/self/oom_score_adj").read_text()
    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    may = int(held.split()[1], 16) >> CAP_SYS_RESOURCE & 1
    with Session(title="spared") as session:
        assert Path(f"/proc/{session.recorder.pid}/oom_score_adj").read_text() == ("-1000\n" if may else own)
        # The kernel itself stays what it was.
        assert Path("/proc/self/oom_score_adj").read_text() == own


def test_commands_from_another_view_reach_the_work() -> None:
    with Session(title="commanded") as session:
        started, cleaned = threading.Event(), []

        async def endless() -> None:
            import asyncio

            started.set()
            await asyncio.Event().wait()

        task = session.tasks.options(cleanup=lambda: cleaned.append(1)).submit(endless)
        assert started.wait(10)
        view = StoreView(session.directory)
        assert view.cancel(task.id).ok
        wait_until(lambda: task.state.terminal)
        assert task.state == "cancelled"
        wait_until(lambda: cleaned == [1])
        assert view.configure({"cpu_threshold": 77}).ok
        assert session.settings.cpu_threshold == 77
        wait_until(lambda: view.snapshot().thresholds["cpu"][1] == 0.77)
        refused = view.configure({"cpu_threshold": 777})
        assert not refused.ok
        assert "CPU_THRESHOLD" in refused.message
        assert session.settings.cpu_threshold == 77
        assert not view.cancel("nobody").ok
        assert view.pause().ok
        assert session.tasks.paused
        assert view.resume().ok
        view.close()


def test_a_killed_recorder_is_replaced_and_nothing_handed_in_is_lost() -> None:
    with Session(title="replaced", resource_check_interval=0.05) as session:
        first = session.recorder.pid
        os.kill(first, signal.SIGKILL)
        for _ in range(20):
            session.tasks.submit(int)
        wait_until(lambda: session.recorder.pid != first)
        wait_until(lambda: all(task.state.terminal for task in session.task_records()))
        assert session.sync(10)
        view = StoreView(session.directory)
        assert len(view.task_history()) == 20
        assert (view.task_history().state == "completed").all()
        assert "recorder_restarted" in set(view.events().kind)
        view.close()


_VICTIM = """
import json, sys, threading, time
from wiseflow_nb.session import Session
session = Session(title="victim", resource_check_interval=0.1).start()
started = threading.Event()
def work():
    started.set()
    threading.Event().wait()
session.tasks.options(name="in flight").submit(work)
started.wait()
print(json.dumps([session.id, session.recorder.pid]), flush=True)
deadline = time.monotonic() + 30
while time.monotonic() < deadline:
    sum(range(1000))
"""


def test_what_only_the_ring_of_a_killed_recorder_has_reaches_the_file_and_every_tier() -> None:
    with Session(title="killed recorder", resource_check_interval=0.05) as session:
        wait_until(lambda: len(session.view.rows()) >= 30)
        killed = session.recorder.pid
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: not psutil.pid_exists(killed))
        before = session.view.rows()[:, 0].tolist()
        wait_until(lambda: session.recorder.pid != killed)
        wait_until(lambda: len(session.view.rows()) > len(before))
    reader = StoreReader(session.directory)
    kept = reader.sample_blocks()[:, 0].tolist()
    newest = reader.sample_blocks()[-1, 1]
    assert kept[: len(before)] == before
    assert len(set(kept)) == len(kept)
    for tier in (1, 2):
        buckets, covered = reader.tier_blocks(tier)
        assert buckets[:, 3, 0].sum() == len(kept)
        assert covered == newest
    reader.close()


def test_a_history_tells_by_which_way_its_readings_came() -> None:
    with Session(title="probe path", resource_check_interval=0.05) as session:
        wait_until(lambda: len(session.view.rows()) >= 2)
        assert session.history().attrs["probe_path"] == session.monitor.probe_path


def test_a_recorder_that_hangs_is_told_once_and_once_when_it_is_back() -> None:
    heard: list[str] = []
    with Session(title="hung recorder", resource_check_interval=0.05) as session:
        session.bus.subscribe(lambda event: heard.append(event.kind))
        wait_until(lambda: len(session.view.rows()) >= 2)
        os.kill(session.recorder.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: "recorder_silent" in heard)
            assert "hangs" in session.info.notice
        finally:
            os.kill(session.recorder.pid, signal.SIGCONT)
        wait_until(lambda: "recorder_heard" in heard)
        assert "hangs" not in session.info.notice
        assert session.sync(30.0)
        kinds = list(session.events().kind)
    assert [kind for kind in heard if kind in ("recorder_silent", "recorder_heard")] == [
        "recorder_silent",
        "recorder_heard",
    ]
    assert kinds.count("recorder_silent") == kinds.count("recorder_heard") == 1


def test_a_killed_kernel_leaves_a_crashed_session_with_samples_past_the_kill() -> None:
    child = subprocess.Popen([sys.executable, "-c", _VICTIM], stdout=subprocess.PIPE, text=True)
    number, recorder = json.loads(child.stdout.readline())
    time.sleep(1.0)
    killed = time.time()
    child.kill()
    child.wait()
    child.stdout.close()
    wait_until(lambda: not psutil.pid_exists(recorder), timeout=5.0)
    view = open_session(number)
    assert view.info.state is SessionState.CRASHED
    times = view.rows()[:, 0]
    assert times.max() > killed
    assert np.diff(times[times < killed]).max() < 0.5
    assert view.task_history().state.tolist() == ["lost"]
    view.close()


def test_a_stopped_recorder_whose_kernel_was_killed_is_not_said_to_have_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", _VICTIM], stdout=subprocess.PIPE, text=True)
    number, recorder = json.loads(child.stdout.readline())
    try:
        os.kill(recorder, signal.SIGSTOP)
        child.kill()
        child.wait()
        child.stdout.close()
        view = open_session(number)
        assert view.info.state is SessionState.CRASHED
        told = str(view.report())
        assert f"its recorder (process {recorder}) still runs" in told
        assert "recorder ended too" not in told
        view.close()
    finally:
        os.kill(recorder, signal.SIGCONT)
    wait_until(lambda: not psutil.pid_exists(recorder))
    view = open_session(number)
    told = str(view.report())
    assert "its recorder saw the kernel go" in told
    assert "still runs" not in told
    view.close()


def test_an_interrupt_of_the_process_group_does_not_reach_the_recorder() -> None:
    with Session(title="interrupted") as session:
        assert os.getpgid(session.recorder.pid) != os.getpgid(os.getpid())
        os.kill(session.recorder.pid, signal.SIGINT)
        assert session.sync(5)


_DEAF = """
import json, time
from wiseflow_nb.session import Session
with Session(title="deaf", resource_check_interval=0.05) as session:
    assert session.sync()
    while len(session.history()) < 2:
        time.sleep(0.01)
    began = time.time()
    while time.time() < began + 2.0:
        sum(range(20_000_000))  # one call of C that gives the interpreter lock up to nobody
    print(json.dumps([str(session.directory), began, time.time()]), flush=True)
"""


def test_samples_come_while_no_thread_of_the_kernel_can_run() -> None:
    """How late they are is measured by the benchmark ``recorder``; here, that they come at all, and as ticks do."""
    out = subprocess.check_output([sys.executable, "-c", _DEAF], text=True)
    directory, began, ended = json.loads(out)
    view = StoreView(Path(directory))
    rows = view.rows(began, ended)
    view.close()
    assert len(rows) >= 0.5 * (ended - began) / 0.05
    # An absolute schedule: ticks that are missed are skipped, and never made up for in a burst.
    assert len(rows) <= (ended - began) / 0.05 + 2


@pytest.mark.parametrize(
    ("who", "verb", "arguments"),
    [
        ("'me'", "'watch'", '\'{"seconds": 1' + "0" * 400 + "}'"),
        ("'me'", "'pause'", "'" + "[" * 60_000 + "'"),
        ("X'00FF'", "'pause'", "'{'"),
        ("CAST(X'FFFE' AS TEXT)", "'nothing'", "'{}'"),
        ("'me'", "'cancel'", "CAST(X'7BFF7D' AS TEXT)"),
        ("'me'", "'configure'", '\'{"changes": {"source": 1, "self": 2}}\''),
        ("7", "8", "9"),
        ("'me'", "'cancel'", "'{\"task_id\": {}}'"),
    ],
)
def test_a_hostile_row_is_refused_and_the_next_command_works(who: str, verb: str, arguments: str) -> None:
    with Session(title="besieged") as session:
        connection = sqlite3.connect(session.directory / "session.sqlite", isolation_level=None)
        connection.execute(
            f"INSERT INTO commands (created_seconds, who, verb, arguments) VALUES (?, {who}, {verb}, {arguments})",
            (time.time(),),
        )
        wait_until(lambda: connection.execute("SELECT ok FROM commands WHERE status = 'done'").fetchall() == [(0,)])
        connection.close()
        view = StoreView(session.directory)
        assert view.pause().ok
        assert view.resume().ok
        assert session.recorder.restarts == 0
        view.close()


def test_a_session_is_not_closed_inside_its_own_task() -> None:
    with Session(title="inside") as session, pytest.raises(UsageError, match="inside a task"):
        session.tasks.submit(session.close).result(timeout=10)
    assert StoreView(session.directory).info.state is SessionState.ENDED


def test_closing_inside_a_done_callback_is_refused_and_the_session_stays_open() -> None:
    told: queue.Queue[object] = queue.Queue()

    def close(_: object) -> None:
        try:
            told.put(session.close())
        except UsageError as error:
            told.put(error)

    with Session(title="callback") as session:
        gate = threading.Event()
        parent = session.tasks.submit(gate.wait, 60)
        for work in (int, functools.partial(asyncio.sleep, 0)):
            session.tasks.options(dependencies=[parent]).submit(work).add_done_callback(close)
        gate.set()
        assert [type(told.get(timeout=60)) for _ in range(2)] == [UsageError] * 2
        assert session.info.state is SessionState.LIVE
        assert session.tasks.submit(abs, -1).result(60) == 1


def test_a_session_ends_though_its_recorder_does_not_answer() -> None:
    session = Session(title="stopped recorder").start()
    assert session.sync(10)
    os.kill(session.recorder.pid, signal.SIGSTOP)
    tasks = [session.tasks.submit(int) for _ in range(20)]
    assert [task.result(timeout=10) for task in tasks] == [0] * 20
    assert not session.sync(0.1)
    session.close()
    view = StoreView(session.directory)
    assert view.info.state is SessionState.ENDED
    # What the recorder never took was written in its place.
    assert view.task_history().state.tolist() == ["completed"] * 20
    assert "session_closed" in set(view.events().kind)
    view.close()


def test_a_recorder_that_dies_again_and_again_goes_on_in_a_process() -> None:
    with Session(title="again", resource_check_interval=0.05) as session:
        pids = []
        for restarts in (1, 2):
            pids.append(session.recorder.pid)
            os.kill(session.recorder.pid, signal.SIGKILL)
            wait_until(lambda restarts=restarts: session.recorder.restarts == restarts)
            wait_until(lambda: session.sync(5))
            assert session.tasks.submit(int).result(timeout=10) == 0
        assert len(set(pids)) == 2
        assert session.recorder.mode == "process"
        assert session.sync(5)
        view = StoreView(session.directory)
        assert view.task_history().state.tolist() == ["completed"] * 2
        assert list(view.events().kind).count("recorder_restarted") == 2
        assert view.pause().ok
        view.close()


def test_what_cannot_be_kept_is_counted_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_outbox, "PENDING_LIMIT_BYTES", 10_000)
    monkeypatch.setattr(_backlog, "ROWS_LIMIT", 20)
    with Session(title="flooded") as session:
        events = []
        session.bus.subscribe(events.append)
        view = StoreView(session.directory)
        os.kill(session.recorder.pid, signal.SIGSTOP)
        try:
            for number in range(200):
                session.event("flood", f"{number} " + "x" * 1000)
                session.recorder.flush()
            wait_until(lambda: session.recorder.dropped_rows > 0)
            wait_until(lambda: "rows_dropped" in [event.kind for event in events])
            assert "dropped" in session.info.notice
            assert session.tasks.submit(int).result(timeout=10) == 0
        finally:
            os.kill(session.recorder.pid, signal.SIGCONT)
        wait_until(lambda: session.sync(5))
        wait_until(lambda: "rows_caught_up" in [event.kind for event in events])
        assert [event.kind for event in events].count("rows_dropped") == 1
        assert (session.info.notice, view.info.notice) == ("", "")
        dropped = session.recorder.dropped_rows
        frame = view.events()
        assert list(frame.kind).count("flood") + dropped == 200
        assert frame.data[frame.kind == "rows_caught_up"].iloc[-1] == {"dropped_rows": dropped, "dropped_tasks": 0}
        view.close()


@pytest.mark.parametrize("how", ["stopped", "burst"])
def test_the_record_is_right_in_the_end_whatever_did_not_fit(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_outbox, "PENDING_LIMIT_BYTES", 1_000_000 if how == "stopped" else 5_000)
    monkeypatch.setattr(_backlog, "MOVES_LIMIT", 100)
    if how == "burst":
        monkeypatch.setattr(_backlog, "TASKS_AT_ONCE", 50)
    count = 20_000 if how == "stopped" else 2000
    with Session(title=how) as session:
        events = []
        session.bus.subscribe(events.append)
        assert session.sync(10)
        view = StoreView(session.directory)
        if how == "stopped":
            os.kill(session.recorder.pid, signal.SIGSTOP)
        try:
            for _ in range(count // 100):
                tasks = [session.tasks.submit(int) for _ in range(100)]
                assert [task.result(timeout=60) for task in tasks] == [0] * 100
                # Else all of it may be one batch, which goes however large it is.
                session.recorder.flush()
            if how == "stopped":
                wait_until(lambda: "rows_dropped" in [event.kind for event in events])
                assert not session.sync(0.1)
                assert "does not keep up" in session.info.notice
        finally:
            os.kill(session.recorder.pid, signal.SIGCONT)
        assert session.sync(60)
        dropped = session.recorder.dropped_rows
        assert view.snapshot().task_counts == {"completed": count}
        wait_until(lambda: session.info.notice == view.info.notice == "")
        view.close()
    assert dropped > 0
    view = open_session(session.id)
    assert view.snapshot().task_counts == {"completed": count}
    frame = view.events()
    assert frame.data[frame.kind == "rows_caught_up"].iloc[-1] == {"dropped_rows": dropped, "dropped_tasks": 0}
    assert list(frame.kind).count("rows_dropped") == 1
    report = view.report()
    assert report.facts.dropped_rows == dropped
    assert f" {dropped} rows dropped" in str(report)
    assert str(report).count("rows dropped") + str(report).count("last state") == 1
    # What is missing is what was counted: three moves a task (born, started, ended).
    moves = view._store().query("SELECT count(*) FROM transitions")[0][0]
    assert moves + dropped == 3 * count
    view.close()


def test_a_session_that_ends_behind_a_stopped_recorder_has_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_outbox, "PENDING_LIMIT_BYTES", 10_000)
    monkeypatch.setattr(_backlog, "MOVES_LIMIT", 100)
    session = Session(title="stopped").start()
    assert session.sync(10)
    os.kill(session.recorder.pid, signal.SIGSTOP)
    tasks = [session.tasks.submit(int) for _ in range(2000)]
    assert [task.result(timeout=60) for task in tasks] == [0] * 2000
    session.close()
    assert session.recorder.dropped_rows > 0
    view = open_session(session.id)
    assert view.snapshot().task_counts == {"completed": 2000}
    assert view.report().facts.dropped_rows == session.recorder.dropped_rows
    assert view.info.notice == ""
    assert "session_closed" in set(view.events().kind)
    view.close()


def test_a_recorder_that_cannot_open_the_file_is_tried_again_until_it_can() -> None:
    with Session(title="no room") as session:
        told = []
        session.bus.subscribe(lambda event: told.append((event.kind, event.message)))
        assert session.sync(10)
        killed = session.recorder.pid
        path, aside = session.directory / "session.sqlite", session.directory / "aside"
        # As a full disk does it: nothing can be opened for writing.
        os.rename(path, aside)
        path.mkdir()
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: "recorder_failed" in [kind for kind, _ in told])
        why = dict(told)["recorder_failed"]
        assert "nothing is recorded at present" in why
        assert "cannot be opened for recording" in why
        assert session.info.notice == why
        assert session.tasks.submit(int).result(timeout=10) == 0
        assert not session.sync(0.1)
        path.rmdir()
        os.rename(aside, path)
        wait_until(lambda: "recorder_recovered" in [kind for kind, _ in told])
        assert session.info.notice == ""
        assert session.sync(10)
        # Whatever kept it from the file, its process was not to blame.
        assert (session.recorder.mode, session.recorder.restarts) == ("process", 1)
        kinds = [kind for kind, _ in told]
        assert [kinds.count(f"recorder_{what}") for what in ("restarted", "failed", "recovered")] == [1, 1, 1]
    view = open_session(session.id)
    assert view.task_history().state.tolist() == ["completed"]
    assert {"recorder_failed", "recorder_recovered", "session_closed"} <= set(view.events().kind)
    view.close()


def test_a_session_ends_at_once_while_its_recorder_cannot_start() -> None:
    session = Session(title="no recorder").start()
    told = []
    session.bus.subscribe(lambda event: told.append(event.kind))
    path, aside = session.directory / "session.sqlite", session.directory / "aside"
    assert session.sync(10)
    os.rename(path, aside)
    path.mkdir()
    os.kill(session.recorder.pid, signal.SIGKILL)
    wait_until(lambda: "recorder_failed" in told)
    path.rmdir()
    os.rename(aside, path)
    assert session.tasks.submit(int).result(timeout=10) == 0
    session.close()
    view = open_session(session.id)
    assert view.info.state is SessionState.ENDED
    assert view.task_history().state.tolist() == ["completed"]
    assert "session_closed" in set(view.events().kind)
    view.close()


def test_a_recorder_that_cannot_run_at_all_says_why_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def newer(self: StoreWriter) -> None:
        raise StoreVersionError("the file is newer than this program")

    monkeypatch.setattr(StoreWriter, "_open", newer)
    session = Session(title="newer", recorder_enabled=False)
    with pytest.raises(RecorderError, match="does not start: the file is newer"):
        session.start()


def test_a_command_that_was_taken_by_a_killed_recorder_is_answered() -> None:
    with Session(title="taken") as session:
        view = StoreView(session.directory, command_timeout=30.0)
        kill = threading.Event()

        def slow(verb: str, arguments: dict, who: str) -> CommandResult:
            os.kill(session.recorder.pid, signal.SIGKILL)
            kill.set()
            return CommandResult(True, "done")

        session.recorder._on_command = slow
        answer = view.pause()
        assert kill.is_set()
        # Which of the two comes first is chance: the answer, or the new recorder's word that it may have been done.
        assert answer.ok or "may have been done" in answer.message
        view.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_recorder_that_fails_is_replaced_and_the_session_is_not_called_crashed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed = []
    healthy = Keeper._handle

    def handle(self: Keeper, message: dict) -> None:
        if message["t"] == "batch" and not failed:
            failed.append(message)
            raise RuntimeError("a defect of the recorder's own")
        healthy(self, message)

    monkeypatch.setattr(Keeper, "_handle", handle)
    with Session(title="replaced", recorder_enabled=False) as session:
        task = session.tasks.submit(int)
        assert task.result(timeout=10) == 0
        wait_until(lambda: session.recorder.restarts == 1)
        wait_until(lambda: session.sync(5))
        view = StoreView(session.directory)
        wait_until(lambda: view.task_history().state.tolist() == ["completed"])
        assert view.info.state is SessionState.LIVE
        assert view.pause().ok
        view.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_recorder_that_ends_for_ever_is_told_of_once_and_tried_until_it_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_restarts, "FIRST_DELAY_SECONDS", 0.05)
    monkeypatch.setattr(_restarts, "LONGEST_DELAY_SECONDS", 0.1)
    ill = threading.Event()
    ill.set()
    healthy = Keeper._handle

    def handle(self: Keeper, message: dict) -> None:
        if message["t"] == "batch" and ill.is_set():
            raise RuntimeError("a defect of the recorder's own")
        healthy(self, message)

    monkeypatch.setattr(Keeper, "_handle", handle)
    with Session(title="ill", recorder_enabled=False) as session:
        told = []
        session.bus.subscribe(lambda event: told.append(event.kind))
        assert session.tasks.submit(int).result(timeout=10) == 0
        wait_until(lambda: session.recorder.restarts > _restarts.AT_ONCE + 3, timeout=60)
        assert told.count("recorder_failed") == 1
        assert "ended again and again" in session.info.notice
        ill.clear()
        wait_until(lambda: "recorder_recovered" in told)
        assert session.info.notice == ""
        assert session.sync(10)
    view = open_session(session.id)
    assert view.task_history().state.tolist() == ["completed"]
    assert list(view.events().kind).count("recorder_failed") == 1
    view.close()


@pytest.mark.parametrize("value", [np.str_("epoch"), np.int64(3), b"abc", 1j], ids=lambda value: type(value).__name__)
def test_whatever_a_task_tells_is_recorded_and_the_recorder_lives(value: object) -> None:
    def told() -> None:
        current_task().progress(np.float64(0.5), value)

    with Session(title="told") as session:
        task = session.tasks.options(tags=(np.str_("tag"),)).submit(told)
        task.result(timeout=10)
        waiting = session.tasks.submit(asyncio.sleep, 60)
        assert session.tasks.cancel(waiting.id, np.str_("why"))
        session.event("odd", "data of any kind", lock=threading.Lock(), value=value)
        assert session.sync(10)
        assert (session.recorder.restarts, session.recorder.trouble) == (0, "")
        assert all(type(record.progress_text) is str for record in session.task_records())
    view = open_session(session.id)
    assert view.info.state is SessionState.ENDED
    frame = view.task_history()
    texts = {"str_": "epoch", "int64": "3", "bytes": "abc", "complex": "1j"}
    assert frame.progress_text[task.id] == texts[type(value).__name__]
    assert set(frame.state) == {"completed", "cancelled"}
    view.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody takes over the time of those that ended")
def test_the_time_of_a_recorder_that_was_replaced_is_not_the_kernels() -> None:
    # In a kernel without other children.
    script = """
import os, signal, time
from wiseflow_nb.session import Session

def own():
    told = os.times()
    return told.user + told.system + told.children_user + told.children_system

def sample_after(session, moment):
    while (found := session.monitor.latest()) is None or found.time_seconds < moment:
        time.sleep(0.02)
    return found

with Session(title="replaced", resource_check_interval=0.05) as session:
    left = 0.0
    for _ in range(2):
        sample_after(session, time.time() + 0.5)
        first = session.recorder.pid
        os.kill(first, signal.SIGSTOP)
        time.sleep(0.2)
        left += session.monitor.latest().recorder_cpu_seconds_total
        os.kill(first, signal.SIGKILL)
        while session.recorder.pid == first:
            time.sleep(0.02)
    low = own()
    found = sample_after(session, time.time())
    print(left, low - left, found.process_cpu_seconds_total, own() - left)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    left, low, told, high = map(float, found.stdout.split())
    assert left > 0.1
    # What each used after its last sample is not known.
    assert low - 0.05 <= told <= high + 0.05
