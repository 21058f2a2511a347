"""The extension, the magics, cell tracking and run_nested, on a shell in this process and a fake session."""

from __future__ import annotations

import asyncio
import atexit
import gc
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import wiseflow_nb
from wiseflow_nb.config import Settings
from wiseflow_nb.errors import UsageError
from wiseflow_nb.notebook import _nested, run_nested
from wiseflow_nb.notebook._cellcode import CellCode
from wiseflow_nb.notebook._cells import CellMeter, first_line
from wiseflow_nb.records import (
    NAN,
    CellRecord,
    PoolStatus,
    Sample,
    SessionInfo,
    SessionState,
    Snapshot,
    TaskRecord,
    TaskState,
)
from wiseflow_nb.testing import FakeClock


class FakeMonitor:
    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.failing = False

    def sample_now(self) -> Sample:
        if self.failing:
            raise OSError("no /proc here")
        return (
            self.samples.pop(0)
            if self.samples
            else Sample(process_cpu_seconds_total=1.0, process_memory_rss_bytes=50e6)
        )


class FakeView:
    def __init__(self) -> None:
        self.tasks: list[TaskRecord] = []
        self.rows: tuple[list[float], list[float]] = ([], [])

    def snapshot(self, since_rev: int = 0) -> Snapshot:
        info = SessionInfo("20260101-000000-abcdef", SessionState.LIVE, "fake", "here", 1, 0.0)
        return Snapshot(
            info,
            0.0,
            0,
            Sample(cpu_utilization_ratio=0.5),
            tuple(self.tasks),
            {"running": 2},
            PoolStatus(),
            (),
            (),
            {},
            {},
        )

    def task_records(self, *, until_rev: int | None = None, limit: int | None = None) -> tuple[TaskRecord, ...]:
        return tuple(reversed(self.tasks))

    def series(self, columns: Any, since_seconds: float, max_points: int = 3600) -> Any:
        return np.array(self.rows[0]), {columns[0]: np.array(self.rows[1])}


class FakeTasks:
    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.submitted: list[dict[str, Any]] = []

    def options(self, **options: Any) -> FakeTasks:
        self.asked = options
        return self

    def submit(self, fn: Any, *args: Any) -> Future[Any]:
        self.submitted.append(self.asked)
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*(arg.result() if isinstance(arg, Future) else arg for arg in args)))
        except Exception as error:
            future.set_exception(error)
        return future


class FakeSession:
    def __init__(self) -> None:
        self.id = "20260101-000000-abcdef"
        self.settings = Settings()
        self.monitor = FakeMonitor()
        self.view = FakeView()
        self.tasks = FakeTasks()
        self.started: list[CellRecord] = []
        self.finished: list[CellRecord] = []
        self.closed: list[str] = []

    def configure(self, *, source: str = "argument", **changes: Any) -> Settings:
        self.settings = self.settings.replaced(changes, source)
        return self.settings

    def cell_started(self, record: CellRecord) -> None:
        self.started.append(record)

    def cell_finished(self, record: CellRecord) -> None:
        self.finished.append(record)

    def close(self, reason: str = "") -> None:
        self.closed.append(reason)


