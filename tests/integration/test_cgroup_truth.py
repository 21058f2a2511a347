"""A minute of scripted load in a real control group: the probe's figures against the kernel's counters.

The kernel is read here in this file's own way, just before and just after each reading of the probe.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from wiseflow_nb.records import Sample
from wiseflow_nb.resources._probe import Probe

pytestmark = pytest.mark.cgroup

CANNOT = "control groups cannot be made here (needs root and a writable cgroup mount)"
SECONDS = 60.0
LIMIT, CORES = 1024 * 2**20, 0.5
CACHED, SHARED = 300 * 2**20, 200 * 2**20
#: The kernel charges memory in batches, for each CPU: so far two reads of one moment can differ.
BATCH = 64 * 4096 * (os.cpu_count() or 1)
WITHIN = 0.02
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

_LOAD = """
import os, subprocess, sys, threading, time
for path in sys.argv[2:]:
    with open(path, "w") as stream: stream.write(str(os.getpid()))
BURN = "import time\\nend = time.process_time() + 0.25\\nwhile time.process_time() < end: sum(range(1000))"
going = True
def come_and_go():
    while going:
        subprocess.run([sys.executable, "-S", "-c", BURN])
        time.sleep(0.1)
threads = [threading.Thread(target=come_and_go) for _ in range(2)]
for thread in threads: thread.start()
print("ready", flush=True)
for line in sys.stdin:
    what, _, path = line.strip().partition(" ")
    if what == "cache":
        with open(path, "rb", buffering=0) as stream:
            while stream.read(1 << 20): pass
    elif what == "share":
        with open(path, "wb") as stream:
            for _ in range(int(sys.argv[1]) >> 20): stream.write(bytes(1 << 20))
    elif what == "calm":
        going = False
        for thread in threads: thread.join()
    print("done", flush=True)
"""


@dataclass
class Groups:
    """The group's directories by controller, and how its files are called there."""

    version: int
    memory: Path
    cpu: Path
    account: Path
    made: list[Path] = field(default_factory=list)

    def join_files(self) -> list[str]:
        return [str(path / "cgroup.procs") for path in dict.fromkeys((self.memory, self.cpu, self.account))]


def make_groups() -> Groups:
    base, name = Path("/sys/fs/cgroup"), f"wiseflow-truth-{os.getpid()}"
    if (base / "cgroup.controllers").exists():
        for controller in ("memory", "cpu"):
            if controller not in (base / "cgroup.subtree_control").read_text().split():
                (base / "cgroup.subtree_control").write_text(f"+{controller}")
        found = Groups(2, base / name, base / name, base / name)
        settings = {found.memory / "memory.max": LIMIT, found.cpu / "cpu.max": f"{int(CORES * 100000)} 100000"}
    else:
        found = Groups(1, *(base / part / name for part in ("memory", "cpu", "cpuacct")))
        settings = {
            found.memory / "memory.limit_in_bytes": LIMIT,
            found.cpu / "cpu.cfs_period_us": 100000,
            found.cpu / "cpu.cfs_quota_us": int(CORES * 100000),
        }
    try:
        for directory in dict.fromkeys((found.memory, found.cpu, found.account)):
            directory.mkdir()
            found.made.append(directory)
        for path, value in settings.items():
            path.write_text(str(value))
    except OSError:
        remove(found)
        raise
    return found


def remove(groups: Groups) -> None:
    for directory in groups.made:
        deadline = time.monotonic() + 10.0
        while True:
            try:
                directory.rmdir()
                break
            except OSError:
                assert time.monotonic() < deadline, f"{directory} cannot be removed"
                time.sleep(0.05)


@pytest.fixture
def groups() -> Iterator[Groups]:
    try:
        made = make_groups()
    except OSError:
        pytest.skip(CANNOT)
    try:
        yield made
    finally:
        remove(made)


def words(path: Path | str) -> dict[str, int]:
    """``name number`` lines."""
    pairs = (line.replace(":", " ").split() for line in Path(path).read_text().splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].lstrip("-").isdigit()}


