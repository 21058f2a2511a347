"""Calls that are handed ahead to a busy worker process: each runs once, where and when it would have anyway."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from wiseflow_nb.context import check_cancelled, current_task
from wiseflow_nb.errors import TaskCancelledError
from wiseflow_nb.pool import ThreadPoolManager, _process_worker
from wiseflow_nb.pool._process_wire import dump_call, frame, unread
from wiseflow_nb.pool._process_worker import Ahead, WorkerProcess

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing is handed ahead elsewhere")
WAIT = 60.0


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)


def act(path: str, what: str, number: int) -> int:
    """Note that it began; then do as told. One function for all: only calls of the same are handed ahead."""
    with open(path, "a") as file:
        file.write(f"{number}\n")
    if what == "hold":
        while not os.path.exists(f"{path}.go"):
            check_cancelled()
            time.sleep(0.001)
    elif what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "fail":
        raise ValueError(number)
    elif what == "print":
        print(f"this is {number}")
        os.write(2, b"and this as well\n" * (number % 3))
    elif what == "grow":
        current_task().progress(0.5, f"half of {number}")
    elif what == "big":
        return len(bytearray(30_000_000).replace(b"\0", b"\1"))
    return number


class Watch:
    """Counts what was handed ahead and what was taken back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.handed = self.back = 0
        start, back = WorkerProcess.start_ahead, WorkerProcess.take_back

        def start_ahead(worker: WorkerProcess, calls: Sequence[tuple[Ahead, str, str, bytes]]) -> int:
            count = start(worker, calls)
            self.handed += count
            return count

        def take_back(worker: WorkerProcess, ahead: Ahead) -> None:
            before = len(worker._ahead)
            back(worker, ahead)
            self.back += before - len(worker._ahead)

        monkeypatch.setattr(WorkerProcess, "start_ahead", start_ahead)
        monkeypatch.setattr(WorkerProcess, "take_back", take_back)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


@pytest.fixture
def pool() -> Iterator[ThreadPoolManager]:
    with ThreadPoolManager(min_workers=1, max_workers=1) as made:
        yield made


class Calls:
    """The calls of one test, and what they noted."""

    def __init__(self, pool: ThreadPoolManager, path: Path) -> None:
        self.path = path
        self._pool = pool
        self.futures: list[Future[int]] = []

    def submit(self, *whats: str, priority: str = "normal", **options: Any) -> list[Future[int]]:
        view = self._pool.options(kind="process", priority=priority, **options)
        made = []
        for what in whats:
            made.append(view.submit(act, str(self.path), what, len(self.futures)))
            self.futures.append(made[-1])
        return made

    def begun(self) -> list[int]:
        return [int(item) for item in self.path.read_text().split()] if self.path.exists() else []

    def go(self) -> None:
        Path(f"{self.path}.go").touch()

    def states(self) -> list[str]:
        told = []
        for future in self.futures:
            if future.cancelled():
                told.append("never ran")
            else:
                error = future.exception(WAIT)
                told.append("done" if error is None else type(error).__name__)
        return told


@pytest.fixture
def calls(pool: ThreadPoolManager, tmp_path: Path) -> Iterator[Calls]:
    made = Calls(pool, tmp_path / "begun")
    yield made
    made.go()  # or a test that fails would leave the pool waiting


def test_short_calls_of_one_function_are_handed_ahead_in_their_order(calls: Calls, watch: Watch) -> None:
    calls.submit(*["quick"] * 100)
    assert calls.states() == ["done"] * 100
    assert calls.begun() == list(range(100))
    assert watch.handed > 0


def test_a_worker_that_dies_takes_its_own_call_alone(calls: Calls, pool: ThreadPoolManager, watch: Watch) -> None:
    whats = ["die" if number % 10 == 5 else "quick" for number in range(30)]
    calls.submit(*whats)
    assert calls.states() == ["WorkerLostError" if what == "die" else "done" for what in whats]
    assert calls.begun() == list(range(30))
    assert watch.handed > 0
    stats = pool.stats()
    assert (stats.submitted, stats.completed, stats.failed, stats.queued, stats.running) == (30, 27, 3, 0, 0)