class Desk:
    """A shell with a fake session behind it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
        self.capsys = capsys
        self.sessions: list[FakeSession] = []
        module = types.ModuleType("wiseflow_nb.session")
        module.start_default = self.start  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "wiseflow_nb.session", module)

    def start(self, **_overrides: Any) -> FakeSession:
        self.sessions.append(FakeSession())
        return self.sessions[-1]

    @property
    def session(self) -> FakeSession:
        return self.sessions[-1]

    def run(self, cell: str) -> tuple[Any, str]:
        result = self.shell.run_cell(cell, store_history=True)
        out, err = self.capsys.readouterr()
        return result, out + err


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Desk]:
    made = Desk(monkeypatch, capsys)
    yield made
    wiseflow_nb.unload_ipython_extension(made.shell)
    atexit.unregister(made.shell.atexit_operations)
    made.shell.atexit_operations()
    InteractiveShell.clear_instance()
    del made
    gc.collect()


@pytest.fixture
def loaded(desk: Desk) -> Desk:
    desk.run("%load_ext wiseflow_nb")
    return desk


def hooks(shell: Any) -> tuple[int, int, bool, bool]:
    events, magics = shell.events.callbacks, shell.magics_manager.magics
    return (
        len(events["pre_run_cell"]),
        len(events["post_run_cell"]),
        "wiseflow" in magics["line"],
        "wiseflow" in magics["cell"],
    )


def test_loading_starts_a_session_and_prints_one_line(desk: Desk) -> None:
    before = hooks(desk.shell)
    _, text = desk.run("%load_ext wiseflow_nb")
    assert text.count("\n") == 1
    assert desk.session.id in text
    assert hooks(desk.shell) == (before[0] + 1, before[1] + 1, True, True)


def test_loading_twice_hooks_once(loaded: Desk) -> None:
    before = hooks(loaded.shell)
    wiseflow_nb.load_ipython_extension(loaded.shell)
    assert hooks(loaded.shell) == before
    assert len(loaded.sessions) == 1


def test_unloading_removes_every_hook_and_closes(desk: Desk) -> None:
    before = hooks(desk.shell)
    desk.run("%load_ext wiseflow_nb")
    desk.run("%unload_ext wiseflow_nb")
    assert hooks(desk.shell) == before
    assert "WiseflowMagics" not in desk.shell.magics_manager.registry
    assert desk.session.closed == ["extension unloaded"]
    wiseflow_nb.unload_ipython_extension(desk.shell)


def test_reloading_leaves_one_of_each(loaded: Desk) -> None:
    before = hooks(loaded.shell)
    loaded.run("%reload_ext wiseflow_nb")
    assert hooks(loaded.shell) == before
    assert [session.closed for session in loaded.sessions] == [["extension unloaded"], []]


def test_every_cell_is_recorded_before_and_after(loaded: Desk) -> None:
    session = loaded.session
    session.monitor.samples = [
        Sample(process_cpu_seconds_total=10.0, process_memory_rss_bytes=100.0),
        Sample(process_cpu_seconds_total=12.5, process_memory_rss_bytes=300.0),
    ]
    number = loaded.shell.execution_count
    loaded.run("\n# the sum\ntotal = 1 + 1")
    [started], [finished] = session.started, session.finished
    assert finished.number == number
    loaded.run("x = 2")
    assert session.started[1].number == session.finished[1].number == number + 1
    assert loaded.shell.execution_count == number + 2
    assert (started.status, started.first_line) == ("running", "# the sum")
    assert finished.cell_id == started.cell_id
    assert finished.status == "ok"
    assert finished.cpu_seconds == 2.5
    assert (finished.rss_before_bytes, finished.rss_after_bytes, finished.rss_peak_bytes) == (100.0, 300.0, 300.0)
    assert finished.finished_seconds == pytest.approx(finished.started_seconds + finished.wall_seconds)


def test_an_error_in_a_cell_is_recorded_and_not_changed(loaded: Desk) -> None:
    result, _ = loaded.run("1 / 0")
    assert isinstance(result.error_in_exec, ZeroDivisionError)
    assert loaded.session.finished[-1].status == "error"
    result, _ = loaded.run("def broken(:")
    assert isinstance(result.error_before_exec, SyntaxError)
    assert len(loaded.session.finished) in (1, 2)


def test_tracking_is_off_by_its_setting(loaded: Desk) -> None:
    loaded.run("%wiseflow config track_cells=false")
    count = len(loaded.session.started)
    loaded.run("x = 1")
    assert len(loaded.session.started) == count


def test_nested_cells_are_matched(loaded: Desk) -> None:
    loaded.run("get_ipython().run_cell('inner = 1'); outer = 2")
    assert [record.first_line[:5] for record in loaded.session.finished] == ["inner", "get_i"]


def test_a_failing_probe_gives_unknown(loaded: Desk) -> None:
    loaded.session.monitor.failing = True
    result, text = loaded.run("x = 1")
    assert result.success
    assert text == ""
    assert np.isnan(loaded.session.finished[-1].cpu_seconds)


def test_peak_and_largest_gap_come_from_the_samples() -> None:
    clock, session = FakeClock(), FakeSession()
    session.monitor.samples = [Sample(process_memory_rss_bytes=100.0), Sample(process_memory_rss_bytes=150.0)]
    meter = CellMeter(session, clock)  # type: ignore[arg-type]
    record = meter.begin(3, "work()")
    start = clock.time()
    session.view.rows = ([start + 1, start + 2, start + 7], [200.0, 900.0, NAN])
    clock.advance(8.0)
    done = meter.end(record, True)
    assert (done.wall_seconds, done.rss_peak_bytes, done.largest_gap_seconds) == (8.0, 900.0, 5.0)


def test_first_line() -> None:
    assert first_line("") == ""
    assert first_line("\n\n  x = 1\ny") == "x = 1"
    assert len(first_line("y" * 500)) == 80


def test_status_and_tasks(loaded: Desk) -> None:
    loaded.session.view.tasks = [TaskRecord("t1", "etl\x1b[2J", TaskState.RUNNING, created_seconds=1.0)]
    _, status = loaded.run("%wiseflow")
    assert "cpu 50 %" in status
    assert "2 running" in status
    _, tasks = loaded.run("%wiseflow tasks")
    assert "t1" in tasks
    assert "\x1b" not in tasks


def test_config_shows_and_changes(loaded: Desk) -> None:
    _, text = loaded.run("%wiseflow config cpu_threshold=80 DISK_THRESHOLD=70")
    assert text == "CPU_THRESHOLD = 80.0, DISK_THRESHOLD = 70.0\n"
    assert loaded.session.settings.source("cpu_threshold") == "%wiseflow config"
    _, text = loaded.run("%wiseflow config")
    assert "CPU_THRESHOLD" in text
    assert "80.0" in text


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("%wiseflow dash", "'dash'"),
        ("%wiseflow config cpu_threshold", "name=value"),
        ("%wiseflow config cpu_threshold=400", "CPU_THRESHOLD='400'"),
        ("%wiseflow config colour=red", "colour"),
        ("%wiseflow status please", "please"),
        ("%wiseflow config 'a=1", "quote"),
        ("%%wiseflow task --priority urgent\nx = 1", "urgent"),
        ("%%wiseflow task --retries many\nx = 1", "many"),
        ("%%wiseflow task --retries -1\nx = 1", "0 or more"),
        ("%%wiseflow task --timeout 0\nx = 1", "seconds"),
        ("%%wiseflow task --after nobody\nx = 1", "nobody"),
        ("%%wiseflow task --to 1x\nx = 1", "1x"),
        ("%%wiseflow status\nx = 1", "'status'"),
    ],
)
def test_a_bad_argument_is_one_clear_line(loaded: Desk, line: str, word: str) -> None:
    result, text = loaded.run(line)
    assert not result.success
    assert type(result.error_in_exec).__name__ == "UsageError"
    assert "Traceback" not in text
    assert word in text
    assert len(text.strip().splitlines()) == 1


def test_stop_and_start(loaded: Desk) -> None:
    _, text = loaded.run("%wiseflow stop")
    assert loaded.session.closed == ["%wiseflow stop"]
    assert {record.cell_id for record in loaded.session.started} == {
        record.cell_id for record in loaded.session.finished
    }
    assert "open_session" in text
    result, text = loaded.run("%wiseflow")
    assert not result.success
    assert "%wiseflow start" in text
    loaded.run("%wiseflow start")
    assert len(loaded.sessions) == 2
    assert loaded.run("x = 1")[0].success


def test_a_cell_as_a_task_works_on_a_copy(loaded: Desk) -> None:
    loaded.run("base = 20\nshared = []")
    result, text = loaded.run(
        "%%wiseflow task --name etl --priority high --timeout 60 --to job\n"
        "base = base + 1\nshared.append('seen')\n_private = 1\ndef double(x):\n    return x * 2\nanswer = double(base)\n"
    )
    assert result.success, text
    names = loaded.shell.user_ns
    assert names["base"] == 20
    assert names["shared"] == ["seen"]
    got = names["job"].result()
    assert set(got) == {"base", "double", "answer"}
    assert got["answer"] == 42
    assert result.result is names["job"]
    assert loaded.session.tasks.submitted == [{"name": "etl", "priority": "high", "timeout": 60.0}]


def test_a_task_after_another_sees_what_it_handed_back(loaded: Desk) -> None:
    loaded.run("%%wiseflow task --name load\nrows = [1, 2, 3]")
    loaded.run("%%wiseflow task --name sum --after load --to total\nout = sum(rows)")
    assert loaded.shell.user_ns["total"].result() == {"out": 6}
    assert "rows" not in loaded.shell.user_ns


def test_a_task_after_one_that_was_submitted_elsewhere_waits_for_the_newest(loaded: Desk) -> None:
    loaded.session.view.tasks = [
        TaskRecord("t2", "load", TaskState.RUNNING, created_seconds=2.0),
        TaskRecord("t1", "load", TaskState.COMPLETED, created_seconds=1.0),
    ]
    loaded.run("%%wiseflow task --after load --after t1\nx = 1")
    assert loaded.session.tasks.submitted[0]["dependencies"] == ["t2", "t1"]


def test_a_syntax_error_in_a_task_is_the_cells_own(loaded: Desk) -> None:
    result, _ = loaded.run("%%wiseflow task --name etl\nx = = 1")
    assert isinstance(result.error_in_exec or result.error_before_exec, SyntaxError)
    assert loaded.session.tasks.submitted == []


def test_cell_code_can_run_again_from_the_same_names() -> None:
    code = CellCode("count = count + 1", "retry", {"count": 1})
    assert code() == code() == {"count": 2}


def test_track_prints_the_cost_and_shows_the_value(loaded: Desk) -> None:
    result, text = loaded.run("%%wiseflow track\nx = 3\nx * 2")
    assert result.result == 6
    assert text.startswith("wall ")
    assert loaded.shell.user_ns["x"] == 3
    result, text = loaded.run("%%wiseflow track\n1 / 0")
    assert isinstance(result.error_in_exec, ZeroDivisionError)
    assert "wall " in text


def on_a_thread(call: Callable[[], Any]) -> Any:
    """Call where no loop runs: a browser's driver may run one on the main thread."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(call).result(timeout=30)


