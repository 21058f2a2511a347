"""The record: what it adds to a task, what a command takes, and a file of a million samples and a million tasks."""

from __future__ import annotations

import json
import os
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.benchmarks.harness import Bench
from wiseflow_nb.dashboard._core import CHART_COLUMNS, MAX_POINTS
from wiseflow_nb.recorder._keeper import TRIM_AGAIN_SECONDS
from wiseflow_nb.recorder._rows import batch_line, row_of
from wiseflow_nb.records import (
    NAN,
    SAMPLE_COLUMNS,
    TIER_RETENTION_SECONDS,
    TIER_SECONDS,
    TaskRecord,
    TaskState,
    TaskTransition,
)
from wiseflow_nb.session import Session
from wiseflow_nb.store.commands import open_to_send, patiently
from wiseflow_nb.store.paths import database_uri
from wiseflow_nb.store.schema import TASK_COLUMNS, TRANSITION_COLUMNS
from wiseflow_nb.store.tiers import BUCKET_WIDTH
from wiseflow_nb.store.trim import Trimmer
from wiseflow_nb.store.writer import StoreWriter
from wiseflow_nb.view import StoreView

SAMPLES = TASKS = 1_000_000
BLOCK = 60
NOW = 1_800_000_000.0
#: Some of a million tasks run or wait, since long ago and now.
ALIVE = 2000
SESSIONS = 30


def run(bench: Bench) -> None:
    """Print the figures of the store."""
    with tempfile.TemporaryDirectory(prefix="wiseflow-bench-") as where:
        os.environ["WISEFLOW_STATE_DIR"] = where
        try:
            _hot_path(bench)
            _commands(bench)
            _large_file(bench, Path(where) / "sessions" / "20270115-080000-abcdef")
        finally:
            del os.environ["WISEFLOW_STATE_DIR"]


def _hot_path(bench: Bench) -> None:
    """What a change of a task waits for: it is handed in. Apart from that, what the record costs a task in all."""
    with Session(title="bench") as session:
        record = TaskRecord("t1", "name", TaskState.RUNNING, started_seconds=NOW, rev=1)
        put = session.recorder.put
        transition = object()

        def change() -> None:
            put("task", record)
            put("transition", transition)

        def nothing() -> None:
            return

        def timed(body: Callable[[], None]) -> float:
            # Before the thread that encodes has its turn: its cost is the next figure.
            pending = session.recorder._outbox.pending
            best = 1e9
            for _ in range(20):
                pending.clear()
                began = time.perf_counter()
                for _ in range(200):
                    body()
                best = min(best, (time.perf_counter() - began) / 200)
            pending.clear()
            return best

        with session.recorder._outbox.lock:
            cost = statistics.median(timed(change) - timed(nothing) for _ in range(bench.rounds))
    bench.note("a change of a task handed to the recorder", cost * 1e6, "microseconds", goal=2.0)

    moved = TaskTransition(1, "t1", 1, "pending", TaskState.RUNNING, NOW)

    def encoded() -> float:
        began = time.perf_counter()
        for _ in range(200):
            batch_line(1, (), [record] * 50, [moved] * 50)
        return (time.perf_counter() - began) / 200 / 100

    bench.note("encoding a row of it, on the flushing thread", min(encoded() for _ in range(5)) * 1e6, "microseconds")

    took: dict[bool, list[float]] = {True: [], False: []}

    def tasks(recorded: bool) -> float:
        took[recorded].append(seconds_a_task(recorded))
        return took[recorded][-1]

    def seconds_a_task(recorded: bool) -> float:
        from wiseflow_nb.pool import ThreadPoolManager
        from wiseflow_nb.tasks import TaskManager

        def work(manager: TaskManager) -> float:
            began = time.perf_counter()
            futures = [manager.submit(int) for _ in range(2000)]
            for future in futures:
                future.result()
            return (time.perf_counter() - began) / 2000

        if recorded:
            with Session(title="bench") as session:
                return work(session.tasks)
        with ThreadPoolManager() as pool:
            manager = TaskManager(pool)
            try:
                return work(manager)
            finally:
                manager.shutdown("now")

    bench.pair(
        "2,000 tasks of a session, recorded",
        lambda: tasks(True),
        lambda: tasks(False),
        peer_name="of a task manager alone",
        unit="s/task",
    )
    added = statistics.median(took[True]) - statistics.median(took[False])
    bench.note("what recording adds to a task, all threads together", added * 1e6, "microseconds")


