"""Rounds of kill -9, of the kernel and of the recorder: what was acknowledged is there, and what is not is said.

``WISEFLOW_KILL_ROUNDS`` is the number of rounds of each (default 10).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest

from wiseflow_nb.records import SessionState
from wiseflow_nb.session import Session, open_session, sessions
from wiseflow_nb.view import StoreView

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and process groups are POSIX")

ROUNDS = int(os.environ.get("WISEFLOW_KILL_ROUNDS", "10"))
#: What may be lost of what was not acknowledged, in turns of a bare thread beside it that runs 50 times a second.
TURN_SECONDS = 0.02
TURNS_LOST_AT_MOST = int(0.5 / TURN_SECONDS)
#: A round takes a few seconds; the hang net of one test is for one batch of rounds.
BATCH = 10


def wait_until(condition, timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether a process still does anything: one that ended may wait for its new parent to notice."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def batches(rounds: int) -> Iterator[int]:
    while rounds > 0:
        yield min(rounds, BATCH)
        rounds -= BATCH


# One line a fact, each one write: what a pipe took is there, whatever happens to the process.
_VICTIM = """
import json, os, sys, threading, time
from wiseflow_nb.session import Session

def say(*fact):
    os.write(1, json.dumps(fact).encode() + b"\\n")

session = Session(title="victim", resource_check_interval=0.05).start()
hold = threading.Event()
session.tasks.options(name="in flight").submit(hold.wait)
say("begun", session.id, session.recorder.pid)

def turns():
    # The control: when could a thread of this process have the interpreter lock?
    while True:
        say("turn")
        time.sleep(0.02)

def syncs():
    while True:
        newest = done
        sample = session.latest()
        if session.sync():
            say("synced", newest, sample.time_seconds if sample is not None else 0.0)
        time.sleep(0.05)

done = 0
for target in (turns, syncs):
    threading.Thread(target=target, daemon=True).start()
while True:
    task = session.tasks.options(name=str(done + 1)).submit(sum, [1, 2])
    task.result()
    done += 1
    say("done", done)
    if done % 7 == 0:
        sum(range(200_000))
"""


@dataclass
class Told:
    """What a child said until it was killed."""

    session: str = ""
    recorder: int = 0
    synced: int = 0
    synced_sample: float = 0.0
    done: list[int] = field(default_factory=list)
    #: Number of a task -> turns of the control thread before its end was said.
    turns_before: dict[int, int] = field(default_factory=dict)
    turns: int = 0

    def hear(self, line: bytes) -> None:
        if not line.endswith(b"\n"):
            return  # torn by the kill
        kind, *rest = json.loads(line)
        if kind == "begun":
            self.session, self.recorder = rest
        elif kind == "synced":
            self.synced, self.synced_sample = rest
        elif kind == "turn":
            self.turns += 1
        else:
            self.done.append(rest[0])
            self.turns_before[rest[0]] = self.turns


def kill_once(chance: random.Random) -> tuple[Told, float, float]:
    """Start a child and kill it at a random moment.

    Return what it said, the seconds until it had begun, and until no process of it was left.
    """
    began = time.monotonic()
    child = subprocess.Popen([sys.executable, "-c", _VICTIM], stdout=subprocess.PIPE)
    assert child.stdout is not None
    told = Told()
    told.hear(child.stdout.readline())
    start = time.monotonic() - began
    threading.Timer(chance.uniform(0.0, 1.5), child.kill).start()
    for line in child.stdout:
        told.hear(line)
    child.wait()
    child.stdout.close()
    assert child.returncode == -signal.SIGKILL
    killed = time.monotonic()
    wait_until(lambda: not runs(told.recorder))
    return told, start, time.monotonic() - killed


def check_the_dead(told: Told) -> int:
    """Check all that must hold of a killed kernel's session; return how many turns were lost."""
    view = open_session(told.session)
    path = view._store().path
    assert view.info.state is SessionState.CRASHED
    tasks = view.task_history()
    completed = {int(name) for name in tasks.name[tasks.state == "completed"]}
    assert set(range(1, told.synced + 1)) <= completed, "an acknowledged task is missing"
    times = view.rows()[:, 0]
    stored = view._store().sample_blocks()[:, 0]
    assert told.synced_sample == 0.0 or (times >= told.synced_sample).any()
    assert told.synced_sample == 0.0 or stored.max() >= told.synced_sample, "an acknowledged sample is missing"
    states = dict(zip(tasks.name, tasks.state, strict=True))
    assert states["in flight"] == "lost"
    assert set(states.values()) <= {"completed", "lost"}
    assert len(np.unique(times)) == len(times)
    view.close()
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
    lost = [number for number in told.done if number not in completed]
    return told.turns - min((told.turns_before[number] for number in lost), default=told.turns)


