"""A kernel that gets no more threads, processes or descriptors: said once, and mended when there are some again."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable

import psutil
import pytest

from wiseflow_nb.errors import RecorderError, UsageError
from wiseflow_nb.recorder import _launch, _restarts, client
from wiseflow_nb.recorder._keeper import Keeper
from wiseflow_nb.records import SessionState
from wiseflow_nb.session import Session, open_session

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")


def wait_until(condition: Callable[[], object], timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)


class Refused:
    """Refuses to start the threads whose name begins so, while ``name`` is not empty."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.count = "", 0
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if self.name and thread.name.startswith(self.name):
                self.count += 1
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Refused:
    monkeypatch.setattr(_restarts, "FIRST_DELAY_SECONDS", 0.02)
    monkeypatch.setattr(_restarts, "LONGEST_DELAY_SECONDS", 0.05)
    return Refused(monkeypatch)


def recorders() -> list[int]:
    children = psutil.Process().children()
    return [child.pid for child in children if child.cmdline()[-1:] == ["wiseflow_nb.recorder"]]


def heard(session: Session) -> list[str]:
    told: list[str] = []
    session.bus.subscribe(lambda event: told.append(event.kind))
    return told


@pytest.mark.parametrize("name", ["wiseflow-relaunch", "wiseflow-listen"])
def test_without_threads_a_recorder_is_replaced_later_by_one_alone(name: str, refused: Refused) -> None:
    with Session(title="no threads") as session:
        told = heard(session)
        assert session.sync(10)
        refused.name = name
        os.kill(session.recorder.pid, signal.SIGKILL)
        wait_until(lambda: refused.count > 3)
        assert "can't start new thread" in session.info.notice
        assert session.tasks.submit(int).result(timeout=10) == 0
        assert not session.sync(0.1)
        refused.name = ""
        wait_until(lambda: "recorder_recovered" in told)
        assert session.info.notice == ""
        assert session.sync(10)
        assert told.count("recorder_failed") == 1
        assert recorders() == [session.recorder.pid]
    assert recorders() == []
    view = open_session(session.id)
    assert view.task_history().state.tolist() == ["completed"]
    view.close()


@pytest.mark.parametrize("name", ["wiseflow-relaunch", "wiseflow-listen", "wiseflow-"])
def test_a_session_is_closed_soon_where_no_thread_can_be_started(name: str, refused: Refused) -> None:
    session = Session(title="no threads").start()
    told = heard(session)
    assert session.tasks.submit(int).result(timeout=10) == 0
    assert session.sync(10)
    refused.name = name
    os.kill(session.recorder.pid, signal.SIGKILL)
    wait_until(lambda: "recorder_failed" in told)
    session.close()
    assert session.recorder._settled.is_set()
    assert recorders() == []
    view = open_session(session.id)
    assert view.info.state is SessionState.ENDED
    assert "session_closed" in set(view.events().kind)
    view.close()


def test_a_recorder_without_its_threads_is_not_left_behind_by_a_start(refused: Refused) -> None:
    for name in ("wiseflow-flush", "wiseflow-listen"):
        session = Session(title="no threads")
        refused.name = name
        with pytest.raises(RecorderError, match="can't start new thread"):
            session.start()
        assert recorders() == []
        refused.name = ""
        with session:
            assert session.sync(10)


def test_what_cannot_be_published_aside_is_published_by_the_flushing_thread(
    refused: Refused,
) -> None:
    with Session(title="no threads") as session:
        told = heard(session)
        refused.name = "wiseflow-notice"
        session.recorder.put("event", object())
        wait_until(lambda: "rows_unwritable" in told)
        assert refused.count
        assert session.tasks.submit(int).result(timeout=10) == 0
        assert session.sync(10)


def test_a_recorder_without_descriptors_waits_for_a_process_and_takes_no_thread(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, failed = client.start_process, []

    def none_left(directory: str) -> _launch.Started:
        if len(failed) < 4:
            failed.append(directory)
            raise OSError(errno.EMFILE, "Too many open files")
        return start(directory)

    with Session(title="no descriptors") as session:
        told = heard(session)
        monkeypatch.setattr(client, "start_process", none_left)
        os.kill(session.recorder.pid, signal.SIGKILL)
        wait_until(lambda: "recorder_recovered" in told)
        assert session.sync(10)
        assert (session.recorder.mode, session.info.notice) == ("process", "")
        assert "recorder_fallback" not in told


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_in_the_place_of_a_process_is_told_with_its_reason_until_a_process_takes_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_left(directory: str) -> _launch.Started:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as without:
        without.setattr(client, "start_process", none_left)
        session = Session(title="no descriptors")
        told = heard(session)
        session.start()
    with session:
        assert session.recorder.mode == "thread"
        assert "Too many open files" in session.info.notice
        assert told.count("recorder_fallback") == 1
        assert session.sync(10)

        def fail(keeper: Keeper, message: dict[str, object]) -> None:
            raise RuntimeError("a defect of the recorder's own")

        monkeypatch.setattr(Keeper, "_handle", fail)
        assert session.tasks.submit(int).result(timeout=10) == 0
        wait_until(lambda: "recorder_process" in told)
        assert session.sync(10)
        assert (session.recorder.mode, session.info.notice) == ("process", "")


def test_a_directory_deleted_with_its_recorder_dead_is_made_again() -> None:
    with Session(title="gone") as session:
        told = heard(session)
        assert session.tasks.submit(int).result(timeout=10) == 0
        assert session.sync(10)
        os.kill(session.recorder.pid, signal.SIGSTOP)
        shutil.rmtree(session.directory)
        os.kill(session.recorder.pid, signal.SIGKILL)
        wait_until(lambda: "store_remade" in told)
        wait_until(lambda: session.sync(5))
        assert session.directory.stat().st_mode & 0o777 == 0o700
        assert session.recorder.mode == "process"
        assert session.tasks.submit(int).result(timeout=10) == 0
        assert "store_remade" in set(session.events().kind)
    view = open_session(session.id)
    assert view.info.state is SessionState.ENDED
    assert view.task_history().state.tolist() == ["completed"] * 2
    view.close()


def test_a_directory_with_a_null_character_is_refused() -> None:
    with pytest.raises(UsageError, match="holds a null character; name a directory"):
        Session(title="null", state_dir="a\0b")
