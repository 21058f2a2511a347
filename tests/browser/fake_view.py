"""A session that is not there: a ``SessionView`` with made-up, moving data, for tests of the dashboard."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from wiseflow_nb.config import Settings
from wiseflow_nb.errors import ConfigurationError
from wiseflow_nb.records import (
    NAN,
    AlertState,
    AlertView,
    CellRecord,
    CommandResult,
    PoolStatus,
    Priority,
    Sample,
    SessionInfo,
    SessionState,
    Severity,
    Snapshot,
    TaskRecord,
    TaskState,
)

NAMES = ("resize images", "train fold", "sync bucket", "index docs", "compress logs", "embed corpus", "score batch")
EVIL = '<img src=x onerror="window.hacked=1"><b>bold</b>'
GIB = 1024.0**3


class FakeView:
    """One fake session. ``calls`` holds the verbs used; ``log`` is a file that gets them too, a line each."""

    def __init__(
        self,
        tasks: int = 400,
        *,
        session_id: str = "nb-7f3a",
        state: SessionState = SessionState.LIVE,
        title: str = "train-model.ipynb",
        log: str | Path | None = None,
        now: Callable[[], float] = time.time,
        moving: bool = True,
    ) -> None:
        self.now = now
        self.moving = moving
        self.log = log
        self.calls: list[tuple[Any, ...]] = []
        self.watches = 0
        self.closed = False
        self.fail: Exception | None = None
        self.settings = Settings()
        self.paused = False
        self.shutdown_at = NAN
        self.acknowledged: set[str] = set()
        self.lock = threading.Lock()
        self.started = now() - 7200
        self.born = now() if state is SessionState.LIVE else now() - 600
        self.state = state
        ended = NAN if state is SessionState.LIVE else now() - 600
        self.info = SessionInfo(
            session_id,
            state,
            title,
            "workstation",
            4242,
            self.started,
            ended,
            ended,
            "memory: cgroup2:/a, cpu: cgroup1:/b",
        )
        self.others: dict[str, FakeView] = {}
        self.rev = 0
        #: So many of the tasks are left out of a first picture: to be asked for page by page.
        self.older = 0
        self.tasks: dict[str, TaskRecord] = {}
        self._random = random.Random(7)
        for number in range(tasks):
            self._add(number, tasks)

    def _add(self, number: int, total: int) -> None:
        now = self.now()
        name = EVIL if number == 2 else f"{NAMES[number % len(NAMES)]} #{number}"
        common: dict[str, Any] = {
            "name": name,
            "priority": Priority(self._random.choice((0, 1, 1, 1, 2, 2, 3))),
            "created_seconds": now - 900 + number * 0.01,
            "dependencies": (f"t{number - 1:05d}",) if number % 9 == 5 else (),
        }
        share = number / max(1, total)
        if number < 6:
            state, more = (
                TaskState.RUNNING,
                {"started_seconds": now - 30 - 13 * number, "queue_seconds": 0.4, "attempt": 1},
            )
            more["progress"] = NAN if number == 3 else 0.1 + number / 9
        elif share < 0.3:
            state, more = TaskState.PENDING, {"ready_seconds": now - 300}
        elif share < 0.33:
            state, more = TaskState.WAITING, {}
        elif number % 29 == 0:
            state = TaskState.FAILED
            more = {
                "error": "ValueError: cannot reshape array of size 12 into shape (5,)",
                "traceback": 'Traceback (most recent call last):\n  File "train.py", line 12, in fit\nValueError: cannot reshape',
                "output_tail": "epoch 1 loss 0.41\nepoch 2 loss 0.39\n",
                "attempt": 3,
                "max_attempts": 3,
            }
        elif number % 41 == 0:
            state, more = TaskState.CANCELLED, {"reason": "cancelled by the user", "attempt": 1}
        else:
            state, more = TaskState.COMPLETED, {"progress": 1.0, "attempt": 1}
        if state.terminal:
            wall = self._random.uniform(0.2, 90)
            more |= {"queue_seconds": 1.5, "wall_seconds": wall, "cpu_seconds": wall * 0.8, "cpu_source": "thread_time"}
            more |= {"started_seconds": now - 800, "finished_seconds": now - 800 + wall}
        self.rev += 1
        task_id = f"t{number:05d}"
        self.tasks[task_id] = TaskRecord(task_id=task_id, state=state, rev=self.rev, **common, **more)

    def _change(self, task_id: str, **changes: Any) -> None:
        self.rev += 1
        self.tasks[task_id] = replace(self.tasks[task_id], rev=self.rev, **changes)

    # -- reading ----------------------------------------------------------------------------------

    def values(self, times: np.ndarray) -> dict[str, np.ndarray]:
        wave = np.sin(times / 47.0)
        noise = np.modf(np.abs(np.sin(times * 12.9898)) * 43758.5453)[0]
        burst = (np.modf(times / 400.0)[0] > 0.82) * 0.35
        return {
            "cpu_utilization_ratio": np.clip(0.38 + 0.14 * wave + 0.16 * (noise - 0.5) + burst, 0, 1),
            "memory_utilization_ratio": 0.6 + 0.06 * np.sin(times / 300.0) + 0.01 * noise,
            "filesystem_utilization_ratio": 0.57 + times * 0,
            "disk_read_bytes_per_second": np.maximum(0, 22e6 * np.sin(times / 60.0) + 18e6 * noise),
            "disk_written_bytes_per_second": np.maximum(0, 9e6 * np.sin(times / 60.0 + 2) + 8e6 * noise),
            "network_receive_bytes_per_second": 2.4e6 * (1 + wave) * noise,
            "network_transmit_bytes_per_second": 0.6e6 * (1 - wave) * noise,
        }

    def snapshot(self, since_rev: int = 0) -> Snapshot:
        if self.fail is not None:
            raise self.fail
        with self.lock:
            now = self.now()
            end = now if self.state is SessionState.LIVE else self.info.ended_seconds
            if self.state is SessionState.LIVE:
                self.info = replace(self.info, last_seen_seconds=now)
            if self.moving and self.state is SessionState.LIVE and not self.paused:
                for number in range(min(6, len(self.tasks))):
                    task = self.tasks[f"t{number:05d}"]
                    if task.state is TaskState.RUNNING and not math.isnan(task.progress):
                        self._change(task.task_id, progress=min(0.99, task.progress + 0.004), cpu_seconds=number + 3.0)
            one = {name: float(column[0]) for name, column in self.values(np.array([float(int(end))])).items()}
            sample = Sample(
                time_seconds=end,
                cpu_limit_cores=0.5,
                cpu_utilization_ratio=one["cpu_utilization_ratio"],
                memory_limit_bytes=23.4 * GIB,
                memory_working_set_bytes=23.4 * GIB * one["memory_utilization_ratio"],
                memory_utilization_ratio=one["memory_utilization_ratio"],
                filesystem_size_bytes=330 * GIB,
                filesystem_avail_bytes=143 * GIB,
                filesystem_utilization_ratio=0.57,
            )
            counts = Counter(task.state.value for task in self.tasks.values())
            pool = PoolStatus(6, 5, 112, 2, self.settings.max_thread_workers, 6, "memory allows 6")
            return Snapshot(
                info=self.info,
                time_seconds=now,
                rev=self.rev,
                sample=sample,
                tasks=tuple(task for task in self.tasks.values() if task.rev > (since_rev or self.older)),
                older_rev=0 if since_rev else self.older,
                task_counts=dict(counts),
                pool=pool,
                alerts=self._alerts(end, one["cpu_utilization_ratio"]),
                cells=self._cells(),
                settings=self.settings.public_values(),
                thresholds=self.settings.thresholds(),
                paused=self.paused,
                shutdown_at_seconds=self.shutdown_at,
            )

    def _alerts(self, end: float, cpu: float) -> tuple[AlertView, ...]:
        def alert(key: str, resource: str, severity: Severity, start: float, stop: float, value: float) -> AlertView:
            level = (
                self.settings.critical_ratio(resource)
                if severity is Severity.CRITICAL
                else self.settings.warning_ratio(resource)
            )
            state = AlertState.FIRING if math.isnan(stop) else AlertState.OK
            text = f"{resource.upper() if resource == 'cpu' else resource.capitalize()} over {level:.0%} of its limit"
            peak = value + 0.06
            return AlertView(
                key,
                f"{resource}_threshold",
                resource,
                severity,
                state,
                value,
                level,
                peak,
                start,
                stop,
                text,
                key in self.acknowledged,
            )

        ended = end if self.state is not SessionState.LIVE else NAN
        return (
            alert("a1", "memory", Severity.WARNING, self.started + 4000, self.started + 4180, 0.71),
            alert("a2", "cpu", Severity.WARNING, self.born - 420, self.born - 360, 0.78),
            alert("a3", "cpu", Severity.CRITICAL, self.born - 95, ended, max(0.9, cpu)),
        )

    def _cells(self) -> tuple[CellRecord, ...]:
        begin = self.born
        return (
            CellRecord("c11", 11, "df = load()", begin - 700, begin - 560, 140.0),
            CellRecord("c12", 12, "fit(df)", begin - 400, begin - 330, 70.0, status="error"),
            CellRecord("c13", 13, "score(model)", begin - 130),
        )

    def series(
        self, columns: Sequence[str], since_seconds: float, max_points: int = 3600
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        if self.fail is not None:
            raise self.fail
        end = self.now() if self.state is SessionState.LIVE else self.info.ended_seconds
        first = math.ceil(max(since_seconds, self.started))
        step = max(1, math.ceil((end - first) / max_points))
        times = np.arange(first, end, step, dtype=np.float64)
        found = self.values(times)
        return times, {name: found[name] for name in columns}

    def task_records(self, *, until_rev: int | None = None, limit: int | None = None) -> tuple[TaskRecord, ...]:
        found = sorted(self.tasks.values(), key=lambda task: -task.rev)
        return tuple(task for task in found if until_rev is None or task.rev <= until_rev)[:limit]

    def task(self, task_id: str) -> TaskRecord | None:
        return self.tasks.get(task_id)

    def sessions(self) -> list[SessionInfo]:
        return [self.info, *(view.info for view in self.others.values())]

    def open(self, session_id: str) -> FakeView:
        return self.others[session_id]

    def watch(self, seconds: float = 10.0) -> None:
        self.watches += 1

    # -- verbs ------------------------------------------------------------------------------------

    def _call(self, *call: Any) -> None:
        self.calls.append(call)
        if self.log is not None:
            with Path(self.log).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(call) + "\n")

    def cancel(self, task_id: str) -> CommandResult:
        self._call("cancel", task_id)
        with self.lock:
            self._change(task_id, state=TaskState.CANCELLED, reason="cancelled from the dashboard", wall_seconds=3.0)
        return CommandResult(True, f"cancelled {task_id}")

    def retry(self, task_id: str) -> CommandResult:
        self._call("retry", task_id)
        return CommandResult(True, f"submitted {task_id} again")

    def reprioritise(self, task_id: str, priority: str) -> CommandResult:
        self._call("reprioritise", task_id, priority)
        with self.lock:
            self._change(task_id, priority=Priority.parse(priority))
        return CommandResult(True, f"{task_id} has priority {priority} now")

    def pause(self) -> CommandResult:
        self._call("pause")
        self.paused = True
        return CommandResult(True, "paused: running tasks go on, no other starts")

    def resume(self) -> CommandResult:
        self._call("resume")
        self.paused, self.shutdown_at = False, NAN
        return CommandResult(True, "resumed")

    def configure(self, changes: Mapping[str, Any]) -> CommandResult:
        self._call("configure", dict(changes))
        try:
            self.settings = self.settings.replaced(changes)
        except ConfigurationError as error:
            return CommandResult(False, str(error))
        return CommandResult(
            True, "changed " + ", ".join(f"{name.upper()} to {value}" for name, value in changes.items())
        )

    def acknowledge(self, alert_id: str) -> CommandResult:
        self._call("acknowledge", alert_id)
        self.acknowledged.add(alert_id)
        return CommandResult(True, "acknowledged")

    def silence(self, alert_id: str, seconds: float) -> CommandResult:
        self._call("silence", alert_id, seconds)
        return CommandResult(True, f"silent for {seconds:.0f} s")

    def close(self) -> None:
        self.closed = True


def fake_family(tasks: int = 400, log: str | Path | None = None, older: int = 0) -> FakeView:
    """A live session that knows an ended and a crashed one; ``older`` tasks come by pages alone."""
    view = FakeView(tasks, log=log)
    view.older = older
    for session_id, state, title in (
        ("nb-0001", SessionState.ENDED, "etl.ipynb"),
        ("nb-0002", SessionState.CRASHED, "big-join.ipynb"),
    ):
        view.others[session_id] = FakeView(40, session_id=session_id, state=state, title=title, log=log)
    return view