def left_behind(before: set[int]) -> set[int]:
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if "wiseflow_nb.recorder" in line and process.pid not in before:
            found.add(process.pid)
    return found


@pytest.mark.parametrize("rounds", list(batches(ROUNDS)))
def test_a_kernel_killed_at_any_moment(rounds: int, request, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(request.node.name)
    lost: list[int] = []
    starts: list[float] = []
    ends: list[float] = []
    done = 0
    for _ in range(rounds):
        told, start, end = kill_once(chance)
        lost.append(check_the_dead(told))
        starts.append(start)
        ends.append(end)
        done += len(told.done)
    assert len(sessions()) == rounds
    with capsys.disabled():
        print(
            f"\nkernel killed {rounds} times after {done} tasks: lost at most {max(lost)} turns of {TURN_SECONDS:g} s "
            f"(of {TURNS_LOST_AT_MOST} allowed), in {sum(item > 0 for item in lost)} rounds any; "
            f"the next session ran {np.median(starts):.2f} s after its process was started; "
            f"no process was left after {max(ends):.2f} s at most"
        )
    assert max(lost) <= TURNS_LOST_AT_MOST
    assert max(ends) < 5.0
    with Session(title="next") as session:
        assert session.tasks.submit(int).result(timeout=30) == 0


@pytest.mark.parametrize("rounds", list(batches(ROUNDS)))
def test_a_recorder_killed_at_any_moment(rounds: int, request, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(request.node.name)
    silences: list[float] = []
    for number in range(rounds):
        with Session(title=f"round {number}", resource_check_interval=0.05) as session:
            events = []
            session.bus.subscribe(events.append)
            wait_until(lambda session=session: session.latest() is not None)
            first, stop = session.recorder.pid, threading.Event()
            failures: list[BaseException] = []

            def work(session=session, stop=stop, failures=failures) -> None:
                try:
                    while not stop.is_set():
                        assert session.tasks.submit(sum, [1, 2]).result(timeout=30) == 3
                        # A machine with few cores must also run the recorder's start.
                        stop.wait(0.001)
                except BaseException as error:
                    failures.append(error)

            worker = threading.Thread(target=work)
            worker.start()
            time.sleep(chance.uniform(0.0, 0.5))
            os.kill(first, signal.SIGKILL)
            wait_until(lambda events=events: any(event.kind == "recorder_resumed" for event in events))
            stop.set()
            worker.join()
            assert failures == []
            assert session.recorder.pid != first
            assert session.recorder.mode == "process"
            assert session.sync(30)
            view = StoreView(session.directory)
            assert view.info.state is SessionState.LIVE
            assert set(view.task_history().index) == {record.task_id for record in session.task_records()}
            assert set(view.task_history().state) == {"completed"}
            frame = view.events()
            kinds = list(frame.kind)
            assert kinds.count("recorder_restarted") == kinds.count("recorder_resumed") == 1
            assert "signal 9" in frame.message[frame.kind == "recorder_restarted"].iloc[0]
            told = frame.data[frame.kind == "recorder_resumed"].iloc[0]
            times = np.sort(view.rows()[:, 0])
            # What is said to be missing is exactly the hole that the samples show.
            assert not ((times > told["from_seconds"] + 1e-6) & (times < told["to_seconds"] - 1e-6)).any()
            silences.append(told["to_seconds"] - told["from_seconds"])
            assert view.pause().ok
            view.close()
        view = open_session(session.id)
        assert view.info.state is SessionState.ENDED
        assert view._store().query("PRAGMA integrity_check") == [("ok",)]
        view.close()
    with capsys.disabled():
        print(
            f"\nrecorder killed {rounds} times: no samples for {np.median(silences):.2f} s at the median, "
            f"{max(silences):.2f} s at most; every task of the time is on record"
        )


def test_no_process_is_left_when_kernel_and_recorder_die_together() -> None:
    before = left_behind(set())
    child = subprocess.Popen([sys.executable, "-c", _VICTIM], stdout=subprocess.PIPE)
    assert child.stdout is not None
    told = Told()
    told.hear(child.stdout.readline())
    os.kill(told.recorder, signal.SIGKILL)
    child.kill()
    child.wait()
    child.stdout.close()
    wait_until(lambda: not left_behind(before), timeout=20.0)
    view = open_session(told.session)
    assert view.info.state is SessionState.CRASHED
    assert Path(view.info.path).is_dir()
    view.close()
