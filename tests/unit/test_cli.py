"""The command line, without a server: exit codes, one-line errors, JSON, text."""

from __future__ import annotations

import contextlib
import io
import json
import re
import socket
import sqlite3
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import wiseflow_nb
from wiseflow_nb import cli, text
from wiseflow_nb.config import Settings, load_settings
from wiseflow_nb.dashboard import serve
from wiseflow_nb.doctor import kernel_check
from wiseflow_nb.errors import DashboardError, MissingExtraError, SessionNotFoundError, StoreError, UsageError
from wiseflow_nb.frames import EXPORTS, export_frame
from wiseflow_nb.records import (
    NAN,
    CommandResult,
    PoolStatus,
    Sample,
    SessionInfo,
    SessionState,
    Snapshot,
    TaskRecord,
    TaskState,
    valid_text,
)
from wiseflow_nb.report import Facts, Report
from wiseflow_nb.store.paths import DATABASE_NAME
from wiseflow_nb.store.writer import StoreWriter
from wiseflow_nb.view import default_view

COMMANDS = ("dashboard", "status", "sessions", "tasks", "cancel", "report", "config", "export", "doctor")
LIVE = SessionInfo("20260101-000000-abcdef", SessionState.LIVE, "etl", "here", 7, 1_700_000_000.0)
ENDED = SessionInfo("20250101-000000-abcdef", SessionState.ENDED, "old", "here", 6, 1_600_000_000.0)


class FakeView:
    def __init__(self, answer: CommandResult) -> None:
        self.answer = answer
        self.cancelled: list[str] = []
        self.asked: list[str] = []
        self.listed = [LIVE, ENDED]
        self.closed = 0
        self.tasks = [
            TaskRecord("t1", "load", TaskState.COMPLETED, created_seconds=1.0),
            TaskRecord("t2", "load", TaskState.RUNNING, created_seconds=2.0),
            TaskRecord("t3", "fit", TaskState.RUNNING, created_seconds=3.0),
            TaskRecord("t4", "fit", TaskState.PENDING, created_seconds=4.0),
        ]

    def snapshot(self, since_rev: int = 0) -> Snapshot:
        counts = {"running": 2}
        return Snapshot(LIVE, 0.0, 0, Sample(), tuple(self.tasks), counts, PoolStatus(), (), (), {}, {})

    def task_records(self, *, until_rev: int | None = None, limit: int | None = None) -> tuple[TaskRecord, ...]:
        return tuple(reversed(self.tasks))

    def task(self, task_id: str) -> TaskRecord | None:
        return next((record for record in self.tasks if record.task_id == task_id), None)

    def unfinished_named(self, name: str) -> list[str]:
        return [record.task_id for record in self.tasks if record.name == name and not record.state.terminal]

    def cancel(self, task_id: str) -> CommandResult:
        self.cancelled.append(task_id)
        return self.answer

    def export(self, path: Path, what: str = "history") -> Path:
        return export_frame(pd.DataFrame({what: [1, 2]}, index=pd.Index([0, 1], name="n")), path)

    def report(self) -> Report:
        return Report.of(Facts(ENDED, 1.7e9, ended_mark_seconds=1.6e9 + 60, end_reason="closed"))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> FakeView:
    made = FakeView(CommandResult(True, "task t2 was cancelled"))
    asked, listed = made.asked, made.listed
    module = types.ModuleType("wiseflow_nb.session")

    def open_session(session_id: str, settings: Settings | None = None) -> FakeView:
        asked.append(session_id)
        if session_id not in {info.session_id for info in listed}:
            raise SessionNotFoundError(f"no session {session_id!r};\nwiseflow sessions lists them")
        return made

    module.open_session = open_session  # type: ignore[attr-defined]
    module.sessions = lambda settings=None: list(listed)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wiseflow_nb.session", module)
    return made


