"""Process workers under kills, cancels, stops and time-outs at random: every task ends once, no child is left."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import psutil
import pytest

from wiseflow_nb.context import check_cancelled
from wiseflow_nb.errors import TaskCancelledError, TaskTimeoutError, WorkerLostError
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.tasks import TaskManager

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
ROUNDS, TASKS, TIMED = 20, 180, 20
WAIT = 120.0
#: How long the calls take, most of them as good as nothing.
SECONDS = [0.0] * 20 + [0.002, 0.005, 0.01, 0.05]


def work(path: str, number: int, seconds: float) -> int:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, b"%d\n" % number)
    os.close(fd)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        check_cancelled()
    return number


def kill_one(pool: ThreadPoolManager, futures: list[Future[int]], draw: random.Random) -> None:
    pids = pool.processes.pids()
    if pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice(pids), signal.SIGKILL)


def cancel_some(pool: ThreadPoolManager, futures: list[Future[int]], draw: random.Random) -> None:
    waiting = [future for future in futures if not future.done()]
    for future in waiting[:1] + draw.sample(waiting, min(len(waiting), 3)):
        future.cancel()


def stop_one(pool: ThreadPoolManager, futures: list[Future[int]], draw: random.Random) -> None:
    for future in futures:
        if future.running() and pool.cancel_running(future, "enough"):
            return


def change_size(pool: ThreadPoolManager, futures: list[Future[int]], draw: random.Random) -> None:
    pool.resize(draw.randint(1, 3))


def change_class(pool: ThreadPoolManager, futures: list[Future[int]], draw: random.Random) -> None:
    for future in draw.sample(futures, 5):
        pool.reprioritise(future, draw.randrange(4))


def harass(pool: ThreadPoolManager, futures: list[Future[int]], over: threading.Event, seed: int) -> None:
    """Kill workers, cancel what waits, stop what runs, change size and classes, at random moments."""
    draw = random.Random(seed)
    deeds = [kill_one] * 4 + [cancel_some] * 8 + [stop_one] * 6 + [change_size] * 6 + [change_class] * 4
    draw.shuffle(deeds)
    for deed in deeds:
        if over.wait(draw.uniform(0.001, 0.03)):
            return
        deed(pool, futures, draw)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_every_task_ends_once_and_no_child_is_left(seed: int, tmp_path: Path, switching: random.Random) -> None:
    draw, path, over = switching, tmp_path / "begun", threading.Event()
    ends: Counter[int] = Counter()
    futures: list[Future[int]] = []
    with ThreadPoolManager(min_workers=1, max_workers=3) as pool, TaskManager(pool, max_concurrent=1) as tasks:
        for number in range(TASKS):
            priority = draw.choice(["normal"] * 60 + ["low", "high", "critical"])
            view = pool.options(kind="process", priority=priority)
            futures.append(view.submit(work, str(path), number, draw.choice(SECONDS)))
            if number % 5 == 0:
                futures[-1].add_done_callback(lambda _, number=number: ends.update([number]))
        timed = [
            tasks.options(kind="process", timeout=draw.choice([0.005, 0.02, WAIT])).submit(
                work, str(path), TASKS + number, 0.01
            )
            for number in range(TIMED)
        ]
        futures[0].result(WAIT)
        harasser = threading.Thread(target=harass, args=(pool, futures, over, seed))
        harasser.start()
        try:
            told = [outcome(future) for future in futures]
            late = [outcome(task) for task in timed]
        finally:
            over.set()
            harasser.join(WAIT)
        pids = pool.processes.pids()
        check_sums(pool)
    assert set(told) <= {"done", "never ran", "stopped", "lost"}
    assert set(late) <= {"done", "lost", "timed out"}
    begun = Counter(int(item) for item in path.read_text().split())
    assert set(begun.values()) == {1}, "a call ran twice"
    assert {number for number, end in enumerate(told) if end == "done"} <= set(begun)
    assert not {number for number, end in enumerate(told) if end == "never ran"} & set(begun)
    assert ends == Counter(range(0, TASKS, 5))
    check_sums(pool)
    assert (pool.stats().queued, pool.stats().running) == (0, 0)
    assert pool.processes.pids() == []
    deadline = time.monotonic() + WAIT
    while any(child.pid in pids for child in psutil.Process().children(recursive=True)):
        assert time.monotonic() < deadline, "a child is left"
        time.sleep(0.01)


def check_sums(pool: ThreadPoolManager) -> None:
    stats = pool.stats()
    assert stats.submitted == stats.completed + stats.failed + stats.cancelled + stats.queued + stats.running


@pytest.fixture
def switching(seed: int) -> Iterator[random.Random]:
    """A source of chance for this seed; threads change over at an interval that it has drawn."""
    draw, before = random.Random(seed), sys.getswitchinterval()
    sys.setswitchinterval(draw.choice([1e-5, 1e-4, 5e-3]))
    yield draw
    sys.setswitchinterval(before)


def outcome(future: Any) -> str:
    try:
        future.result(WAIT)
    except WorkerLostError:
        return "lost"
    except TaskTimeoutError:
        return "timed out"
    except TaskCancelledError:
        return "stopped"
    except CancelledError:
        return "never ran"
    return "done"
