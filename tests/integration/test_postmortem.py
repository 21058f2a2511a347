"""After a death the report says what did it: the real OOM killer, a kill from outside, the end of everything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from wiseflow_nb.records import SessionState, TaskState
from wiseflow_nb.report import Report
from wiseflow_nb.session import open_session

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and process groups are POSIX")

LIMIT = 300_000_000
CANNOT = "control groups cannot be made here (needs root and a writable cgroup mount)"

#: A kernel-like child: joins the group (if one is given), then works until it is killed.
_VICTIM = """
import json, os, sys, threading, time
kind, group = sys.argv[1:]
if group:
    with open(group, "w") as stream:
        stream.write(str(os.getpid()))
from wiseflow_nb.session import Session
session = Session(title=kind, busy_check_interval=0.1).start()
kept = []
def grow():
    while True:
        kept.append(b"x" * 4_000_000)
        time.sleep(0.06)
def idle():
    threading.Event().wait()
if kind != "alone":
    session.tasks.options(name="sleeper").submit(idle)
    time.sleep(0.5)
if kind != "killed":
    session.tasks.options(name="grow the table").submit(grow)
print(json.dumps([session.id, session.recorder.pid]), flush=True)
time.sleep(120)
"""


class Group(NamedTuple):
    """A memory control group."""

    directory: Path

    def kills(self) -> int:
        """How many processes the OOM killer has taken in it."""
        control = self.directory / "memory.events"
        control = control if control.exists() else self.directory / "memory.oom_control"
        return int(next(line.split()[1] for line in control.read_text().splitlines() if line.startswith("oom_kill ")))

    @property
    def procs(self) -> Path:
        return self.directory / "cgroup.procs"


@pytest.fixture
def group() -> Iterator[Group]:
    base, name = Path("/sys/fs/cgroup"), f"wiseflow-postmortem-{os.getpid()}"
    directory = None
    try:
        try:
            if (base / "cgroup.controllers").exists():
                if "memory" not in (base / "cgroup.subtree_control").read_text().split():
                    (base / "cgroup.subtree_control").write_text("+memory")
                settings, optional = {"memory.max": str(LIMIT)}, {"memory.swap.max": "0"}
                wanted = base / name
            else:
                settings, optional = {"memory.limit_in_bytes": str(LIMIT)}, {"memory.swappiness": "0"}
                wanted = base / "memory" / name
            wanted.mkdir()
            directory = wanted
            for setting, value in settings.items():
                (wanted / setting).write_text(value)
            for setting, value in optional.items():
                # Else a machine with swap swaps instead of killing.
                if (wanted / setting).exists():
                    (wanted / setting).write_text(value)
        except OSError:
            pytest.skip(CANNOT)
        yield Group(wanted)
    finally:
        if directory is not None:
            wait_until(lambda: not (directory / "cgroup.procs").read_text().split())
            directory.rmdir()


def wait_until(condition, timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)


def start(kind: str, group: str = "") -> tuple[subprocess.Popen[str], str, int]:
    child = subprocess.Popen([sys.executable, "-c", _VICTIM, kind, group], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        child.wait(10)
        child.stdout.close()
        raise AssertionError(f"the child ended with {child.returncode} before it had begun")
    session_id, recorder = json.loads(line)
    return child, session_id, recorder


def finish(child: subprocess.Popen[str], recorder: int) -> None:
    assert child.stdout is not None
    child.stdout.close()
    wait_until(lambda: not psutil.pid_exists(recorder))


def report_of(session_id: str) -> Report:
    view = open_session(session_id)
    try:
        return view.report()
    finally:
        view.close()


@pytest.mark.cgroup
@pytest.mark.parametrize("kind", ["alone", "beside"])
def test_a_kernel_taken_by_the_oom_killer_is_explained_with_the_task_that_grew(group: Group, kind: str) -> None:
    child, session_id, recorder = start(kind, str(group.procs))
    try:
        assert child.wait(60) == -signal.SIGKILL
    finally:
        child.kill()
        child.wait()
    finish(child, recorder)
    report = report_of(session_id)
    facts = report.facts
    assert facts.info.state is SessionState.CRASHED
    if group.kills() > 1:
        # Until all of the kernel's memory was given back the group was over its limit, and the killer went
        # on to the recorder, which may not ask to be spared here: the counter is read for the report.
        assert [(cause.kind, cause.confidence) for cause in report.causes] == [
            ("oom", "likely"),
            ("recorder", "likely"),
        ], str(report)
        assert "while task 'grow the table'" in report.cause.sentence
        return
    assert (report.cause.kind, report.cause.confidence) == ("oom", "certain"), str(report)
    assert "OOM killer" in report.cause.sentence
    assert "task 'grow the table'" in report.cause.sentence
    assert "limit 300 MB" in report.cause.sentence
    assert f"cgroup{2 if (group.directory / 'memory.max').exists() else 1}" in facts.info.limit_source
    # The counter is the group's own: this kill is the only one it has seen.
    assert report.to_dict()["oom_kills"] == {"start": 0.0, "end": 1.0}
    assert report.grown[0].label.startswith("task 'grow the table'")
    assert report.grown[0].grown_bytes > 100e6
    assert report.grown[0].alone == (kind == "alone")
    assert ("task 'sleeper'" in " ".join(report.grown[0].others)) == (kind == "beside")
    alive = facts.last_alive
    assert alive is not None
    assert 0.5 * LIMIT < alive.memory_working_set_bytes <= LIMIT
    assert facts.after_death
    lost = {task.name for task in facts.tasks if facts.was_running(task)}
    assert lost == {"grow the table", *(["sleeper"] if kind == "beside" else [])}
    text, page = str(report), report._repr_html_()
    for shown in (text, page):
        assert "grow the table" in shown
        assert "OOM kills" in shown
    assert "out of memory" in {alert.rule for alert in facts.alerts}


@pytest.mark.cgroup
def test_kills_that_no_recorder_lived_to_see_are_counted_for_the_report(group: Group) -> None:
    child, session_id, recorder = start("alone", str(group.procs))
    wait_until(lambda: len(report_of(session_id).facts.samples) >= 3)
    # From here on it sees nothing; without its end the session would be resumed by nobody, and closed by it.
    os.kill(recorder, signal.SIGSTOP)
    try:
        assert child.wait(60) == -signal.SIGKILL
    finally:
        child.kill()
        child.wait()
        os.kill(recorder, signal.SIGKILL)
    finish(child, recorder)
    report = report_of(session_id)
    assert not report.facts.marked
    assert report.facts.oom_kills_now == group.kills() >= 1
    assert {cause.kind for cause in report.causes} == {"oom", "recorder"}, str(report)
    assert f"{group.kills()} as of this report" in str(report)


def test_a_kill_from_outside_is_not_blamed_on_anything() -> None:
    child, session_id, recorder = start("killed")
    wait_until(lambda: len(report_of(session_id).facts.samples) >= 3)
    child.kill()
    child.wait()
    finish(child, recorder)
    report = report_of(session_id)
    assert report.facts.info.state is SessionState.CRASHED
    assert report.facts.marked
    (cause,) = report.causes
    assert (cause.kind, cause.confidence) == ("vanished", "unknown")
    view = open_session(session_id)
    assert view.task_history().state.tolist() == [TaskState.LOST.value]
    view.close()


def test_the_end_of_kernel_and_recorder_at_once_is_told() -> None:
    child, session_id, recorder = start("killed")
    wait_until(lambda: len(report_of(session_id).facts.samples) >= 3)
    # The recorder first: it must not live to write an end mark.
    os.kill(recorder, signal.SIGSTOP)
    child.kill()
    child.wait()
    os.kill(recorder, signal.SIGKILL)
    finish(child, recorder)
    report = report_of(session_id)
    assert report.facts.info.state is SessionState.CRASHED
    assert not report.facts.marked
    assert [cause.kind for cause in report.causes] == ["recorder", "vanished"]
    assert "no end mark" in str(report)
