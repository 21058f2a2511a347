"""A forked child of a session's process: its copy answers at once, and its end is its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from wiseflow_nb.errors import UsageError
from wiseflow_nb.records import SessionState
from wiseflow_nb.session import Session, current_session, open_session

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning"),
]


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except UsageError as error:
        return "stayed with the parent" in str(error)
    return False


ACTS: dict[str, Callable[[Session], object]] = {
    "sync": lambda session: not session.sync(),
    "configure": lambda session: refused(lambda: session.configure(cpu_threshold=77)),
    "start": lambda session: refused(session.start),
    "set_busy": lambda session: session.recorder.set_busy(True) is None,
    "write_through": lambda session: session.recorder.write_through() is None,
    "event": lambda session: session.event("odd", "a child's") is None,
    "events": lambda session: len(session.events()) > 0,
    "pause": lambda session: not session.view.pause().ok,
    "processes": lambda session: session.pool.processes.pids() == [],
    "close": lambda session: session.close() is None,
    "notice": lambda session: "stayed with the parent" in session.info.notice,
    "current": lambda session: current_session() is None,
}


def in_child(act: Callable[[], object]) -> int:
    """Return the exit status of a child that does so; one that hangs is ended by its own alarm."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(30)
            status = 0 if act() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def held(locks: list[object], do: Callable[[], int]) -> int:
    """Do it while another thread holds all of these."""
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        for lock in locks:
            lock.acquire()  # type: ignore[attr-defined]
        taken.set()
        done.wait(60)
        for lock in reversed(locks):
            lock.release()  # type: ignore[attr-defined]

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(30)
    try:
        return do()
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("name", ACTS)
def test_a_call_in_a_child_that_was_forked_under_every_lock_answers(name: str) -> None:
    with Session(title="parent") as session:
        assert session.tasks.submit(int).result(timeout=10) == 0
        assert session.sync(10)
        assert len(session.events()) > 0
        recorder, pool = session.recorder, session.pool
        locks = [
            session._lock,
            session.view._reader_lock,
            session.bus._lock,
            pool.processes._lock,
            recorder._turn,
            recorder._answered,
            recorder._outbox.lock,
            recorder._outbox._bell._cond,
            recorder._wire._lock,
        ]
        assert held(locks, lambda: in_child(lambda: ACTS[name](session))) == 0
        assert session.tasks.submit(int).result(timeout=10) == 0
        assert session.sync(10)
    view = open_session(session.id)
    assert view.info.state is SessionState.ENDED
    assert "odd" not in set(view.events().kind)
    view.close()


def test_the_end_of_a_child_is_not_the_end_of_the_session() -> None:
    script = """
import os, sys
from wiseflow_nb.session import Session
session = Session(title="parent").start()
assert session.tasks.submit(int).result(timeout=10) == 0
for _ in range(5):
    if (pid := os.fork()) == 0:
        sys.exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
assert session.sync(10)
print(session.directory.name, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    view = open_session(done.stdout.split()[-1])
    assert view.info.state is SessionState.ENDED
    assert list(view.events().kind).count("session_closed") == 1
    view.close()