_COMMANDER = """
import json, sys, time
from pathlib import Path
from wiseflow_nb.view import StoreView
view = StoreView(Path(sys.argv[1]), command_timeout=30.0)
view.pause()
view.resume()
took = []
for number in range(20):
    began = time.perf_counter()
    answer = view.pause() if number % 2 else view.resume()
    assert answer.ok, answer.message
    took.append(time.perf_counter() - began)
    # Out of step with the recorder's looks.
    time.sleep(0.013 * (number % 9))
print(json.dumps(took))
"""


#: What the main thread does meanwhile, and how many rounds of Python lie between two system calls. Some
#: milliseconds apart they are the worst case of CPython's lock: each wakes the waiting thread, too late,
#: and begins anew the 5 ms after which it may ask for the lock.
_BUSY = {
    "": 0,
    ", the main thread in pure Python": 200_000,
    ", the main thread with a system call every few milliseconds": 2000,
}


def _commands(bench: Bench) -> None:
    """From the call in a second process to its answer, which is after the session has acted."""
    for what, rounds in _BUSY.items():
        with Session(title="bench") as session:
            arguments = [sys.executable, "-c", _COMMANDER, str(session.directory)]
            child = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
            while rounds and child.poll() is None:
                for _ in range(rounds):
                    sum(range(100))
            out, _ = child.communicate()
        took = sorted(json.loads(out))
        name = f"a command from another process{what}"
        bench.note(name, statistics.median(took) * 1e3, "ms at the median", goal=100.0)
        bench.note(f"{name}, worst of {len(took)}", took[-1] * 1e3, "ms")


def _large_file(bench: Bench, directory: Path) -> None:
    directory.mkdir(parents=True, mode=0o700)
    path = directory / "session.sqlite"
    writer = StoreWriter(path)
    empty = _bytes(writer.connection)
    _fill_samples(writer.connection)
    after_samples = _bytes(writer.connection)
    bench.note("a sample in the file", (after_samples - empty) / SAMPLES, "bytes a row")
    _fill_tasks(writer.connection)
    after_tasks = _bytes(writer.connection)
    bench.note("a task with its transitions in the file", (after_tasks - after_samples) / TASKS, "bytes a row")
    _fill_rest(writer.connection)
    writer.meta("identity", {"host": "elsewhere", "boot_id": "", "pid_namespace": "", "pid": 1, "start_seconds": 0.0})
    writer.meta("heartbeat", NOW)
    writer.meta("started_seconds", NOW - SAMPLES)
    writer.commit()
    writer.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    _fill_sessions(directory.parent)
    _queries(bench, directory)
    _retention(bench, writer)
    writer.close()


def _bytes(connection: sqlite3.Connection) -> int:
    pages, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    return int(pages * size)


