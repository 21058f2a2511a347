"""Records as frames, and frames as files: every table in both formats, whatever its texts hold."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from wiseflow_nb.errors import MissingExtraError, UsageError
from wiseflow_nb.frames import EXPORTS, alert_frame, cell_frame, event_frame, export_frame, task_frame
from wiseflow_nb.records import (
    AlertState,
    AlertTransition,
    CellRecord,
    EventRecord,
    Severity,
    TaskRecord,
    TaskState,
)
from wiseflow_nb.session import Session

HOSTILE = ("<b>&", "\x1b[31m", 'a,"b"\nc', "\ud800", "\x00", "表🙂", "=1+1", "x" * 100_000)
TASKS = [
    TaskRecord(f"t{number}", name, TaskState.FAILED, error=name, dependencies=("t0", name), tags=(name,))
    for number, name in enumerate(HOSTILE)
]
FIRED = AlertTransition(
    "a", "r", "cpu", "fired", AlertState.OK, AlertState.FIRING, Severity.WARNING, 1, 1, 1, 5.0, 6.0, "m",
    top_processes=((1, "python", 2.0, 3.0),),
)  # fmt: skip
FRAMES = {
    "tasks": lambda: task_frame(TASKS),
    "alerts": lambda: alert_frame([FIRED]),
    "cells": lambda: cell_frame([CellRecord("c", 1, HOSTILE[2], 5.0)]),
    "events": lambda: event_frame(
        [EventRecord(5.0, "k", "m", {}), EventRecord(6.0, "k", "m", {"a": [1, "x"], "b": None})]
    ),
    "no tasks": lambda: task_frame([]),
    "no events": lambda: event_frame([]),
}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("name", FRAMES)
def test_every_table_is_written_and_read_back(name: str, suffix: str, tmp_path: Path) -> None:
    frame = FRAMES[name]()
    frame.attrs["versions"] = {"a": object()}
    path = export_frame(frame, tmp_path / f"out{suffix}")
    back = pd.read_csv(path, index_col=0) if suffix == ".csv" else pd.read_parquet(path)
    assert len(back) == len(frame)
    assert list(back.columns) == list(frame.columns)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_lists_and_mappings_are_json(tmp_path: Path) -> None:
    back = pd.read_parquet(export_frame(task_frame(TASKS), tmp_path / "tasks.parquet"))
    assert json.loads(back.dependencies.iloc[0]) == ["t0", "<b>&"]
    assert back.name.tolist() == [name.replace("\ud800", "?") for name in HOSTILE]
    events = pd.read_csv(export_frame(FRAMES["events"](), tmp_path / "events.csv"))
    assert json.loads(events.data.iloc[1]) == {"a": [1, "x"], "b": None}


def test_a_failed_export_leaves_neither_a_part_nor_a_changed_file(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("before")

    class Broken(pd.DataFrame):
        def to_csv(self, *args: object, **kwargs: object) -> None:
            Path(args[0]).write_text("half")
            raise OSError(28, "No space left on device")

        @property
        def _constructor(self) -> type:
            return Broken

    with pytest.raises(OSError, match="No space"):
        export_frame(Broken({"a": [1]}), path)
    assert path.read_text() == "before"
    assert [item.name for item in tmp_path.iterdir()] == ["out.csv"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("fails", [False, True])
def test_two_exports_to_one_path_write_a_part_of_their_own_each(tmp_path: Path, suffix: str, fails: bool) -> None:
    """Both parts are half written at the same time; the file is one of the two, whole."""
    path, both, parts = tmp_path / f"out{suffix}", threading.Barrier(2, timeout=30), []

    class Slow(pd.DataFrame):
        @property
        def _constructor(self) -> type:
            return Slow

        def _write(self, part: Path, write: Callable[[], None]) -> None:
            part.write_text("half")
            parts.append(part)
            both.wait()
            assert part.read_text() == "half"
            if fails and self["a"].iloc[0] == 2:
                raise OSError(28, "No space left on device")
            write()
            both.wait()

        def to_csv(self, part: Path, **options: Any) -> None:
            self._write(part, lambda: super(Slow, self).to_csv(part, **options))

        def to_parquet(self, part: Path, **options: Any) -> None:
            self._write(part, lambda: super(Slow, self).to_parquet(part, **options))

    def export(value: int) -> str:
        try:
            export_frame(Slow({"a": [value] * 1000}), path)
        except (OSError, threading.BrokenBarrierError) as error:
            both.abort()
            return type(error).__name__
        return "written"

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(export, (1, 2)))
    assert len(set(parts)) == 2
    if fails:
        # Who waits for the other in vain fails as well: neither leaves anything.
        assert answers == ["BrokenBarrierError", "OSError"]
        assert list(tmp_path.iterdir()) == []
        return
    assert answers == ["written", "written"]
    assert list(tmp_path.iterdir()) == [path]
    found = pd.read_csv(path) if suffix == ".csv" else pd.read_parquet(path)
    assert len(found) == 1000
    assert found["a"].nunique() == 1


def test_a_wrong_name_and_a_missing_package_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"\.parquet or \.csv"):
        export_frame(task_frame([]), tmp_path / "out.xlsx")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"wiseflow-nb\[parquet\]"):
        export_frame(task_frame([]), tmp_path / "out.parquet")
    assert list(tmp_path.iterdir()) == []


def test_a_session_exports_every_table(tmp_path: Path) -> None:
    with Session(title="exported", resource_check_interval=0.05) as session:
        assert session.tasks.options(name="\x1b[1m<b>").submit(int).result(timeout=10) == 0
        for what in EXPORTS:
            for suffix in ("csv", "parquet"):
                path = session.export(tmp_path / f"{what}.{suffix}", what)
                assert path.stat().st_size > 0
        assert pd.read_parquet(tmp_path / "tasks.parquet").name.tolist() == ["\x1b[1m<b>"]
        with pytest.raises(UsageError, match="history, tasks, alerts, cells, events"):
            session.export(tmp_path / "x.csv", "everything")