async def _answer() -> int:
    await asyncio.sleep(0)
    return 42


def test_run_nested_without_a_loop() -> None:
    assert on_a_thread(lambda: run_nested(_answer())) == 42


def test_run_nested_refuses_what_is_no_coroutine() -> None:
    with pytest.raises(UsageError, match="call the async function first"):
        run_nested(_answer)  # type: ignore[arg-type]


def test_run_nested_refuses_an_unsound_loop_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nested, "kernel_version", lambda: (7, 4))
    monkeypatch.setattr(_nested, "already_applied", lambda: "nest_asyncio")

    async def main() -> None:
        run_nested(_answer())

    with pytest.raises(UsageError, match="await"):
        on_a_thread(lambda: asyncio.run(main()))


def test_run_nested_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nested, "kernel_version", lambda: (7, 4))
    monkeypatch.setitem(sys.modules, "nest_asyncio2", None)
    monkeypatch.setattr(_nested, "already_applied", lambda: "")

    async def main() -> None:
        run_nested(_answer())

    with pytest.raises(UsageError, match='pip install "nest-asyncio2"'):
        on_a_thread(lambda: asyncio.run(main()))


@pytest.mark.parametrize(
    ("kernel", "python", "expected"),
    [
        (None, (3, 11), "nest_asyncio"),
        ((6, 31), (3, 12), "nest_asyncio"),
        ((7, 0), (3, 11), "nest_asyncio2"),
        ((8, 1), (3, 13), "nest_asyncio2"),
        (None, (3, 14), "nest_asyncio2"),
    ],
)
def test_the_sound_package_is_chosen(kernel: Any, python: Any, expected: str) -> None:
    assert _nested.choose(kernel, python) == expected
