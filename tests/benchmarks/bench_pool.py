"""The pool against ``ThreadPoolExecutor``: time and bytes per task, flat cost, asyncio, and the end."""

from __future__ import annotations

import asyncio
import functools
import gc
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor

from tests.benchmarks.harness import Bench
from wiseflow_nb.futures import to_asyncio
from wiseflow_nb.pool import ThreadPoolManager

TASKS = 100_000
WORKERS = (1, 4, 8)


def noop() -> None:
    """Nothing."""


def one() -> int:
    """A result."""
    return 1


def ours(workers: int) -> Executor:
    return ThreadPoolManager(workers, workers)


def through(make: Callable[[int], Executor], workers: int, fn: Callable[[], object], count: int) -> float:
    """Seconds per task: submit all, then wait for each; the workers are warm."""
    with make(workers) as pool:
        for future in [pool.submit(noop) for _ in range(200)]:
            future.result()
        gc.collect()
        began = time.perf_counter()
        for future in [pool.submit(fn) for _ in range(count)]:
            future.result()
        return (time.perf_counter() - began) / count


def alone(make: Callable[[int], Executor], count: int) -> float:
    """Seconds from a submit to its result, one at a time: the workers sleep in between."""
    with make(4) as pool:
        pool.submit(noop).result()
        began = time.perf_counter()
        for _ in range(count):
            pool.submit(noop).result()
        return (time.perf_counter() - began) / count


def queued_bytes(make: Callable[[int], Executor], count: int) -> float:
    """Bytes per queued task, by tracemalloc: what was allocated and is still held."""
    with make(1) as pool:
        gate = threading.Event()
        pool.submit(gate.wait)
        futures = [None] * count
        gc.collect()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for number in range(count):
                futures[number] = pool.submit(noop)
            held = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        gate.set()
        return held / count


def record_bytes(count: int = 9_000) -> float:
    """Bytes per finished task whose future is dropped: its record."""
    with ThreadPoolManager(1, 1) as pool:
        pool.submit(noop).result()
        gc.collect()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for future in [pool.submit(noop) for _ in range(count)]:
                future.result()
            del future
            return (tracemalloc.get_traced_memory()[0] - before) / count
        finally:
            tracemalloc.stop()


def by_asyncio(wrap: Callable[..., asyncio.Future[None]], count: int) -> float:
    """Seconds per task awaited from a loop, all at once."""

    async def main() -> float:
        with ThreadPoolManager(2, 2) as pool:
            began = time.perf_counter()
            await asyncio.gather(*(wrap(pool.submit(noop)) for _ in range(count)))
            return (time.perf_counter() - began) / count

    return asyncio.run(main())


def stuck_exit() -> float:
    """Seconds from a script's end to the hooks at exit, with a worker that never returns."""
    script = """
import atexit, threading, time
from wiseflow_nb.pool import ThreadPoolManager
entered = threading.Event()
def stuck():
    entered.set()
    threading.Event().wait()
ThreadPoolManager(1, 1).submit(stuck)
entered.wait()
atexit.register(lambda: print(time.monotonic() - began))
began = time.monotonic()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return float(done.stdout)


def flat(count: int, collector: str) -> float:
    """Seconds per task with so many queued; the least of several is taken, since it has no other cause."""
    if collector == "off":
        gc.disable()
    try:
        return through(ours, 4, noop, count)
    finally:
        gc.enable()


def run(bench: Bench) -> None:
    """The pool's figures."""
    peer = functools.partial(through, ThreadPoolExecutor)
    mine = functools.partial(through, ours)
    for workers in WORKERS:
        bench.pair(
            f"pool: no-op task with recording, {workers} workers",
            lambda workers=workers: mine(workers, noop, TASKS),
            lambda workers=workers: peer(workers, noop, TASKS),
            peer_name="ThreadPoolExecutor",
            goal=0.33,
        )
    bench.pair(
        "pool: task with a result, 4 workers",
        lambda: mine(4, one, TASKS),
        lambda: peer(4, one, TASKS),
        peer_name="ThreadPoolExecutor",
    )
    bench.pair(
        "pool: one task at a time",
        lambda: alone(ours, 3_000),
        lambda: alone(ThreadPoolExecutor, 3_000),
        peer_name="ThreadPoolExecutor",
    )
    bench.pair(
        "pool: bytes per queued task (tracemalloc)",
        lambda: queued_bytes(ours, 20_000),
        lambda: queued_bytes(ThreadPoolExecutor, 20_000),
        peer_name="ThreadPoolExecutor",
        unit="B",
        goal=0.25,
        rounds=3,
    )
    bench.note("pool: bytes per finished record (tracemalloc)", record_bytes(), "B")
    bench.pair(
        "pool: awaiting through to_asyncio",
        lambda: by_asyncio(to_asyncio, 10_000),
        lambda: by_asyncio(asyncio.wrap_future, 10_000),
        peer_name="wrap_future",
    )
    # The collector walks over all futures that the caller keeps, whoever made them: so with and without it.
    for collector in ("on", "off"):
        costs = {}
        for count in (1_000, 10_000, 100_000, 1_000_000):
            costs[count] = min(flat(count, collector) for _ in range(25 if count < 100_000 else 3))
            bench.note(f"pool: cost per task, {count:,} queued, collector {collector}", costs[count], "s")
        ratio = costs[1_000_000] / costs[1_000]
        goal = 1.5 if collector == "off" else float("nan")
        bench.note(f"pool: cost per task, 1,000,000 over 1,000, collector {collector}", ratio, "times", goal=goal)
    bench.note("pool: exit with a stuck worker", stuck_exit(), "s", goal=2.0)
