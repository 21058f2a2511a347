"""Linux' files and psutil tell the same of real processes, wherever the probe runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from wiseflow_nb.records import SAMPLE_COLUMNS, Sample
from wiseflow_nb.resources._probe import LINUX_FILES, PSUTIL, Probe
from wiseflow_nb.session import Session

PATHS = [
    pytest.param(
        False,
        id="files",
        marks=pytest.mark.skipif(sys.platform != "linux", reason="compares Linux' own files with psutil"),
    ),
    pytest.param(True, id="psutil"),
]
CHILDREN, THREADS, FILES, BALLAST = 4, 3, 10, 48 * 2**20
#: What the kernel counts lazily, for each CPU and process: resident pages. See ``Probe``.
RESIDENT_SLACK = 32 * 4096 * (os.cpu_count() or 1) * 3
TICK = 0.01

_TOP = """
import os, subprocess, sys, threading, time
count, running, opened, ballast = map(int, sys.argv[1:])
LEAF = "print(1, flush=True); input()"
BRANCH = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {LEAF!r}], stdout=subprocess.PIPE); "
BRANCH += "p.stdout.readline(); print(1, flush=True); p.wait()"
def start(code):
    # It has said something: its start is over, its memory grows no more.
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    children.append(child)
children = []
for _ in range(count): start(LEAF)
stop = threading.Event()
threads = [threading.Thread(target=stop.wait, daemon=True) for _ in range(running)]
for thread in threads: thread.start()
files = [open(os.devnull) for _ in range(opened)]
ballast = bytearray(os.urandom(1024) * ballast)
print(*[child.pid for child in children], flush=True)
for line in sys.stdin:
    what, _, given = line.strip().partition(" ")
    if what == "end":
        children.pop(0).communicate(b"\\n")
    elif what == "start":
        # From a thread that stays: its children hang under it, not under the first one.
        started = threading.Event()
        threading.Thread(target=lambda: (start(BRANCH), started.set(), stop.wait()), daemon=True).start()
        started.wait()
    elif what == "spend":
        end = time.process_time() + float(given)
        while time.process_time() < end: pass
    print("done", flush=True)
for child in children: child.communicate(b"\\n")
"""


@dataclass
class Tree:
    top: subprocess.Popen[str]
    children: list[int]

    @property
    def pid(self) -> int:
        return self.top.pid

    def do(self, what: str) -> None:
        assert self.top.stdin is not None
        assert self.top.stdout is not None
        self.top.stdin.write(what + "\n")
        self.top.stdin.flush()
        assert self.top.stdout.readline().strip() == "done"


@pytest.fixture
def tree() -> Iterator[Tree]:
    sizes = map(str, (CHILDREN, THREADS, FILES, BALLAST // 1024))
    top = subprocess.Popen(
        [sys.executable, "-c", _TOP, *sizes], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert top.stdout is not None
    made = Tree(top, [int(item) for item in top.stdout.readline().split()])
    yield made
    grand = list(psutil.Process(top.pid).children(recursive=True)) if top.poll() is None else []
    top.communicate()
    for child in grand:
        if child.is_running():
            child.kill()


@pytest.fixture
def probes() -> Iterator[Callable[..., Probe]]:
    made: list[Probe] = []

    def make(*arguments: Any, **options: Any) -> Probe:
        # On a loaded machine a look at every process can be dear, and is taken less often then.
        made.append(Probe(*arguments, timer=lambda: 0.0, **options))
        return made[-1]

    yield make
    for probe in made:
        probe.close()


def read(probe: Probe) -> Sample:
    return probe.read(time_seconds=time.time(), monotonic_seconds=time.monotonic(), interval_seconds=1.0, gap=False)


def truth(pid: int) -> dict[str, float]:
    """The tree by way of psutil's other calls, or of nothing but the process table."""
    members = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    times = [member.cpu_times() for member in members]
    return {
        "process_count": len(members),
        "process_threads": sum(len(member.threads()) for member in members),
        "process_open_fds": getattr(members[0], "num_fds", lambda: math.nan)(),
        "process_memory_rss_bytes": sum(member.memory_info().rss for member in members),
        "process_cpu_seconds_total": sum(
            item.user + item.system + getattr(item, "children_user", 0) + getattr(item, "children_system", 0)
            for item in times
        ),
    }


def assert_true(sample: Sample, known: dict[str, float]) -> None:
    for name in ("process_count", "process_threads", "process_open_fds"):
        assert getattr(sample, name) == pytest.approx(known[name], nan_ok=True), name
    slack = RESIDENT_SLACK * known["process_count"]
    assert sample.process_memory_rss_bytes == pytest.approx(known["process_memory_rss_bytes"], rel=0.02, abs=slack)
    ticks = TICK * 2 * known["process_count"]
    assert sample.process_cpu_seconds_total == pytest.approx(known["process_cpu_seconds_total"], abs=ticks)


