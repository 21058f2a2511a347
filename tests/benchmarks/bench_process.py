"""Process tasks against ``ProcessPoolExecutor`` and threads; the recorder's schedule beside two busy ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor

import numpy as np

from tests.benchmarks.harness import Bench
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.session import Session
from wiseflow_nb.view import StoreView

TASKS = 300
LOOPS = 6_000_000
SAMPLED_SECONDS = 5.0
STEP_SECONDS = 0.1


def spin(loops: int) -> int:
    total = 0
    for number in range(loops):
        total += number
    return total


def spin_for(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        spin(1000)


def round_trips(executor: Executor) -> Callable[[], float]:
    """Seconds a no-op task, one after the other."""

    def measure() -> float:
        begun = time.perf_counter()
        for number in range(TASKS):
            executor.submit(abs, number).result()
        return (time.perf_counter() - begun) / TASKS

    return measure


def pipelined(executor: Executor) -> Callable[[], float]:
    """Seconds a no-op task, all submitted at once."""

    def measure() -> float:
        begun = time.perf_counter()
        for future in [executor.submit(abs, number) for number in range(TASKS)]:
            future.result()
        return (time.perf_counter() - begun) / TASKS

    return measure


def two_at_once(executor: Executor) -> Callable[[], float]:
    """Seconds for two CPU-bound tasks."""

    def measure() -> float:
        begun = time.perf_counter()
        for future in [executor.submit(spin, LOOPS) for _ in range(2)]:
            future.result()
        return time.perf_counter() - begun

    return measure


def schedule(bench: Bench) -> None:
    """How many of 50 samples at 10 Hz the recorder takes beside two CPU-bound process tasks, and how late."""
    with Session(title="schedule", resource_check_interval=STEP_SECONDS) as session:
        view = session.pool.options(kind="process")
        for future in [view.submit(abs, 1) for _ in range(2)]:
            future.result()
        began = time.time()
        for future in [view.submit(spin_for, SAMPLED_SECONDS) for _ in range(2)]:
            future.result()
        ended = began + SAMPLED_SECONDS
        session.sync()
        store = StoreView(session.directory)
        times = store.rows(began, ended)[:, 1]
        store.close()
    phase = (times % STEP_SECONDS + STEP_SECONDS / 2 - times[0] % STEP_SECONDS) % STEP_SECONDS
    late = phase - phase.min()
    bench.note("recorder beside two process tasks, samples of 50 missing", max(0.0, 50.0 - len(times)), "", goal=1.0)
    bench.note("recorder beside two process tasks, p95 late", float(np.percentile(late, 95)), "s")


def run(bench: Bench) -> None:
    with ThreadPoolManager(max_workers=2) as pool, ProcessPoolExecutor(2) as peer:
        ours = pool.options(kind="process")
        for name, measured in [("round trip", round_trips), ("pipelined", pipelined)]:
            bench.pair(
                f"process task, no-op, {name}",
                measured(ours),
                measured(peer),
                peer_name="ProcessPoolExecutor",
                goal=1.3,
            )
        figure = bench.pair(
            "two CPU-bound tasks, kind='process'",
            two_at_once(ours),
            two_at_once(pool),
            peer_name="threads",
            goal=1 / 1.7,
            rounds=5,
        )
        bench.note("two CPU-bound tasks, threads / process (1.7 wanted)", 1 / figure.ratio, "x")
    schedule(bench)