def test_a_worker_that_is_killed_takes_its_own_call_alone(calls: Calls, pool: ThreadPoolManager) -> None:
    calls.submit(*["quick"] * 9, "hold", *["quick"] * 9)
    wait_until(lambda: 9 in calls.begun())
    os.kill(pool.processes.pids()[0], signal.SIGKILL)
    assert calls.states() == ["done"] * 9 + ["WorkerLostError"] + ["done"] * 9
    assert calls.begun() == list(range(19))


def test_what_was_handed_ahead_is_cancelled_as_anything_that_waits(calls: Calls, watch: Watch) -> None:
    calls.submit(*["quick"] * 9, "hold", *["quick"] * 9)
    wait_until(lambda: 9 in calls.begun())
    wait_until(calls.futures[9].running)  # the worker begins it before the kernel hears of it
    assert [future.cancel() for future in calls.futures[9:14]] == [False, True, True, True, True]
    calls.go()
    assert calls.states() == ["done"] * 10 + ["never ran"] * 4 + ["done"] * 5
    assert calls.begun() == [*range(10), *range(14, 19)]


def test_a_cancel_at_any_moment_is_one_thing_or_the_other(calls: Calls, pool: ThreadPoolManager) -> None:
    for _ in range(20):
        first = len(calls.futures)
        calls.submit(*["quick"] * 40)
        for future in calls.futures[: first - 1 : -1]:
            future.cancel()
    states = calls.states()
    ran = [number for number, state in enumerate(states) if state == "done"]
    assert set(states) <= {"done", "never ran"}
    assert sorted(calls.begun()) == ran
    stats = pool.stats()
    assert (stats.completed, stats.cancelled, stats.queued) == (len(ran), 800 - len(ran), 0)


def test_a_call_that_is_stopped_leaves_those_behind_it_alone(calls: Calls, pool: ThreadPoolManager) -> None:
    calls.submit(*["quick"] * 9, "hold", *["quick"] * 9)
    wait_until(lambda: 9 in calls.begun())
    assert pool.cancel_running(calls.futures[9], "enough")
    assert calls.states() == ["done"] * 9 + ["TaskCancelledError"] + ["done"] * 9
    assert calls.begun() == list(range(19))


def test_stops_and_kills_among_short_calls_hit_whom_they_are_for(calls: Calls, pool: ThreadPoolManager) -> None:
    for _ in range(20):
        first = len(calls.futures)
        calls.submit(*["quick"] * 30)
        for future in calls.futures[first:]:
            pool.cancel_running(future, "enough")
    for future in calls.futures:
        error = future.exception(WAIT)
        assert error is None or isinstance(error, TaskCancelledError)
    begun = calls.begun()
    assert len(begun) == len(set(begun))
    assert {number for number, future in enumerate(calls.futures) if future.exception() is None} <= set(begun)


def test_what_is_higher_comes_first_though_others_were_handed_ahead(calls: Calls) -> None:
    calls.submit(*["quick"] * 9, "hold", *["quick"] * 9)
    wait_until(lambda: 9 in calls.begun())
    calls.submit("quick", priority="high")
    calls.go()
    assert calls.states() == ["done"] * 20
    assert calls.begun() == [*range(10), 19, *range(10, 19)]


def test_a_call_behind_a_long_one_runs_where_a_worker_is_free(tmp_path: Path) -> None:
    with ThreadPoolManager(min_workers=2, max_workers=2) as pool:
        calls = Calls(pool, tmp_path / "begun")
        calls.submit(*["quick"] * 40, "hold", *["quick"] * 40)
        for future in calls.futures[41:]:
            future.result(WAIT)
        wait_until(calls.futures[40].running)
        calls.go()
        assert calls.states() == ["done"] * 81
        assert sorted(calls.begun()) == list(range(81))


def test_a_shrink_takes_back_what_the_surplus_worker_had_ahead(tmp_path: Path) -> None:
    with ThreadPoolManager(min_workers=1, max_workers=3) as pool:
        calls = Calls(pool, tmp_path / "begun")
        for size in [3, 1, 2, 1, 3] * 10:
            calls.submit(*["quick"] * 20)
            pool.resize(size)
        assert calls.states() == ["done"] * 1000
        assert sorted(calls.begun()) == list(range(1000))


