"""The command line from a process of its own, on a live session and after its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd

from wiseflow_nb.session import Session


def wiseflow(*argv: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "wiseflow_nb", *argv],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    if code:
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        return done.stderr
    assert done.stderr == ""
    return done.stdout


def test_a_live_session_is_read_steered_and_explained_from_another_process(tmp_path: Path) -> None:
    release, started = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        release.wait(60)

    with Session(title="steered", resource_check_interval=0.1, max_concurrent_tasks=1) as session:
        held = session.tasks.options(name="held").submit(hold)
        assert started.wait(10)
        queued = session.tasks.options(name="\x1b[31mqueued").submit(int)
        assert session.sync(10)
        (info,) = json.loads(wiseflow("sessions", "--json"))
        assert (info["session_id"], info["state"]) == (session.id, "live")
        prefix = session.id[:-2]
        tasks = json.loads(wiseflow("tasks", prefix, "--json"))
        assert [(task["name"], task["state"]) for task in tasks] == [("held", "running"), ("\x1b[31mqueued", "pending")]
        assert "\x1b" not in wiseflow("tasks")
        (shot,) = json.loads(wiseflow("status", "--json"))
        assert shot["task_counts"]["running"] == 1
        assert shot["sample"]["memory_limit_bytes"] > 0
        assert "still live" in wiseflow("report", "latest")
        assert queued.id in wiseflow("cancel", queued.id)
        assert queued.state == "cancelled"
        assert "already over" in wiseflow("cancel", queued.id, code=1)
        assert "nobody" in wiseflow("cancel", "nobody", code=2)
        wiseflow("export", "latest", str(tmp_path / "live"))
        release.set()
        held.result(timeout=10)
    assert "It ended in order: closed." in wiseflow("report")
    assert "takes no commands any more" in wiseflow("cancel", queued.id, "--session", "latest", code=1)
    assert json.loads(wiseflow("report", prefix, "--json"))["session"]["state"] == "ended"
    wiseflow("export", "latest", str(tmp_path / "tasks.parquet"), "--what", "tasks")
    assert pd.read_parquet(tmp_path / "tasks.parquet").state.to_dict() == {held.id: "completed", queued.id: "cancelled"}
    live = pd.read_csv(tmp_path / "live" / "history.csv", index_col="time", parse_dates=True)
    assert (live.memory_limit_bytes > 0).all()
    assert str(live.index.tz) == "UTC"


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    with Session(title="piped"):
        pass
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "wiseflow_nb", "sessions"], stdout=write, stderr=subprocess.PIPE, timeout=60
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
