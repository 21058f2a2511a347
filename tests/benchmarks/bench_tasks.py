"""Tasks against what people use without them: asyncio.gather, run_in_executor, graphlib."""

from __future__ import annotations

import asyncio
import gc
import graphlib
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from tests.benchmarks.harness import Bench
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.tasks import TaskManager

COUNT = 10_000
WORKERS = 4
Graph = dict[int, list[int]]


async def nothing(*_: object) -> None:
    pass


def plain(*_: object) -> None:
    pass


@contextmanager
def timed(found: list[float]) -> Iterator[None]:
    # Garbage of the round before is not this one's.
    gc.collect()
    begun = time.perf_counter()
    yield
    found.append(time.perf_counter() - begun)


def measured(work: Callable[[], Any]) -> float:
    found: list[float] = []
    with timed(found):
        work()
    return found[0]


# -- single tasks ------------------------------------------------------------------------------------


def coroutine_tasks() -> float:
    with TaskManager(max_concurrent=WORKERS) as tasks:

        def work() -> None:
            made = [tasks.submit(nothing) for _ in range(COUNT)]
            for task in made:
                task.result()

        return measured(work)


def gathered() -> float:
    async def work() -> None:
        await asyncio.gather(*[nothing() for _ in range(COUNT)])

    with asyncio.Runner() as runner:
        runner.get_loop()
        return measured(lambda: runner.run(work()))


def called_tasks() -> float:
    with ThreadPoolManager(WORKERS, WORKERS) as pool, TaskManager(pool, max_concurrent=WORKERS) as tasks:

        def work() -> None:
            made = [tasks.submit(plain) for _ in range(COUNT)]
            for task in made:
                task.result()

        return measured(work)


def executed() -> float:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*[loop.run_in_executor(pool, plain) for _ in range(COUNT)])

    with ThreadPoolExecutor(WORKERS) as pool, asyncio.Runner() as runner:
        runner.get_loop()
        return measured(lambda: runner.run(work()))


# -- graphs ------------------------------------------------------------------------------------------


def graph(nodes: int) -> Graph:
    """Each node depends on up to three earlier ones."""
    rng = random.Random(7)
    return {node: sorted({rng.randrange(node) for _ in range(3)}) if node else [] for node in range(nodes)}


def tasks_over(edges: Graph, fn: Callable[..., Any]) -> float:
    with ThreadPoolManager(WORKERS, WORKERS) as pool, TaskManager(pool, max_concurrent=WORKERS) as tasks:

        def work() -> None:
            made: list[Any] = []
            for node, parents in edges.items():
                made.append(tasks.submit(fn, node, *[made[parent] for parent in parents]))
            tasks.drain()

        return measured(work)


def graphlib_asyncio(edges: Graph) -> float:
    async def work() -> None:
        sorter = graphlib.TopologicalSorter(edges)
        sorter.prepare()
        running: set[asyncio.Task[None]] = set()
        nodes: dict[asyncio.Task[None], int] = {}
        while sorter.is_active():
            for node in sorter.get_ready():
                task = asyncio.ensure_future(nothing(node))
                nodes[task] = node
                running.add(task)
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            sorter.done(*[nodes.pop(task) for task in done])

    with asyncio.Runner() as runner:
        runner.get_loop()
        return measured(lambda: runner.run(work()))


def graphlib_threads(edges: Graph) -> float:
    def work() -> None:
        sorter = graphlib.TopologicalSorter(edges)
        sorter.prepare()
        running: set[Any] = set()
        nodes: dict[Any, int] = {}
        while sorter.is_active():
            for node in sorter.get_ready():
                future = pool.submit(plain, node)
                nodes[future] = node
                running.add(future)
            done, running = wait(running, return_when=FIRST_COMPLETED)
            sorter.done(*[nodes.pop(future) for future in done])

    with ThreadPoolExecutor(WORKERS) as pool:
        return measured(work)


# -- many --------------------------------------------------------------------------------------------


def per_queued_task(count: int) -> float:
    """Seconds a task, submitted while nothing runs and then run."""
    with TaskManager(max_concurrent=WORKERS) as tasks:
        tasks.pause()

        def work() -> None:
            for _ in range(count):
                tasks.submit(nothing)
            tasks.resume()
            tasks.drain()

        return measured(work) / count


def bytes_per_task(count: int = 20_000) -> tuple[float, float]:
    """What a queued and a finished task hold, as tracemalloc counts it."""
    gc.collect()
    tracemalloc.start()
    with TaskManager(max_concurrent=WORKERS) as tasks:
        tasks.pause()
        tasks.submit(nothing)
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(count):
            tasks.submit(nothing)
        queued = tracemalloc.get_traced_memory()[0] - before
        tasks.resume()
        tasks.drain()
        gc.collect()
        finished = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return queued / count, finished / count


def frames(bench: Bench, rows: int = 100_000, changed: int = 100) -> None:
    import pandas as pd

    with TaskManager(max_concurrent=WORKERS) as tasks:
        tasks.pause()
        made = [tasks.submit(nothing) for _ in range(rows)]
        tasks.frame()
        rounds = iter(range(1_000_000))

        def patched() -> float:
            for task in made[next(rounds) % 7 :: rows // changed]:
                tasks.reprioritise(task.id, next(rounds) % 4)
            return measured(tasks.frame)

        def rebuilt() -> float:
            return measured(lambda: pd.DataFrame([asdict(record) for record in tasks.records()]))

        bench.pair(
            "task frame, 100,000 rows, 100 changed", patched, rebuilt, peer_name="rebuilt", goal=1 / 50, rounds=3
        )
        tasks.shutdown("cancel_pending")


def run(bench: Bench) -> None:
    """Print every figure of the tasks."""
    bench.pair("coroutine task, all features", coroutine_tasks, gathered, peer_name="asyncio.gather", goal=0.8)
    bench.pair("plain callable as a task", called_tasks, executed, peer_name="run_in_executor", goal=0.25)
    for nodes, rounds in ((10_000, 5), (100_000, 3)):
        edges = graph(nodes)
        told = f"DAG of {nodes:,} nodes"
        bench.pair(
            f"{told}, coroutines",
            lambda edges=edges: tasks_over(edges, nothing),
            lambda edges=edges: graphlib_asyncio(edges),
            peer_name="graphlib + asyncio",
            goal=0.8,
            rounds=rounds,
        )
        bench.pair(
            f"{told}, plain calls",
            lambda edges=edges: tasks_over(edges, plain),
            lambda edges=edges: graphlib_threads(edges),
            peer_name="graphlib + ThreadPoolExecutor",
            goal=0.8,
            rounds=rounds,
        )
    bench.pair(
        "cost per task with 1,000,000 queued",
        lambda: per_queued_task(1_000_000),
        lambda: per_queued_task(1_000),
        peer_name="with 1,000",
        rounds=1,
        goal=2.0,
    )
    queued, finished = bytes_per_task()
    bench.note("bytes per queued task", queued, "bytes")
    bench.note("bytes per finished task", finished, "bytes")
    frames(bench)