def test_behind_a_call_that_fails_nothing_begins_before_its_cleanup_is_over(calls: Calls, watch: Watch) -> None:
    begun: list[list[int]] = []
    whats = ["fail" if number % 7 == 5 else "quick" for number in range(70)]
    calls.submit(*whats, cleanup=lambda: begun.append(calls.begun()))
    assert calls.states() == ["ValueError" if what == "fail" else "done" for what in whats]
    assert calls.begun() == list(range(70))
    assert begun == [list(range(number + 1)) for number, what in enumerate(whats) if what == "fail"]
    assert watch.handed > 0


def test_each_call_keeps_its_own_output_progress_and_figures(calls: Calls, pool: ThreadPoolManager) -> None:
    whats = [("quick", "print", "quick", "grow", "print", "print")[number % 6] for number in range(120)]
    told: list[tuple[int, str]] = []
    view = pool.options(kind="process")
    for number, what in enumerate(whats):
        future = view.submit(act, str(calls.path), what, number)
        future.task_context()._on_progress = lambda share, text, number=number: told.append((number, text))
        calls.futures.append(future)
    assert calls.states() == ["done"] * 120
    for number, (what, future) in enumerate(zip(whats, calls.futures, strict=True)):
        remote = future.task_context().remote
        said = f"this is {number}\n" + "and this as well\n" * (number % 3) if what == "print" else ""
        assert remote.output_tail == said
        assert remote.source == "process"
    assert told == [(number, f"half of {number}") for number, what in enumerate(whats) if what == "grow"]


def test_peak_memory_stays_each_call_s_own(calls: Calls, pool: ThreadPoolManager) -> None:
    whats = ["big" if number % 10 == 5 else "quick" for number in range(40)]
    calls.submit(*whats)
    assert calls.states() == ["done"] * 40
    rows = pool.records()
    for what, peak in zip(whats, rows.memory_peak_bytes, strict=True):
        assert peak > 80e6 if what == "big" else peak < 60e6
    assert set(rows.cpu_source) == {"process"}
    assert rows.started.is_monotonic_increasing


def test_a_directory_that_changed_is_where_the_next_call_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolManager(min_workers=1, max_workers=1) as pool:
        view = pool.options(kind="process")
        for number in range(5):
            here = tmp_path / str(number)
            here.mkdir()
            monkeypatch.chdir(here)
            assert [future.result(WAIT) for future in [view.submit(os.getcwd) for _ in range(20)]] == [str(here)] * 20


def test_large_arguments_and_functions_made_here_go_in_their_turn(pool: ThreadPoolManager) -> None:
    view = pool.options(kind="process")
    data = os.urandom(300_000)
    factor = 3
    futures = [view.submit(lambda x: len(x) if isinstance(x, bytes) else x * factor, n) for n in range(30)]
    assert [future.result(WAIT) for future in futures] == [3 * n for n in range(30)]

    def both(x: Any) -> int:
        return len(x) if isinstance(x, bytes) else x * factor

    given = [data if number % 5 == 4 else number for number in range(60)]
    futures = [view.submit(both, x) for x in given]
    assert [future.result(WAIT) for future in futures] == [both(x) for x in given]


def test_a_callback_that_takes_its_time_holds_nothing_back_but_its_worker(tmp_path: Path) -> None:
    go = threading.Event()
    with ThreadPoolManager(min_workers=2, max_workers=2) as pool:
        calls = Calls(pool, tmp_path / "begun")
        calls.submit("hold")
        wait_until(lambda: calls.begun())
        calls.submit(*["quick"] * 30)
        calls.futures[0].add_done_callback(lambda _: go.wait(WAIT))
        calls.go()
        for future in calls.futures[1:]:
            future.result(WAIT)
        go.set()
    assert calls.states() == ["done"] * 31


# -- one worker by itself --------------------------------------------------------------------


class Hand:
    """A call as a worker knows it."""

    def __init__(self, worker: WorkerProcess) -> None:
        self.worker: WorkerProcess | None = worker
        self.sent = False


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    made = WorkerProcess()
    yield made
    made.kill()


def sent(path: Path, what: str, number: int) -> bytes:
    return dump_call(act, (str(path), what, number), {})


