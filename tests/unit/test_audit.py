"""What leaks: the pure look at facts, the governor that gathers them, processes left behind."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import psutil
import pytest

from wiseflow_nb.config import Settings
from wiseflow_nb.governor import Governor
from wiseflow_nb.records import SAMPLE_COLUMNS, PoolStatus, Sample, TaskRecord, TaskState
from wiseflow_nb.resources._audit import AuditFacts, Series, find_leaks
from wiseflow_nb.sizing import SizingDecision
from wiseflow_nb.testing import FakeClock


def kinds(facts: AuditFacts) -> list[str]:
    return [finding.kind for finding in find_leaks(facts)]


def series(values: Iterable[float], step: float = 10.0) -> Series:
    numbers = list(values)
    return Series([step * number for number in range(len(numbers))], numbers)


def test_nothing_leaks_where_nothing_does() -> None:
    assert kinds(AuditFacts()) == []
    assert (
        kinds(AuditFacts(workers=8, most_workers=8, memory=series([1e9] * 400), descriptors=series([30.0] * 400))) == []
    )


def test_what_was_never_cleaned_up() -> None:
    found = find_leaks(AuditFacts(cleanup_failures=2, abandoned_tasks=(("t1", "etl"),)))
    assert [(item.kind, item.subject) for item in found] == [("cleanup", "handlers"), ("cleanup", "t1")]
    assert "'etl' was abandoned" in found[1].message


def test_callbacks_that_raised_are_told() -> None:
    (found,) = find_leaks(AuditFacts(callback_failures=2))
    assert (found.kind, found.value) == ("callback", 2.0)
    bench = Bench()
    bench.parts.callback_failures = 3
    assert [finding.value for finding in bench.governor.audit()] == [3.0]


def test_a_thread_is_given_a_minute() -> None:
    assert kinds(AuditFacts(stuck_tasks=(("t1", "loop", 59.0),))) == []
    (finding,) = find_leaks(AuditFacts(stuck_tasks=(("t1", "loop", 61.0),)))
    assert finding.kind == "stuck thread"
    assert "check_cancelled" in finding.message


def test_processes_left_behind_are_told_after_a_minute() -> None:
    facts = AuditFacts(orphans=((7, "server", 100.0), (8, "young", 5.0)), zombies=((9, "done", 61.0),))
    assert [(item.kind, item.subject) for item in find_leaks(facts)] == [
        ("orphan process", "7"),
        ("zombie process", "9"),
    ]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([100.0 + number for number in range(120)], True),
        ([100.0 + number % 50 for number in range(120)], False),
        ([100.0 + number * 0.1 for number in range(120)], False),
        ([100.0 + number for number in range(20)], False),
        ([float("nan") if number % 7 else 100.0 + number for number in range(120)], True),
        ([200.0 - number for number in range(120)], False),
    ],
    ids=["rises", "goes up and down", "too little", "too short", "with holes", "falls"],
)
def test_an_upward_trend_of_descriptors(values: list[float], told: bool) -> None:
    assert (kinds(AuditFacts(descriptors=series(values))) == ["descriptors rising"]) is told


def test_memory_that_only_rises_is_told_by_the_hour() -> None:
    (finding,) = find_leaks(AuditFacts(memory=series(1e9 + number * 1e6 for number in range(360))))
    assert finding.value == pytest.approx(360e6, rel=0.01)
    assert "360 MB an hour" in finding.message


class Parts:
    """A pool, a task manager and a monitor that say what a test says."""

    def __init__(self) -> None:
        self.status_now = PoolStatus(workers=2, busy=0, queued=0, min_workers=2, max_workers=8, target=2)
        self.tasks: list[TaskRecord] = []
        self.cleanup_failures = 0
        self.callback_failures = 0
        self.pending = 0
        self.pending_thread_tasks = 0
        self.hold_reason = ""
        self.sizes: list[int] = []
        self.released = 0
        self.fds: list[float] = []

    def status(self) -> PoolStatus:
        return self.status_now

    def resize(self, workers: int, reason: str = "") -> int:
        self.sizes.append(workers)
        return workers

    def release(self) -> None:
        self.released += 1

    def counts(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for task in self.tasks:
            found[task.state.value] = found.get(task.state.value, 0) + 1
        return found

    def records(self, since_rev: int = 0) -> list[TaskRecord]:
        return self.tasks

    def rows(self, since_seconds: float = 0.0) -> np.ndarray:
        samples = [
            Sample(time_seconds=since_seconds + 10.0 * at, process_open_fds=item) for at, item in enumerate(self.fds)
        ]
        return np.array(samples, dtype="float64").reshape(-1, len(SAMPLE_COLUMNS))

    def calculate_optimal_thread_count(self, pending: int | None = None, workers: int | None = None) -> SizingDecision:
        return SizingDecision(3, "because")


class Bench:
    """A governor whose every look a test makes."""

    def __init__(self, **settings: object) -> None:
        self.clock, self.parts = FakeClock(), Parts()
        self.busy: list[bool] = []
        self.pools: list[PoolStatus] = []
        self.shutdowns: list[float] = []
        self.holds: list[str] = []
        self.events: list[tuple[str, str]] = []
        self.cells = False
        given = Settings(**settings)
        self.governor = Governor(
            monitor=self.parts,
            pool=self.parts,
            tasks=self.parts,
            clock=self.clock,
            settings=lambda: given,
            cells_running=lambda: self.cells,
            tell_busy=self.busy.append,
            tell_pool=self.pools.append,
            tell_hold=self.holds.append,
            tell_shutdown=self.shutdowns.append,
            event=lambda kind, message, **data: self.events.append((kind, message)),
        )

    def look(self, after: float = 0.0) -> None:
        self.clock.advance(after)
        self.governor.look()


def test_a_look_sizes_the_pool_and_tells_what_changed() -> None:
    bench = Bench()
    bench.look()
    bench.look(1.0)
    bench.parts.status_now = replace(bench.parts.status_now, busy=1)
    bench.parts.pending = 1
    bench.look(1.0)
    assert bench.parts.sizes == [3, 3, 3]
    assert bench.busy == [False, False, True]
    assert [status.busy for status in bench.pools] == [0, 1]


def test_of_two_threads_that_tell_of_the_pool_the_one_that_read_it_last_has_the_last_word() -> None:
    bench = Bench()
    first, later = (replace(bench.parts.status_now, queued=queued) for queued in (1, 0))
    other = threading.Thread(target=bench.governor.tell_pool)

    def tell(status: PoolStatus) -> None:
        if status == first:
            # It drains while the first is still telling, and the other thread sees that.
            bench.parts.status_now = later
            other.start()
            other.join(0.3)
        bench.pools.append(status)

    bench.governor._tell_pool = tell
    bench.parts.status_now = first
    bench.governor.tell_pool()
    other.join()
    assert bench.pools == [first, later]


def test_why_no_task_starts_is_told_when_it_changes() -> None:
    bench = Bench()
    for reason in ("", "memory is critical", "memory is critical", ""):
        bench.parts.hold_reason = reason
        bench.look(1.0)
    assert bench.holds == ["memory is critical", ""]


def test_each_finding_is_one_event_until_it_is_gone() -> None:
    bench = Bench(audit_interval=60.0)
    bench.parts.tasks = [TaskRecord("t1", "loop", TaskState.CANCELLING)]
    for _ in range(10):
        bench.look(30.0)
    assert [kind for kind, _ in bench.events] == ["audit"]
    assert "'loop' was asked to stop" in bench.events[0][1]
    bench.parts.tasks = []
    bench.look(60.0)
    bench.parts.tasks = [TaskRecord("t1", "loop", TaskState.CANCELLING)]
    for _ in range(4):
        bench.look(60.0)
    assert [kind for kind, _ in bench.events] == ["audit", "audit"]


def test_an_audit_can_be_switched_off_and_asked_for() -> None:
    bench = Bench(audit_interval=0.0)
    bench.parts.cleanup_failures = 1
    bench.parts.fds = [100.0 + number for number in range(200)]
    for _ in range(10):
        bench.look(60.0)
    assert bench.events == []
    assert [finding.kind for finding in bench.governor.audit()] == ["cleanup", "descriptors rising"]


IDLE = {"auto_shutdown_enabled": True, "auto_shutdown_idle_time": 100.0, "auto_shutdown_check_interval": 10.0}


def test_idle_is_announced_a_check_before_and_work_calls_it_off() -> None:
    bench = Bench(**IDLE)
    for _ in range(9):
        bench.look(10.0)
    assert [kind for kind, _ in bench.events] == ["idle_shutdown_soon"]
    assert bench.shutdowns == [bench.clock.time() + 10.0]
    bench.cells = True
    bench.look(5.0)
    assert [kind for kind, _ in bench.events] == ["idle_shutdown_soon", "idle_shutdown_off"]
    assert math.isnan(bench.shutdowns[-1])
    bench.cells = False
    bench.look(89.0)
    assert bench.parts.released == 0
    bench.look(5.0)
    bench.look(11.0)
    assert [kind for kind, _ in bench.events][2:] == ["idle_shutdown_soon", "idle_shutdown"]
    assert bench.parts.released == 1
    for _ in range(50):
        bench.look(10.0)
    assert bench.parts.released == 1  # once, until work comes again
    bench.parts.pending = 1
    bench.look(1.0)
    bench.parts.pending = 0
    for _ in range(12):
        bench.look(10.0)
    assert bench.parts.released == 2


def test_a_person_who_commands_is_not_idle() -> None:
    bench = Bench(**IDLE)
    for _ in range(9):
        bench.look(10.0)
    bench.governor.not_idle()
    for _ in range(9):
        bench.look(10.0)
    assert [kind for kind, _ in bench.events] == ["idle_shutdown_soon", "idle_shutdown_off", "idle_shutdown_soon"]
    assert bench.parts.released == 0


def test_a_look_that_comes_late_stops_nothing_unannounced() -> None:
    bench = Bench(**IDLE)
    bench.look(5000.0)
    assert [kind for kind, _ in bench.events] == ["idle_shutdown_soon"]
    bench.look(9.0)
    assert bench.parts.released == 0
    bench.look(2.0)
    assert bench.parts.released == 1


@pytest.mark.parametrize("wanted", [True, False])
def test_the_kernel_is_stopped_only_where_that_is_asked_for(wanted: bool) -> None:
    bench, stopped = Bench(**IDLE, auto_shutdown_kernel=wanted), []
    bench.governor.stop_kernel = lambda: stopped.append(1)
    for _ in range(12):
        bench.look(10.0)
    assert stopped == ([1] if wanted else [])
    assert ("kernel" in bench.events[0][1]) is wanted


def test_idleness_is_nothing_where_it_is_not_enabled() -> None:
    bench = Bench()
    for _ in range(100):
        bench.look(600.0)
    assert bench.events == []
    assert bench.parts.released == 0


@pytest.mark.skipif(not hasattr(os, "getsid"), reason="signals and process groups are POSIX")
def test_orphans_and_zombies_of_a_kernel_are_found() -> None:
    """A process that leads its session, as a kernel does, with a child that it does not reap and an orphan."""
    code = textwrap.dedent(
        """
        import os, sys, time
        from wiseflow_nb.resources import _orphans
        if os.fork() == 0:
            os._exit(0)
        if os.fork() == 0:
            if os.fork() == 0:
                os.close(1), os.close(2)
                time.sleep(60)
                os._exit(0)
            os._exit(0)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            dead, lone = _orphans.zombies(os.getpid()), _orphans.orphans(os.getpid())
            if len(dead) == 2 and lone:
                break
            time.sleep(0.02)
        print(len(dead), len(lone), lone[0][0], flush=True)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, start_new_session=True, check=True
    )
    dead, lone, pid = (int(word) for word in done.stdout.split())
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    assert (dead, lone) == (2, 1)