def kernel(groups: Groups) -> dict[str, float]:
    """What the kernel counts now, by the schema's names."""
    if groups.version == 2:
        cpu = words(groups.cpu / "cpu.stat")
        found = {
            "container_cpu_seconds_total": cpu["usage_usec"] / 1e6,
            "container_cpu_throttled_seconds_total": cpu["throttled_usec"] / 1e6,
            "container_memory_usage_bytes": float((groups.memory / "memory.current").read_text()),
            "container_memory_oom_kills_total": words(groups.memory / "memory.events")["oom_kill"],
        }
        inactive = words(groups.memory / "memory.stat")["inactive_file"]
    else:
        found = {
            "container_cpu_seconds_total": int((groups.account / "cpuacct.usage").read_text()) / 1e9,
            "container_cpu_throttled_seconds_total": words(groups.cpu / "cpu.stat")["throttled_time"] / 1e9,
            "container_memory_usage_bytes": float((groups.memory / "memory.usage_in_bytes").read_text()),
            "container_memory_oom_kills_total": words(groups.memory / "memory.oom_control")["oom_kill"],
        }
        inactive = words(groups.memory / "memory.stat")["total_inactive_file"]
    found["memory_working_set_bytes"] = found["container_memory_usage_bytes"] - inactive
    host = words("/proc/meminfo")
    found["system_memory_total_bytes"] = host["MemTotal"] * 1024
    found["system_memory_available_bytes"] = host["MemAvailable"] * 1024
    # Less than the group may have still may be left on the machine.
    left = LIMIT - found["memory_working_set_bytes"]
    found["memory_available_bytes"] = max(min(left, found["system_memory_available_bytes"]), 0.0)
    found["system_swap_used_bytes"] = swapped()
    found["system_load1"] = os.getloadavg()[0]
    found["disk_read_bytes_total"], found["disk_written_bytes_total"] = disks()
    found["network_receive_bytes_total"], found["network_transmit_bytes_total"] = interfaces()
    own = groups.memory if (groups.memory / "cpu.pressure").exists() else None
    for name in ("cpu", "memory", "io"):
        path = own / f"{name}.pressure" if own else Path(f"/proc/pressure/{name}")
        if path.exists():
            found[f"pressure_{name}_waiting_seconds_total"] = int(path.read_text().split()[4].split("=")[1]) / 1e6
    space = os.statvfs("/")
    found["filesystem_size_bytes"] = space.f_blocks * space.f_frsize
    found["filesystem_avail_bytes"] = space.f_bavail * space.f_frsize
    return found


def interfaces() -> tuple[float, float]:
    base = Path("/sys/class/net")
    names = [name for name in os.listdir(base) if name != "lo" and (base / name / "statistics").is_dir()]
    read = [
        [int((base / name / "statistics" / side).read_text()) for side in ("rx_bytes", "tx_bytes")] for name in names
    ]
    return sum(row[0] for row in read), sum(row[1] for row in read)


def disks() -> tuple[float, float]:
    """Bytes read and written, of one file for all devices, over those that are hardware."""
    hardware = {
        name for name in os.listdir("/sys/block") if "/devices/virtual/" not in os.path.realpath(f"/sys/block/{name}")
    }
    rows = [line.split() for line in Path("/proc/diskstats").read_text().splitlines()]
    counted = [(int(row[5]), int(row[9])) for row in rows if row[2] in hardware]
    if not counted:
        return math.nan, math.nan
    return sum(row[0] for row in counted) * 512.0, sum(row[1] for row in counted) * 512.0


def swapped() -> float:
    rows = [line.split() for line in Path("/proc/swaps").read_text().splitlines()[1:]]
    return sum(int(row[3]) for row in rows) * 1024.0


