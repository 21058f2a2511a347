"""The command line, without a server: exit codes, one-line errors, JSON, text."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import wiseflow_nb
from wiseflow_nb import cli, text
from wiseflow_nb.config import Settings, load_settings
from wiseflow_nb.dashboard import serve
from wiseflow_nb.errors import DashboardError, SessionNotFoundError, UsageError
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
)

LIVE = SessionInfo("20260101-000000-abcdef", SessionState.LIVE, "etl", "here", 7, 1_700_000_000.0)
ENDED = SessionInfo("20250101-000000-abcdef", SessionState.ENDED, "old", "here", 6, 1_600_000_000.0)


class FakeView:
    def __init__(self, answer: CommandResult) -> None:
        self.answer = answer
        self.cancelled: list[str] = []
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

    def cancel(self, task_id: str) -> CommandResult:
        self.cancelled.append(task_id)
        return self.answer

    def __getattr__(self, name: str) -> Any:
        if name in cli._FRAMES:
            return lambda: pd.DataFrame({"a": [1, 2]}, index=pd.Index([0, 1], name="n"))
        raise AttributeError(name)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> FakeView:
    made = FakeView(CommandResult(True, "task t2 was cancelled"))
    module = types.ModuleType("wiseflow_nb.session")

    def open_session(session_id: str, settings: Settings | None = None) -> FakeView:
        if session_id != LIVE.session_id:
            raise SessionNotFoundError(f"no session {session_id!r};\nwiseflow sessions lists them")
        return made

    module.open_session = open_session  # type: ignore[attr-defined]
    module.sessions = lambda settings=None: [LIVE, ENDED]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wiseflow_nb.session", module)
    return made


def test_version_and_help() -> None:
    run = [sys.executable, "-m", "wiseflow_nb"]
    done = subprocess.run([*run, "--version"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == f"wiseflow {wiseflow_nb.__version__}"
    done = subprocess.run([*run, "--help"], capture_output=True, text=True, check=True, timeout=60)
    for name in ("dashboard", "status", "sessions", "tasks", "cancel", "config", "export", "doctor"):
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
    assert cli.main(["cancel", "nobody"]) == 2
    view.answer = CommandResult(False, "task t3 has ended")
    assert cli.main(["cancel", "t3"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "wiseflow: task t3 has ended"


def test_export_writes_every_frame(view: FakeView, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    assert cli.main(["export", LIVE.session_id, str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == sorted(f"{name}.csv" for name in cli._FRAMES)
    assert len(pd.read_csv(target / "history.csv")) == 2
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    assert cli.main(["export", LIVE.session_id, str(blocked)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


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
    assert named == {"dashboard", "status", "sessions", "tasks", "cancel", "config", "export", "doctor"}
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
