"""One sample at a true 1 Hz, four child processes alive: CPU time against what people use today, and the floor.

What the sides do:

- ours: every column of a ``Sample``, over a tree of five processes that stays as it is. Where somebody
  else on the machine started something meanwhile, the tree has to be listed again: such a reading is
  repeated, and told if that did not help. In the second half a process is started and ended before each
  reading (not counted), so that each one lists.
- dask: ``SystemMonitor.update()`` of distributed, as its workers call it; it reads no tree.
- jupyter-resource-usage: its real handler ``ApiHandler.get`` at its default settings, without the web
  server around it.
- floor: the very same system calls as one reading of ours, recorded from it (``pread`` on the same
  descriptors, the listings, ``stat``, ``statvfs``, opening and closing where a file is not kept),
  repeated from a bare loop without looking at a byte. Interpreting what was read, the looks at clocks,
  and everything that makes a sample of it, is ours alone.
"""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import Bench
from wiseflow_nb.resources import _files
from wiseflow_nb.resources._probe import Probe

ROUNDS = 20
#: Two sides in turn, each once a second.
PAUSE = 0.5
CHILDREN = 4
#: So often a reading is repeated that met with somebody else's new process.
TRIES = 6


def run(bench: Bench) -> None:
    """Print CPU seconds a sample, medians of ``ROUNDS`` in turn."""
    children = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(CHILDREN)]
    probe = Probe(os.getpid())
    try:
        assert read(probe).process_count == CHILDREN + 1
        calm = Calm()
        for between, what in ((nothing, ""), (start_something, ", a process started in between")):

            def ours(between: Callable[[], None] = between) -> float:
                if between is nothing:
                    return calm.reading(lambda: cpu_of(lambda: read(probe)))
                between()
                time.sleep(PAUSE)
                return cpu_of(lambda: read(probe))

            for name, side, goal in (
                ("floor", floor(probe, between, calm), 1.5),
                ("SystemMonitor.update", dask_side(between), 0.5),
                ("jupyter-resource-usage's handler", jupyter_side(between), 0.1),
            ):
                # The goals are those of a tree that stays as it is.
                wanted = goal if not what else math.nan
                bench.pair(f"sample / {name}{what}", ours, side, peer_name=name, goal=wanted, rounds=ROUNDS)
            if calm.disturbed and not what:
                print(f"   disturbed by others' new processes: {calm.disturbed} readings", flush=True)
    finally:
        probe.close()
        for child in children:
            child.communicate(b"\n")


class Calm:
    """Readings between which nobody on the machine started a process or a thread."""

    def __init__(self) -> None:
        self.disturbed = 0
        self._newest, self._same = b"", 0

    def reading(self, work: Callable[[], Any]) -> Any:
        """Return what the first ``work`` gives of which that is true, each after a pause."""
        for _ in range(TRIES):
            time.sleep(PAUSE)
            found = work()
            # Not before it: it would find the kernel's own memory warm.
            newest = Path("/proc/loadavg").read_bytes().split()[-1]
            self._same, self._newest = self._same + 1 if newest == self._newest else 0, newest
            # After a change the tree is listed twice.
            if self._same >= 2:
                return found
        self.disturbed += 1
        return found


def read(probe: Probe) -> Any:
    return probe.read(time_seconds=time.time(), monotonic_seconds=time.monotonic(), interval_seconds=1.0, gap=False)


def cpu_of(work: Callable[[], Any]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


def nothing() -> None:
    pass


def start_something() -> None:
    subprocess.run(["true"], check=True)


def floor(probe: Probe, between: Callable[[], None], calm: Calm) -> Callable[[], float]:
    """Repeat the system calls of one reading."""
    if between is nothing:
        # The fewest of some: now and then a reading lists the tree all the same, or opens a file anew.
        calls = min((calm.reading(lambda: recorded_calls(probe)) for _ in range(4)), key=len)
    else:
        # Right after another: its files are open.
        read(probe)
        between()
        calls = recorded_calls(probe)
    print(f"   the floor is {len(calls)} system calls: {', '.join(sorted({name for name, _, _ in calls}))}", flush=True)

    def side() -> float:
        between()
        time.sleep(PAUSE)
        return cpu_of(lambda: [function(*arguments) for _, function, arguments in calls])

    return side


def recorded_calls(probe: Probe) -> list[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """The calls of one reading, with their arguments, as they can be made again."""
    calls: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = []
    watched = [(os, name) for name in ("listdir", "stat", "fstat", "statvfs", "open")]
    watched += [(_files, "pread")]
    real = {(module, name): getattr(module, name) for module, name in watched}

    def recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if name == "open":
                # Opened in passing: opened, read and closed, as it was.
                calls.append((name, lambda *given: os.close(function(*given)), arguments))
            else:
                calls.append((name, function, arguments))
            return function(*arguments)

        return call

    try:
        for (module, name), function in real.items():
            setattr(module, name, recording(name, function))
        read(probe)
    finally:
        for (module, name), function in real.items():
            setattr(module, name, function)
    return calls


def dask_side(between: Callable[[], None]) -> Callable[[], float]:
    from distributed.system_monitor import SystemMonitor

    monitor = SystemMonitor()

    def side() -> float:
        between()
        time.sleep(PAUSE)
        return cpu_of(monitor.update)

    return side


def jupyter_side(between: Callable[[], None]) -> Callable[[], float]:
    from unittest.mock import Mock

    from jupyter_resource_usage.api import ApiHandler
    from jupyter_resource_usage.config import ResourceUseDisplay
    from jupyter_server.auth.identity import User
    from tornado.httputil import HTTPHeaders, HTTPServerRequest
    from tornado.web import Application

    application = Application(jupyter_resource_usage_display_config=ResourceUseDisplay(), base_url="/")
    loop = asyncio.new_event_loop()

    def side() -> float:
        between()
        time.sleep(PAUSE)
        request = HTTPServerRequest("GET", "/api/metrics/v1", headers=HTTPHeaders(), connection=Mock())
        handler = ApiHandler(application, request)
        handler.current_user = User("bench")
        # Parts of it may run on threads of its own.
        started = time.process_time()
        loop.run_until_complete(handler.get())
        spent = time.process_time() - started
        assert b"rss" in b"".join(handler._write_buffer)
        return spent

    return side