@pytest.mark.parametrize("portable", PATHS)
def test_a_tree_of_processes_is_counted(tree: Tree, probes: Callable[..., Probe], portable: bool) -> None:
    probe = probes(tree.pid, portable=portable)
    assert probe.path == (PSUTIL if portable or sys.platform != "linux" else LINUX_FILES)
    first = read(probe)
    assert_true(first, truth(tree.pid))
    assert first.process_count == 1 + CHILDREN
    assert first.process_threads >= 1 + CHILDREN + THREADS
    assert first.process_memory_rss_bytes > BALLAST
    # One starts under a thread, with a child of its own; it is there at the very next reading.
    tree.do("start")
    second = read(probe)
    assert_true(second, truth(tree.pid))
    assert second.process_count == 3 + CHILDREN
    # One ends: its time is not lost, its memory is.
    tree.do("end")
    third = read(probe)
    assert_true(third, truth(tree.pid))
    assert third.process_count == 2 + CHILDREN
    if sys.platform == "linux":
        assert third.process_cpu_seconds_total >= second.process_cpu_seconds_total
    tree.do("spend 0.3")
    assert read(probe).process_cpu_seconds_total >= third.process_cpu_seconds_total + 0.29
    assert probe.take_events() == []


@pytest.mark.parametrize("portable", PATHS)
def test_what_is_excluded_goes_with_its_children(tree: Tree, probes: Callable[..., Probe], portable: bool) -> None:
    whole = probes(tree.pid, portable=portable)
    part = probes(tree.pid, portable=portable, exclude_pids=frozenset(tree.children[:2]))
    assert read(whole).process_count == read(part).process_count + 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody takes over the time of those that ended")
@pytest.mark.parametrize("portable", PATHS)
@pytest.mark.parametrize("waited", [True, False], ids=["waited for", "not waited for"])
def test_what_is_excluded_leaves_no_time_behind(
    probes: Callable[..., Probe], portable: bool, waited: bool, tmp_path: Path
) -> None:
    spend = "import time\nwhile time.process_time() < {}: pass\nprint(flush=True); input()"
    script = f"""
import signal, subprocess, sys
if {not waited}:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
children = [
    subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for text in ({spend.format(0.6)!r}, {spend.format(0.3)!r})
]
for child in children:
    child.stdout.readline()
print(*(child.pid for child in children), flush=True)
for child in children:
    input()
    child.communicate(b"\\n")
    print("ended", flush=True)
input()
"""
    top = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert top.stdin is not None
    assert top.stdout is not None
    try:
        excluded, _ = map(int, top.stdout.readline().split())
        probe = probes(top.pid, portable=portable, exclude_pids=frozenset({excluded}))
        found = [read(probe).process_cpu_seconds_total for _ in range(3)]
        for _ in range(2):
            top.stdin.write("\n")
            top.stdin.flush()
            assert top.stdout.readline() == "ended\n"
            found += [read(probe).process_cpu_seconds_total for _ in range(3)]
    finally:
        top.communicate("\n")
    before, without, after = found[2], found[3:6], found[6:]
    # The end of the excluded one takes no half second along; less than none is never told.
    assert all(before <= value < before + 0.2 for value in without)
    # The other's own is kept, if its parent took it over.
    assert all((value >= before) == waited for value in after)
    assert probe.take_events() == []


@pytest.mark.parametrize("portable", PATHS)
def test_the_end_is_told_once_and_nothing_of_the_rest_is_lost(
    tree: Tree, probes: Callable[..., Probe], portable: bool
) -> None:
    probe = probes(tree.pid, portable=portable)
    before = read(probe)
    tree.top.communicate()
    later = [read(probe) for _ in range(5)]
    for sample in later:
        assert all(math.isnan(getattr(sample, name)) for name in SAMPLE_COLUMNS if name.startswith("process_"))
        assert sample.memory_limit_bytes == before.memory_limit_bytes
        assert sample.network_receive_bytes_total >= before.network_receive_bytes_total
    assert [event.message for event in probe.take_events()] == [
        f"processes cannot be read: process {tree.pid} has ended"
    ]
    assert probe.top_processes() == ()