def proportional(tree: dict[int, list[str]]) -> float:
    """Bytes, mapping by mapping."""
    lines = [line for pid in tree for line in Path(f"/proc/{pid}/smaps").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024.0


def members(top: int) -> dict[int, list[str]]:
    """The process' descendants and it, from a look at every process: the fields after the name."""
    table: dict[int, list[str]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                table[int(name)] = Path(f"/proc/{name}/stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue
    found = {top: table[top]}
    grown = True
    while grown:
        more = {pid: row for pid, row in table.items() if int(row[1]) in found and pid not in found}
        grown = bool(more)
        found |= more
    return found


def lifetimes(tree: dict[int, list[str]]) -> set[tuple[int, str]]:
    return {(pid, row[19]) for pid, row in tree.items()}


def cpu_seconds(tree: dict[int, list[str]]) -> float:
    return sum(int(row[at]) for row in tree.values() for at in (11, 12, 13, 14)) / os.sysconf("SC_CLK_TCK")


def on_disk(path: Path) -> bool:
    """Whether a path is on a file system with a page cache of its own (a tmpfs has none)."""
    kinds = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        kinds[where] = kind
    best = max((where for where in kinds if path.is_relative_to(where)), key=len)
    return kinds[best] not in ("tmpfs", "ramfs")


def test_a_minute_of_load_is_told_as_the_kernel_counts_it(groups: Groups, tmp_path: Path) -> None:
    place = next((path for path in (tmp_path, Path.cwd()) if on_disk(path)), None)
    if place is None or not os.path.isdir("/dev/shm"):
        pytest.skip("no disk beside a tmpfs to fill a control group's page cache from")
    large = Path(tempfile.mkdtemp(dir=place)) / "large"
    shared = Path(tempfile.mkdtemp(dir="/dev/shm"))
    with open(large, "wb") as stream:
        for _ in range(CACHED >> 20):
            stream.write(os.urandom(1 << 20))
        stream.flush()
        os.fsync(stream.fileno())
        # Out of our own cache: it is to be charged to the group.
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    load = subprocess.Popen(
        [sys.executable, "-c", _LOAD, str(SHARED), *groups.join_files()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert load.stdin is not None
    assert load.stdout is not None

    def ask(what: str) -> None:
        load.stdin.write(what + "\n")
        load.stdin.flush()

    def answered() -> None:
        assert load.stdout.readline().strip() == "done"

    probe: Probe | None = None
    try:
        assert load.stdout.readline().strip() == "ready"
        # On a loaded machine a reading can be dear, and is taken less often then.
        probe = Probe(load.pid, "/", environ={}, timer=lambda: 0.0)
        assert probe.limits.memory_limit_bytes == LIMIT
        assert probe.limits.cpu_limit_cores == CORES
        checker = Checker(groups, load.pid, probe)
        checker.take()
        start = time.monotonic()
        marks: dict[str, Sample] = {}
        plan = [(10.0, "cache", f"cache {large}"), (30.0, "share", f"share {shared / 'file'}")]
        asked: list[str] = []
        while time.monotonic() - start < SECONDS:
            for due, name, command in plan:
                if name not in asked and time.monotonic() - start >= due:
                    marks[f"before {name}"] = checker.take()
                    ask(command)
                    answered()
                    asked.append(name)
                    marks[f"after {name}"] = checker.take()
            checker.take()
            time.sleep(1.0)
        ask("calm")
        answered()
        last = checker.take()
        checker.check_the_whole()
        # The tree at rest: its counters are those of every process that ever was in it.
        assert last.process_cpu_seconds_total == pytest.approx(cpu_seconds(members(load.pid)), abs=0.02)
        assert probe.take_events() == []
        check_at_rest(load.pid)
    except BaseException:
        # Else what it started would go on, and nobody would tell it to calm down.
        for process in (*psutil.Process(load.pid).children(recursive=True), load):
            process.kill()
        raise
    finally:
        if probe is not None:
            probe.close()
        load.communicate()
        shutil.rmtree(large.parent)
        shutil.rmtree(shared)
    # What was read once can be dropped at any time; a file in memory cannot.
    before, after = marks["before cache"], marks["after cache"]
    assert after.container_memory_usage_bytes - before.container_memory_usage_bytes > 0.8 * CACHED
    assert after.memory_working_set_bytes - before.memory_working_set_bytes < 0.1 * CACHED
    before, after = marks["before share"], marks["after share"]
    grown = after.memory_working_set_bytes - before.memory_working_set_bytes
    assert grown == pytest.approx(SHARED, rel=0.1)
    assert after.memory_utilization_ratio == pytest.approx(after.memory_working_set_bytes / LIMIT)


def check_at_rest(pid: int) -> None:
    """What is read seldom, or moves while a process starts another one: once nothing moves."""
    tree = members(pid)
    probe, before = Probe(pid, "/", environ={}), proportional(tree)
    sample = probe.read(time_seconds=0.0, monotonic_seconds=0.0, interval_seconds=math.nan, gap=False)
    probe.close()
    assert sample.process_open_fds == len(os.listdir(f"/proc/{pid}/fd"))
    # Each mapping is rounded down to a kilobyte, and others may map the same libraries meanwhile.
    low, high = sorted((before, proportional(tree)))
    assert 0.9 * low <= sample.process_memory_pss_bytes <= 1.1 * high + 1024 * 1024


class Checker:
    """Takes readings between two looks at the kernel, and compares."""

    def __init__(self, groups: Groups, pid: int, probe: Probe) -> None:
        self._groups, self._pid, self._probe = groups, pid, probe
        self._taken: list[tuple[dict[str, float], Sample, dict[str, float]]] = []
        self._compared_trees = self._compared_pages = 0

    def take(self) -> Sample:
        tree, before = members(self._pid), kernel(self._groups)
        sample = self._probe.read(
            time_seconds=time.time(), monotonic_seconds=time.monotonic(), interval_seconds=1.0, gap=False
        )
        after, later = kernel(self._groups), members(self._pid)
        self._taken.append((before, sample, after))
        for name in before:
            low, high = sorted((before[name], after[name]))
            slack = 0.0
            if math.isnan(low):
                assert math.isnan(getattr(sample, name)), name
                continue
            if not name.endswith("_total"):
                # A gauge can rise and fall in between.
                slack = WITHIN * high + (BATCH if name.startswith(("container_", "memory_", "system_swap")) else 0.0)
            assert low - slack <= getattr(sample, name) <= high + slack, name
        if lifetimes(tree) == lifetimes(later):
            self._compared_trees += 1
            assert sample.process_count == len(tree)
            # A process may start or end a thread between the two looks.
            low, high = sorted(sum(int(row[17]) for row in one.values()) for one in (tree, later))
            assert low <= sample.process_threads <= high
            low, high = sorted(cpu_seconds(one) for one in (tree, later))
            assert low <= sample.process_cpu_seconds_total <= high
            # One that becomes another program in between is smaller meanwhile than at either look.
            if all(abs(int(tree[pid][21]) - int(later[pid][21])) * PAGE <= BATCH for pid in tree):
                self._compared_pages += 1
                pages = [sum(int(row[21]) for row in one.values()) * PAGE for one in (tree, later)]
                assert 0.98 * min(pages) - BATCH <= sample.process_memory_rss_bytes <= 1.02 * max(pages) + BATCH
        return sample

    def check_the_whole(self) -> None:
        """Over all of it: what the rates add up to is what was counted."""
        assert len(self._taken) > 30
        assert self._compared_trees > 10
        assert self._compared_pages > 10
        (_, first, began), (ended, last, _) = self._taken[0], self._taken[-1]
        elapsed = last.monotonic_seconds - first.monotonic_seconds
        counted = ended["container_cpu_seconds_total"] - began["container_cpu_seconds_total"]
        told = last.container_cpu_seconds_total - first.container_cpu_seconds_total
        assert told == pytest.approx(counted, rel=WITHIN)
        samples = [sample for _, sample, _ in self._taken]
        spans = [
            (later.monotonic_seconds - earlier.monotonic_seconds, later.cpu_utilization_ratio)
            for earlier, later in itertools.pairwise(samples)
        ]
        assert not any(math.isnan(ratio) for _, ratio in spans)
        assert sum(span * ratio for span, ratio in spans) * CORES == pytest.approx(counted, rel=WITHIN)
        assert counted / elapsed / CORES > 0.3, "the load was no load"
        assert last.container_cpu_throttled_seconds_total > first.container_cpu_throttled_seconds_total