@contextmanager
def _bulk(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("BEGIN")
    yield
    connection.execute("COMMIT")
    connection.execute("PRAGMA synchronous = NORMAL")


def _fill_samples(connection: sqlite3.Connection) -> None:
    width = len(SAMPLE_COLUMNS)
    pack = struct.Struct(f"<{width}d")

    def blocks() -> Iterator[tuple[int, float, float, int, bytes]]:
        for first in range(0, SAMPLES, BLOCK):
            count = min(BLOCK, SAMPLES - first)
            at = NOW - SAMPLES + first
            rows = b"".join(pack.pack(at + row, at + row, *([0.5] * (width - 2))) for row in range(count))
            yield 0, at, at + count - 1, count, rows

    def buckets() -> Iterator[tuple[int, float, float, int, bytes]]:
        """A day of 10 s and a week of 60 s: as full as the upper tiers get."""
        for tier, rows in ((1, 60), (2, 30)):
            span, kept = TIER_SECONDS[tier], TIER_RETENTION_SECONDS[tier]
            packed = struct.Struct(f"<{BUCKET_WIDTH}d")
            for first in range(0, int(kept / span), rows):
                data = b""
                for row in range(first, first + rows):
                    at = NOW - kept + row * span
                    value = [at, at, 10.0, 0.0, *([0.5] * (width - 4))]
                    data += packed.pack(*value, *value, *value, *([span] * width))
                yield tier, NOW - kept + first * span, NOW - kept + (first + rows) * span - 1, rows, data

    with _bulk(connection):
        for source in (blocks, buckets):
            connection.executemany(
                "INSERT INTO samples (tier, start_seconds, end_seconds, start_monotonic, end_monotonic, count, data) "
                "VALUES (?1, ?2, ?3, ?2, ?3, ?4, ?5)",
                source(),
            )


def _fill_tasks(connection: sqlite3.Connection) -> None:
    states = ["completed"] * 97 + ["failed", "cancelled", "timed_out"]

    def tasks() -> Iterator[list[object]]:
        for number in range(TASKS):
            at = NOW - TASKS + number
            alive = number % (TASKS // ALIVE) == 0
            state = TaskState("pending" if alive else states[number % 100])
            record = TaskRecord(
                f"t{number:07}", f"step {number % 100}", state, attempt=1,
                created_seconds=at, ready_seconds=at, started_seconds=at, finished_seconds=NAN if alive else at + 0.5,
                queue_seconds=0.01, wall_seconds=0.5, cpu_seconds=0.4, cpu_source="thread_time", rev=number + 1,
            )  # fmt: skip
            _, values = row_of("task", record)
            yield [json.dumps(value) if isinstance(value, (list, tuple)) else value for value in values]

    def transitions() -> Iterator[tuple[object, ...]]:
        moves = (("pending", "running"), ("running", "completed"))
        for number in range(TASKS * 2):
            before, after = moves[number % 2]
            yield number, f"t{number // 2:07}", 1, before, after, NOW - TASKS + number / 2, ""

    with _bulk(connection):
        connection.executemany(
            f"INSERT INTO tasks ({', '.join(TASK_COLUMNS)}) VALUES ({', '.join('?' * len(TASK_COLUMNS))})", tasks()
        )
        connection.executemany(
            f"INSERT INTO transitions ({', '.join(TRANSITION_COLUMNS)}) VALUES ({', '.join('?' * 7)})", transitions()
        )


def _fill_rest(connection: sqlite3.Connection) -> None:
    with _bulk(connection):
        for number in range(100_000):
            at = NOW - 100_000 + number
            connection.execute(
                "INSERT INTO cells (cell_id, number, first_line, started_seconds, finished_seconds, status) "
                "VALUES (?, ?, 'x = 1', ?, ?, 'ok')",
                (f"c{number}", number, at, at + 0.5),
            )
            if number % 10 == 0:
                connection.execute(
                    "INSERT INTO alerts (alert_id, rule, resource, kind, from_state, to_state, severity, value, "
                    "threshold, peak, started_seconds, time_seconds, message, top_processes) VALUES "
                    "(?, 'r', 'cpu', 'fired', 'ok', 'firing', 'warning', 1.0, 1.0, 1.0, ?, ?, 'm', '[]')",
                    (f"a{number}", at, at),
                )
            if number % 50 == 0:
                connection.execute(
                    "INSERT INTO commands (created_seconds, who, verb, arguments, status, ok, message, finished_seconds) "
                    "VALUES (?, 'me', 'pause', '{}', 'done', 1, 'paused', ?)",
                    (at, at),
                )
            if number % 20 == 0:
                connection.execute(
                    "INSERT INTO events (time_seconds, kind, message, data) VALUES (?, 'told', 'm', '{}')", (at,)
                )


def _fill_sessions(root: Path) -> None:
    """The others that a user has: ended ones, as a fortnight leaves them."""
    for number in range(SESSIONS - 1):
        directory = root / f"20270101-{number:06}-abcdef"
        directory.mkdir(mode=0o700)
        writer = StoreWriter(directory / "session.sqlite")
        writer.meta(
            "identity", {"host": "elsewhere", "boot_id": "", "pid_namespace": "", "pid": 1, "start_seconds": 0.0}
        )
        writer.meta("ended_seconds", NOW - number)
        writer.close()


def _queries(bench: Bench, directory: Path) -> None:
    """Each question that a dashboard asks, and its details and lists, as a second process asks it."""
    view = StoreView(directory)
    store = view._store()
    for name, query in {
        "the first snapshot": view.snapshot,
        "a snapshot with 200 changed tasks": lambda: view.snapshot(TASKS - 200),
        "a snapshot with 1,000 changed tasks": lambda: view.snapshot(TASKS - 1000),
        "a snapshot with 1,001 changed tasks": lambda: view.snapshot(TASKS - 1001),
        "a snapshot with 900,000 changed tasks": lambda: view.snapshot(TASKS // 10),
        "a page of 1,000 older tasks": lambda: view.task_records(until_rev=TASKS // 2, limit=1000),
        "the live tasks of a name": lambda: view.unfinished_named("step 0"),
        "one task": lambda: view.task("t0500000"),
        "counts of the tasks": store.task_counts,
        "chart data of 1 h": lambda: view.series(CHART_COLUMNS, NOW - 3600, MAX_POINTS),
        "chart data of 24 h": lambda: view.series(CHART_COLUMNS, NOW - 86_400, MAX_POINTS),
        "chart data of 7 d": lambda: view.series(CHART_COLUMNS, NOW - 604_800, MAX_POINTS),
        "alerts": store.alerts,
        "the newest cells": lambda: store.cells(200),
        "commands": view.commands,
        "the events of 100,000 s": view.events,
        f"the list of {SESSIONS} sessions": view.sessions,
    }.items():
        query()
        took = []
        for _ in range(9):
            began = time.perf_counter()
            query()
            took.append(time.perf_counter() - began)
        bench.note(f"{name}, of a million", statistics.median(took) * 1e3, "ms", goal=20.0)
    view.report()
    began = time.perf_counter()
    view.report()
    bench.note("a report, of a million", (time.perf_counter() - began) * 1e3, "ms")
    view.close()


def _retention(bench: Bench, writer: StoreWriter) -> None:
    """Steps of retention, and a second process' command beside them: how long does each take?"""
    writer.commit()
    # What was filled in without a sync is not to be paid for by the first step.
    os.sync()
    trimmer = Trimmer(86_400.0, 10**12)

    def trim() -> None:
        trimmer.step(writer.connection, NOW)

    def forget() -> None:
        writer.forget_samples(NOW)
        writer.commit()

    # As the recorder paces the steps, and as fast as they go.
    for pace, count, how in ((TRIM_AGAIN_SECONDS, 80, ""), (0.002, 350, ", step upon step")):
        for name, step in (("tasks and their like", trim), ("samples", forget)):
            _steps(bench, writer, step, pace, count, f" of {name}{how}")
    left = writer.connection.execute("SELECT count(*) FROM tasks").fetchone()[0]
    bench.note("rows that the steps of retention have removed", TASKS - left, "tasks")


def _steps(bench: Bench, writer: StoreWriter, step: Callable[[], None], pace: float, count: int, what: str) -> None:
    """Print the longest step, the longest wait of another writer and the longest bare sync of a megabyte meanwhile."""
    stop = threading.Event()
    took: dict[str, list[float]] = {
        f"a step of retention{what}": [],
        f"a writer beside it{what}": [],
        f"the machine's own sync of a megabyte meanwhile{what}": [],
    }
    steps, waits, syncs = took.values()

    def timed(call: Callable[[], object], into: list[float]) -> None:
        began = time.perf_counter()
        call()
        into.append(time.perf_counter() - began)

    def insert() -> None:
        statement = "INSERT INTO commands (created_seconds, who, verb, arguments) VALUES (0, 'me', 'pause', '{}')"
        with closing(open_to_send(database_uri(writer.path, "rw"))) as connection:
            while not stop.wait(0.005):
                timed(lambda: patiently(connection, statement), waits)

    def sync() -> None:
        path, data = writer.path.with_name("bare"), os.urandom(1 << 20)
        with path.open("wb", buffering=0) as file:
            while not stop.wait(0.1):
                file.seek(0)
                file.write(data)
                timed(lambda: os.fsync(file), syncs)

    threads = [threading.Thread(target=target) for target in (insert, sync)]
    for thread in threads:
        thread.start()
    for _ in range(count):
        timed(step, steps)
        time.sleep(pace)
    stop.set()
    for thread in threads:
        thread.join()
    for name, values in took.items():
        goal = NAN if values is syncs else 50.0
        bench.note(f"{name}, the longest of {len(values)}", max(values) * 1e3, "ms", goal=goal)
        bench.note(f"{name}, p99", sorted(values)[int(0.99 * len(values))] * 1e3, "ms")