@pytest.mark.parametrize("portable", PATHS)
def test_every_column_but_those_of_a_group_is_filled(probes: Callable[..., Probe], portable: bool) -> None:
    probe = probes(os.getppid(), portable=portable)
    read(probe)
    deadline = time.monotonic() + 30.0
    while math.isnan((sample := read(probe)).cpu_utilization_ratio):
        # The kernel counts in ticks: two readings within one have no rate.
        assert time.monotonic() < deadline
        time.sleep(0.02)
    missing = {name for name in SAMPLE_COLUMNS if math.isnan(getattr(sample, name))}
    allowed = {"disk_read_bytes_total", "disk_written_bytes_total"}
    if sys.platform != "linux":
        allowed |= {"process_memory_pss_bytes", "process_open_fds"}
        allowed |= {name for name in SAMPLE_COLUMNS if name.startswith(("system_cpu_io", "system_cpu_st"))}
    # Permission to look into another's memory is not everybody's.
    allowed |= {"process_memory_pss_bytes"}
    assert {name for name in missing if not name.startswith(("container_", "pressure_"))} <= allowed


@pytest.mark.skipif(sys.platform != "linux", reason="compares Linux' own files with psutil")
def test_both_paths_tell_the_same(tree: Tree, probes: Callable[..., Probe]) -> None:
    fast, portable = probes(tree.pid), probes(tree.pid, portable=True)
    before, other, after = read(fast), read(portable), read(fast)
    same = [
        name for name in SAMPLE_COLUMNS if name.endswith(("limit_bytes", "limit_cores", "total_bytes", "size_bytes"))
    ]
    same += ["process_count", "process_threads", "process_open_fds"]
    for name in same:
        assert getattr(before, name) == getattr(other, name) == getattr(after, name), name
    # What only grows lies between the two readings around it; the units of both are ticks at the best.
    growing = [name for name in SAMPLE_COLUMNS if name.endswith("_total") and not name.startswith("recorder_")]
    for name in growing:
        low, value, high = getattr(before, name), getattr(other, name), getattr(after, name)
        if not math.isnan(low):
            assert low - TICK * before.process_count <= value <= high + TICK * before.process_count, name
    slack = RESIDENT_SLACK * before.process_count
    assert other.process_memory_rss_bytes == pytest.approx(before.process_memory_rss_bytes, rel=0.02, abs=slack)
    assert other.process_memory_pss_bytes == pytest.approx(before.process_memory_pss_bytes, rel=0.02)
    assert other.system_load1 == pytest.approx(before.system_load1, abs=0.5)
    for name in ("system_memory_available_bytes", "filesystem_avail_bytes", "memory_working_set_bytes"):
        assert getattr(other, name) == pytest.approx(getattr(before, name), rel=0.1, abs=2e8), name
    assert other.filesystem_utilization_ratio == pytest.approx(before.filesystem_utilization_ratio, abs=0.01)


_KERNEL = """
import json, os, subprocess, sys, time
from wiseflow_nb.session import Session
from tests.integration.test_probe_conformance import truth
enabled = json.loads(sys.argv[1])
children = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(4)]
with Session(title="conformance", resource_check_interval=0.05, recorder_enabled=enabled) as session:
    own = {session.recorder.pid} if enabled else set()
    deadline = time.monotonic() + 30
    while True:
        known = truth(os.getpid())
        sample = session.monitor.latest()
        if sample is not None and sample.process_count + len(own) == known["process_count"] and sample.interval_seconds == sample.interval_seconds:
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)
    print(json.dumps([session.recorder.mode, sample._asdict(), known]))
for child in children: child.communicate(b"\\n")
"""


@pytest.mark.parametrize("enabled", [True, False], ids=["process", "thread"])
def test_in_the_recorder_and_in_the_kernel(enabled: bool, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    out = subprocess.check_output(
        [sys.executable, "-c", _KERNEL, json.dumps(enabled)],
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    mode, values, known = json.loads(out.splitlines()[-1])
    assert mode == ("process" if enabled else "thread")
    sample = Sample(**values)
    recorder = 1 if enabled else 0
    # The recorder itself is no part of the tree.
    assert sample.process_count == known["process_count"] - recorder == 5
    assert 0 < sample.process_memory_rss_bytes <= known["process_memory_rss_bytes"] * 1.05
    assert 0 < sample.process_cpu_seconds_total <= known["process_cpu_seconds_total"] + 1.0
    assert sample.memory_limit_bytes > 0
    assert sample.filesystem_size_bytes > 0
    assert sample.recorder_cpu_seconds_total > 0
    # What a thread of the kernel's takes of its memory nobody can tell.
    assert math.isnan(sample.recorder_memory_rss_bytes) is not enabled


def test_a_session_says_nothing_of_failing_probes() -> None:
    with Session(title="calm", resource_check_interval=0.05) as session:
        deadline = time.monotonic() + 30.0
        while len(session.history()) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert session.sync()
        assert not set(session.events().kind) & {"probe_failed", "probe_recovered"}