def test_version_and_help() -> None:
    run = [sys.executable, "-m", "wiseflow_nb"]
    done = subprocess.run([*run, "--version"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == f"wiseflow {wiseflow_nb.__version__}"
    done = subprocess.run([*run, "--help"], capture_output=True, text=True, check=True, timeout=60)
    for name in COMMANDS:
        assert name in {line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ")}


def test_config_lists_every_setting_with_its_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WISEFLOW_CPU_THRESHOLD", "77")
    monkeypatch.setenv("WISEFLOW_DASHBOARD_TOKEN", "hunter2")
    assert cli.main(["config", "--json"]) == 0
    out = capsys.readouterr().out
    values = json.loads(out)
    assert set(values) == {name.upper() for name in Settings.model_fields}
    assert values["CPU_THRESHOLD"] == {"value": 77.0, "unit": "%", "source": "environment"}
    assert values["DASHBOARD_TOKEN"] == {"value": None, "unit": "", "source": "environment"}
    assert cli.main(["config"]) == 0
    out += capsys.readouterr().out
    assert "(hidden)" in out
    assert "hunter2" not in out


def test_a_bad_setting_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WISEFLOW_CPU_THRESHOLD", "much")
    assert cli.main(["config"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("wiseflow: CPU_THRESHOLD='much' (from environment)")


def test_sessions_and_tasks(view: FakeView, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sessions"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [LIVE.session_id, ENDED.session_id]
    assert cli.main(["sessions", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["ended_seconds"] is None
    assert cli.main(["tasks"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["t1", "t2", "t3", "t4"]
    assert cli.main(["tasks", LIVE.session_id, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1]["state"] == "running"
    assert view.closed == 2


def test_of_very_many_tasks_a_picture_is_shown_and_the_rest_is_told_of(
    view: FakeView, capsys: pytest.CaptureFixture[str]
) -> None:
    shot = view.snapshot()
    view.snapshot = (
        lambda since_rev=0: replace(  # type: ignore[method-assign]
            shot, tasks=shot.tasks[1:], older_rev=1, task_counts={"completed": 1, "running": 2, "pending": 1}
        )
    )
    for more in ([], ["--json"]):
        assert cli.main(["tasks", *more]) == 0
        told = capsys.readouterr()
        assert "t1" not in told.out
        assert "3 of 4 tasks, " in told.err
        assert "--all lists all" in told.err
        assert cli.main(["tasks", "--all", *more]) == 0
        told = capsys.readouterr()
        assert ("t1" in told.out, told.err) == (True, "")
    assert [task["task_id"] for task in json.loads(told.out)] == ["t1", "t2", "t3", "t4"]
    assert told.out == json.dumps(json.loads(told.out), indent=2) + "\n"
    view.tasks.clear()
    assert cli.main(["tasks", "--all", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"


def test_what_a_newer_version_wrote_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "sessions"
    for number in range(2):
        directory = root / f"20260101-00000{number}-abcdef"
        directory.mkdir(parents=True, mode=0o700)
        StoreWriter(directory / DATABASE_NAME).close()
        with contextlib.closing(sqlite3.connect(directory / DATABASE_NAME)) as db:
            db.execute("PRAGMA user_version = 99")
    (root / "20260101-000009-abcdef").mkdir()
    where = ["--state-dir", str(tmp_path)]
    assert cli.main(["sessions", *where]) == 0
    out = capsys.readouterr().out
    assert out.startswith("no sessions\n")
    assert f"a newer version of wiseflow_nb wrote them: 2 in {root}; upgrade" in out
    assert cli.main(["sessions", "--json", *where]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == []
    assert f"2 in {root}" in told.err
    assert cli.main(["tasks", *where]) == 2
    assert f"2 in {root}" in capsys.readouterr().err
    with pytest.raises(SessionNotFoundError, match="2 in "):
        default_view(load_settings({"state_dir": str(tmp_path)}))


def test_status_shows_live_sessions(view: FakeView, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == 0
    out = capsys.readouterr().out
    assert LIVE.session_id in out
    assert ENDED.session_id not in out


def test_an_unknown_session_is_one_line(view: FakeView, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks", "nothing"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "nothing" in err


def test_cancel_by_name_takes_the_one_that_is_not_over(view: FakeView, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cancel", "load"]) == 0
    assert view.cancelled == ["t2"]
    assert cli.main(["cancel", "fit"]) == 2
    assert "t3, t4" in capsys.readouterr().err
    view.tasks += [TaskRecord(f"t{number}", "many", TaskState.PENDING) for number in range(10, 1000)]
    assert cli.main(["cancel", "many"]) == 2
    assert re.search(r"990 tasks are named 'many': give one of the ids t10, .*, t29, \.\.\.$", capsys.readouterr().err)
    assert cli.main(["cancel", "caf\udce9"]) == 2
    assert cli.main(["cancel", "nobody"]) == 2
    view.answer = CommandResult(False, "task t3 has ended")
    assert cli.main(["cancel", "t3"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "wiseflow: task t3 has ended"


def test_export_writes_every_frame(view: FakeView, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    assert cli.main(["export", LIVE.session_id, str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == sorted(f"{name}.csv" for name in EXPORTS.values())
    assert capsys.readouterr().out.splitlines() == [str(target / f"{name}.csv") for name in EXPORTS.values()]
    assert len(pd.read_csv(target / "history.csv")) == 2
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    assert cli.main(["export", LIVE.session_id, str(blocked)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_export_of_some_tables_and_to_one_file(
    view: FakeView, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    assert cli.main(["export", "latest", str(target), "--what", "tasks,cells,tasks", "--format", "parquet"]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["cell_history.parquet", "task_history.parquet"]
    one = tmp_path / "samples.parquet"
    assert cli.main(["export", "latest", str(one)]) == 0
    assert list(pd.read_parquet(one).columns) == ["history"]
    assert cli.main(["export", "latest", str(tmp_path / "e.csv"), "--what", "events"]) == 0
    assert list(pd.read_csv(tmp_path / "e.csv").columns) == ["n", "events"]
    capsys.readouterr()
    for wrong in (["--what", "tasks,cells"], ["--format", "csv"]):
        assert cli.main(["export", "latest", str(one), *wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_a_missing_package_and_an_unreadable_file_are_exit_1(
    view: FakeView, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (
        MissingExtraError("Parquet needs pyarrow"),
        StoreError("cannot be read"),
        sqlite3.DatabaseError("file is not a database"),
    ):

        def fail(*args: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(FakeView, "export", fail)
        assert cli.main(["export", "latest", str(tmp_path / "out")]) == 1
        assert capsys.readouterr().err == f"wiseflow: {error}\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["tsk"],
        ["tasks", "--bogus"],
        ["tasks", "a", "b"],
        ["cancel"],
        ["export", "latest"],
        ["export", "latest", "x", "--what", "everything"],
        ["export", "latest", "x", "--what", ","],
        ["export", "latest", "x", "--format", "xlsx"],
        ["dashboard", "--port", "many"],
        ["dashboard", "--token", "a", "--no-token"],
        ["tasks", "--\x1b[31m\nred"],
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("wiseflow: ")
    assert "\x1b" not in captured.err
    assert "--help` tells more" in captured.err


def test_the_start_of_an_id_and_latest_name_a_session(view: FakeView, capsys: pytest.CaptureFixture[str]) -> None:
    newer = replace(ENDED, session_id="20260101-000000-abc000", started_seconds=1_800_000_000.0)
    view.listed.append(newer)
    for said, meant in (
        ("2025", ENDED.session_id),
        ("20260101-000000-abcd", LIVE.session_id),
        (LIVE.session_id, LIVE.session_id),
        ("latest", newer.session_id),
    ):
        assert cli.main(["tasks", said]) == 0
        assert view.asked[-1] == meant
    capsys.readouterr()
    assert cli.main(["tasks", "20260101"]) == 2
    err = capsys.readouterr().err
    assert "2 sessions begin with '20260101'" in err
    assert newer.session_id in err
    for nothing in ("", "2019", "../../etc", "%"):
        assert cli.main(["tasks", nothing]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_without_sessions_the_remedy_is_named(view: FakeView, capsys: pytest.CaptureFixture[str]) -> None:
    view.listed.clear()
    for argv in (["tasks"], ["report"], ["tasks", "latest"], ["cancel", "t1"]):
        assert cli.main(argv) == 2
        assert "%load_ext wiseflow_nb" in capsys.readouterr().err
    assert cli.main(["status"]) == 0
    assert cli.main(["sessions", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == []


def test_report_takes_the_newest_that_is_over(
    view: FakeView, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["report"]) == 0
    assert view.asked == [ENDED.session_id]
    assert "It ended in order: closed." in capsys.readouterr().out
    assert cli.main(["report", "2026", "--json"]) == 0
    assert view.asked[-1] == LIVE.session_id
    assert json.loads(capsys.readouterr().out)["causes"][0]["kind"] == "ended"
    page = tmp_path / "report.html"
    assert cli.main(["report", "--html", str(page)]) == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert cli.main(["report", "--html", str(tmp_path / "no" / "x.html")]) == 2
    assert cli.main(["report", "--html", str(page), "--json"]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_status_json_has_stable_keys(view: FakeView, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--json"]) == 0
    (shot,) = json.loads(capsys.readouterr().out)
    assert set(shot) == {
        "session", "time_seconds", "sample", "task_counts", "tasks", "pool", "alerts", "thresholds", "paused",
    }  # fmt: skip
    assert [task["task_id"] for task in shot["tasks"]] == ["t2", "t3", "t4"]
    assert shot["sample"]["cpu_utilization_ratio"] is None


HOSTILE = ("\x1b[31mred\x1b]0;t\x07", "a\nb\x00\x9b31m", "\u202eexe.png", "\ud800", "表" * 500, "x" * 1_000_000, "<b>")


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name[:8]))
@pytest.mark.parametrize("argv", [["tasks"], ["status"], ["sessions"], ["cancel", "t2"]], ids=" ".join)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_hostile_text_is_shown_as_text(
    view: FakeView, capsys: pytest.CaptureFixture[str], name: str, argv: list[str], as_json: bool
) -> None:
    if as_json and argv[0] == "cancel":
        return
    view.tasks[:] = [TaskRecord("t2", name, TaskState.RUNNING, error=name, progress_text=name)]
    view.answer = CommandResult(False, name)
    view.listed[0] = replace(LIVE, title=name, host=name)
    assert cli.main([*argv, *(["--json"] if as_json else [])]) == (1 if argv[0] == "cancel" else 0)
    out = "".join(capsys.readouterr())
    assert [letter for letter in out if not letter.isprintable() and letter != "\n"] == []
    if as_json:
        assert out.isascii()
        (told,) = json.loads(out)[:1]
        assert {
            "tasks": told.get("name"),
            "sessions": told.get("title"),
            "status": told.get("tasks", [{}])[0].get("name"),
        }[argv[0]] == valid_text(name)
    else:
        assert max(map(len, out.splitlines())) < 2100


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, argv: list[str], columns: int) -> list[str]:
    screen = Terminal(io.BytesIO(), encoding="ascii")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", screen)
    assert cli.main(argv) == 0
    screen.seek(0)
    return screen.read().splitlines()


def test_on_a_terminal_tables_fit_and_states_have_colours(view: FakeView, monkeypatch: pytest.MonkeyPatch) -> None:
    view.tasks[0] = replace(view.tasks[0], name="n" * 55, reason="r" * 55)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    coloured = on_a_terminal(monkeypatch, ["tasks"], 100)
    assert "\x1b[32mcompleted\x1b[0m" in coloured[1]
    bare = [re.sub(r"\x1b\[\d+m", "", line) for line in coloured]
    # What the terminal's encoding lacks is escaped, and so is longer.
    assert max(len(line.replace("\\u2026", "…")) for line in bare) <= 100
    monkeypatch.setenv("NO_COLOR", "1")
    assert on_a_terminal(monkeypatch, ["tasks"], 100) == bare
    # An id is never cut: it is what the next command needs.
    assert LIVE.session_id in on_a_terminal(monkeypatch, ["sessions"], 40)[1]
    assert max(map(len, on_a_terminal(monkeypatch, ["report"], 60))) <= 60


def test_elsewhere_nothing_is_cut_and_nothing_coloured(view: FakeView, capsys: pytest.CaptureFixture[str]) -> None:
    view.tasks[0] = replace(view.tasks[0], name="n" * 55, reason="r" * 55)
    assert cli.main(["tasks"]) == 0
    out = capsys.readouterr().out
    assert "n" * 55 in out
    assert "r" * 55 in out
    assert "\x1b" not in out


def test_doctor_tries_everything_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever holds the default port is not this test's business.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WISEFLOW_DASHBOARD_PORT", str(free.getsockname()[1]))
    root = tmp_path / "place"
    old = root / "sessions" / "20200101-000000-abcdef"
    old.mkdir(parents=True, mode=0o700)
    StoreWriter(old / DATABASE_NAME).close()
    assert cli.main(["doctor", "--state-dir", str(root), "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    assert {check["state"] for check in checks} <= {"ok", "warn"}
    assert all(check["remedy"] for check in checks if check["state"] != "ok")
    found = {check["what"]: check["found"] for check in checks}
    assert {"memory", "cpu", "reading", "sessions", "recorder", "sqlite", "kernel", "packages", "dashboard"} <= set(
        found
    )
    assert "a process of its own" in found["recorder"]
    assert f"{root}/sessions" in found["sessions"]
    # Not even a session that is long over is pruned, and the trial directory is gone.
    assert [path.name for path in (root / "sessions").iterdir()] == [old.name]


def test_doctor_tells_what_is_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    for name in ("TMPDIR", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    cli.main(["doctor", "--state-dir", str(blocked), "--json"])
    told = [
        check
        for check in json.loads(capsys.readouterr().out)
        if check["state"] != "ok" and str(blocked) in check["found"]
    ]
    assert told
    assert "STATE_DIR" in told[0]["found"] + told[0]["remedy"]
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 7, 17))
    assert cli.main(["doctor"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fail")]
    assert re.match(r"fail  sqlite +\S+ is older than 3\.24\.0 -> use a newer Python", line)
    monkeypatch.setenv("WISEFLOW_CPU_THRESHOLD", "much")
    assert cli.main(["doctor"]) == 1
    assert "CPU_THRESHOLD" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("versions", "python", "state"),
    [
        (("7.4.0", "1.6.0", "1.7.4"), (3, 11), "ok"),
        (("7.4.0", "1.6.0", ""), (3, 11), "warn"),
        (("6.31.0", "1.6.0", ""), (3, 11), "ok"),
        (("6.31.0", "1.6.0", ""), (3, 14), "warn"),
        (("6.31.0", "", ""), (3, 11), "warn"),
        (("", "1.6.0", "1.7.4"), (3, 11), "warn"),
        (("8.0a1", "1.6.0", "1.7.4"), (3, 14), "ok"),
    ],
)
def test_doctor_knows_which_kernels_lose_cells(
    versions: tuple[str, str, str], python: tuple[int, int], state: str
) -> None:
    check = kernel_check(*versions, python)
    assert check.state == state
    assert bool(check.remedy) == (state != "ok")


def test_arguments_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Settings, dict[str, Any]]] = []
    monkeypatch.setattr(serve, "serve", lambda settings, **options: asked.append((settings, options)))
    argv = ["dashboard", "--port", "5001", "--address", "localhost", "--no-token", "--open", "--base-url", "/x"]
    assert cli.main(argv) == 0
    [(settings, options)] = asked
    assert (settings.dashboard_port, settings.dashboard_address) == (5001, "localhost")
    assert options == {"no_token": True, "open_browser": True, "base_url": "/x"}


def test_a_taken_port_is_one_line_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        assert cli.main(["dashboard", "--port", str(port)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"port {port} on 127.0.0.1 is taken" in captured.err
    assert "--port" in captured.err


def test_airplay_is_named_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    monkeypatch.setattr(sys, "platform", "darwin")
    assert "AirPlay" in serve._port_problem("127.0.0.1", 5000, OSError(errno.EADDRINUSE, "taken"))
    assert "AirPlay" not in serve._port_problem("127.0.0.1", 5001, OSError(errno.EADDRINUSE, "taken"))


def test_open_to_the_network_needs_a_token() -> None:
    with pytest.raises(UsageError, match=r"--no-token on 0\.0\.0\.0"):
        serve.serve(load_settings({"dashboard_address": "0.0.0.0"}), no_token=True)
    assert [serve.is_loopback(item) for item in ("127.0.0.1", "127.0.5.1", "::1", "[::1]", "localhost")] == [True] * 5
    assert [serve.is_loopback(item) for item in ("0.0.0.0", "::", "10.0.0.1", "example.org")] == [False] * 4


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(DashboardError, match="not an address of this machine"):
        serve.check_port("192.0.2.1", 5000)


class FakeKernels:
    def __init__(self) -> None:
        self.kernels: dict[str, Any] = {}
        self._kernel_connections: dict[str, int] = {}
        self._pools: dict[str, list[Any]] = {}

    def add(self, kernel_id: str, connections: int = 0, state: str = "idle") -> None:
        self.kernels[kernel_id] = types.SimpleNamespace(execution_state=state)
        self._kernel_connections[kernel_id] = connections

    def list_kernel_ids(self) -> list[str]:
        return list(self.kernels)

    def get_kernel(self, kernel_id: str) -> Any:
        return self.kernels[kernel_id]


class FakeFuture:
    def __init__(self, kernel_id: str) -> None:
        self.kernel_id = kernel_id

    def done(self) -> bool:
        return True

    def cancelled(self) -> bool:
        return False

    def exception(self) -> None:
        return None

    def result(self) -> dict[str, str]:
        return {"kernel_id": self.kernel_id}


def test_kernels_of_visitors_who_left_are_ended() -> None:
    now = [0.0]
    kernels = FakeKernels()
    sweeper = serve.Sweeper(kernels, lambda: now[0])
    kernels.add("here", connections=1)
    kernels.add("left")
    kernels.add("rendering", state="busy")
    kernels.add("preheated")
    kernels._pools = {"app.ipynb": [FakeFuture("preheated")]}
    assert sweeper.gone() == []
    now[0] = serve.VISITOR_GONE_SECONDS - 1
    assert sweeper.gone() == []
    now[0] += 1
    assert sweeper.gone() == ["left"]
    kernels._kernel_connections["here"] = 0
    kernels._kernel_connections["left"] = 1
    assert sweeper.gone() == []
    now[0] = serve.RENDER_SECONDS
    assert sweeper.gone() == ["here", "rendering"]


def test_text_of_records() -> None:
    assert text.size(NAN) == text.percent(NAN) == text.duration(NAN) == text.moment(NAN) == "-"
    assert [text.size(value) for value in (0, 999, 1500, 2.5e9, 3e12)] == ["0 B", "999 B", "2 kB", "2.5 GB", "3.00 TB"]
    assert text.one_line("a\nb\x1b[31m", 10) == "a b [31m"
    assert text.tasks_text([]) == "no tasks"
    assert text.sessions_text([]) == "no sessions"


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_readme_names_commands_that_exist() -> None:
    named = {word for group in re.findall(r"`wiseflow ([a-z| ]+)`", README) for word in group.replace("|", " ").split()}
    assert named | {"report"} == set(COMMANDS)
    for option in re.findall(r"`(--[a-z-]+)`", README.split("**With pandas")[0].split("**As a page")[1]):
        assert cli._parser().parse_args(["dashboard", option, *(["1"] if option in NEEDS_VALUE else [])])


NEEDS_VALUE = {"--port", "--address", "--token", "--base-url"}


def test_the_readme_tells_the_defaults() -> None:
    rows = [line for line in README.split("## Settings")[1].split("## ")[0].splitlines() if line.startswith("| `")]
    told = {}
    for row in rows:
        names, values = row.strip("|").split("|")[:2]
        found = re.findall(r"`([A-Z_]+)`", names)
        parts = [part.strip() for part in values.split(",")]
        assert len(found) == len(parts), row
        told.update(zip(found, parts, strict=True))
    for name, value in told.items():
        default = Settings.model_fields[name.lower()].default
        if name == "STATE_DIR":
            continue
        word = value.split()[0]
        assert str(default) == word or float(default) == float(word), name