def hand(worker: WorkerProcess, path: Path, *numbers: int) -> list[Hand]:
    hands = [Hand(worker) for _ in numbers]
    calls = [(made, "p", "act", sent(path, "quick", number)) for made, number in zip(hands, numbers, strict=True)]
    assert worker.start_ahead(calls) == sum(made.sent for made in hands)
    return hands


def alone() -> bool:
    return True


def begun_at(path: Path) -> list[int]:
    return [int(item) for item in path.read_text().split()]


def test_calls_are_taken_back_though_the_one_before_has_not_begun(
    worker: WorkerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_process_worker, "AHEAD_SECONDS", WAIT)
    path = tmp_path / "begun"
    worker.start("p", "act", 1, sent(path, "quick", 0))  # the process is only starting
    first, second = hand(worker, path, 1, 2)
    worker.take_back(second)
    assert (first.worker, first.sent, second.worker, second.sent) == (None, False, None, False)
    (third,) = hand(worker, path, 3)
    assert worker.wait(no_progress, alone).ok
    worker.go_on(third)
    assert worker.wait(no_progress, alone).ok
    worker.take_back(third)
    assert third.worker is worker, "it had begun"
    assert begun_at(path) == [0, 3]


def test_what_was_taken_back_before_it_was_sent_is_not_sent(worker: WorkerProcess, tmp_path: Path) -> None:
    path = tmp_path / "begun"
    worker.start("p", "act", 1, sent(path, "quick", 0))
    early, late = Hand(worker), Hand(worker)
    worker.take_back(late)
    assert late.worker is None
    calls = [(made, "p", "act", sent(path, "quick", number)) for number, made in enumerate([early, late, early], 1)]
    assert worker.start_ahead(calls) == 1


def test_behind_a_call_that_takes_longer_nothing_is_left(worker: WorkerProcess, tmp_path: Path) -> None:
    path = tmp_path / "begun"
    worker.start("p", "act", 1, sent(path, "hold", 0))
    (behind,) = hand(worker, path, 1)

    def left_alone() -> bool:
        worker.take_back(behind)
        Path(f"{path}.go").touch()  # it does not end before
        return behind.worker is None

    assert worker.wait(no_progress, left_alone).ok
    assert behind.worker is None
    assert begun_at(path) == [0]


def test_a_worker_that_has_gone_on_is_not_stopped_for_the_call_before(worker: WorkerProcess, tmp_path: Path) -> None:
    path = tmp_path / "begun"
    worker.start("p", "act", 1, sent(path, "hold", 0))

    def left_alone() -> bool:
        Path(f"{path}.go").touch()
        return False

    worker.stop("too late")
    reply = worker.wait(no_progress, left_alone)
    assert (reply.ok, reply.cancelled, reply.reusable) == (True, False, True)


def test_a_stop_that_is_heard_before_its_call_is_begun_is_not_lost(worker: WorkerProcess, tmp_path: Path) -> None:
    path = tmp_path / "begun"
    worker.start("p", "act", 1, sent(path, "quick", 0))
    assert worker.wait(no_progress, alone).ok
    os.write(worker._control, frame((2, "enough")))
    wait_until(lambda: not unread(worker._control))
    worker.start("p", "act", 1, sent(path, "hold", 1))
    reply = worker.wait(no_progress, alone)
    assert (reply.ok, reply.cancelled, reply.reusable) == (False, True, True)


def test_nothing_is_handed_ahead_that_is_large_or_after_a_change_of_directory(
    worker: WorkerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "begun"
    worker.start("p", "act", 1, sent(path, "quick", 0))
    large = Hand(worker)
    assert worker.start_ahead([(large, "p", "act", sent(path, "x" * 5000, 1))]) == 0
    assert not large.sent
    monkeypatch.chdir(tmp_path)
    assert not hand(worker, path, 2)[0].sent
    monkeypatch.undo()
    assert hand(worker, path, 3)[0].sent


def test_nothing_is_handed_ahead_behind_a_large_call(worker: WorkerProcess, tmp_path: Path) -> None:
    worker.start("p", "act", 1, sent(tmp_path / "begun", "x" * 5000, 0))
    assert not hand(worker, tmp_path / "begun", 1)[0].sent
    assert worker.wait(no_progress, alone).ok


def no_progress(share: float, text: str) -> None:
    raise AssertionError("none was told")
