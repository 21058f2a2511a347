"""In a real control group of 512 MiB and half a core the figures are the group's, not the host's."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from wiseflow_nb.records import Sample
from wiseflow_nb.resources._probe import Probe

pytestmark = pytest.mark.cgroup

MEMORY = 512 * 1024 * 1024
CANNOT = "control groups cannot be made here (needs root and a writable cgroup mount)"

_CHILD = """
import json, os, sys, time
for path in sys.argv[1:]:
    with open(path, "w") as stream:
        stream.write(str(os.getpid()))
from wiseflow_nb.resources._probe import Probe
probe = Probe(os.getpid())
def read():
    now = time.monotonic()
    return probe.read(time_seconds=time.time(), monotonic_seconds=now, interval_seconds=1.0, gap=False)
before = read()
spent = time.process_time()
ballast = bytearray(os.urandom(1024) * 102400)
end = time.monotonic() + 2.0
while time.monotonic() < end:
    sum(range(1000))
after = read()
spent = time.process_time() - spent
print(json.dumps([before._asdict(), after._asdict(), probe.limits.limit_source, spent]))
"""


def _write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.fixture
def groups() -> Iterator[list[Path]]:
    """Make the groups; yield the files that take a process in."""
    base, name = Path("/sys/fs/cgroup"), f"wiseflow-test-{os.getpid()}"
    made: list[Path] = []
    try:
        try:
            if (base / "cgroup.controllers").exists():
                directories = [base / name]
                controls = (base / "cgroup.subtree_control").read_text().split()
                for controller in ("memory", "cpu"):
                    if controller not in controls:
                        _write(base / "cgroup.subtree_control", f"+{controller}")
                settings = {"memory.max": str(MEMORY), "cpu.max": "50000 100000"}
            else:
                directories = [base / part / name for part in ("memory", "cpu", "cpuacct")]
                settings = {
                    "memory.limit_in_bytes": str(MEMORY),
                    "cpu.cfs_period_us": "100000",
                    "cpu.cfs_quota_us": "50000",
                }
            for directory in directories:
                directory.mkdir(exist_ok=True)
                made.append(directory)
            for setting, value in settings.items():
                found = [directory / setting for directory in directories if (directory / setting).exists()]
                if not found:
                    pytest.skip(CANNOT)
                _write(found[0], value)
        except OSError:
            pytest.skip(CANNOT)
        yield [directory / "cgroup.procs" for directory in directories]
    finally:
        for directory in made:
            if directory.exists():
                directory.rmdir()


def test_limits_and_usage_are_those_of_the_group(groups: list[Path]) -> None:
    out = subprocess.check_output([sys.executable, "-c", _CHILD, *map(str, groups)], text=True, timeout=60)
    before, after, source, spent = json.loads(out)
    assert after["memory_limit_bytes"] == MEMORY
    assert after["cpu_limit_cores"] == 0.5
    assert "cgroup" in source.split(",")[0]
    assert "cgroup" in source.split(",")[1]
    grown = after["memory_working_set_bytes"] - before["memory_working_set_bytes"]
    assert 90e6 < grown < 130e6
    assert after["memory_working_set_bytes"] < MEMORY
    assert after["memory_limit_bytes"] < psutil.virtual_memory().total
    assert after["memory_utilization_ratio"] == pytest.approx(after["memory_working_set_bytes"] / MEMORY)
    # The child is alone in its group: what it spent, against half a core, whatever the host does.
    elapsed = after["monotonic_seconds"] - before["monotonic_seconds"]
    assert after["cpu_utilization_ratio"] == pytest.approx(spent / elapsed / 0.5, rel=0.1)
    assert after["cpu_utilization_ratio"] < 1.2
    throttled = after["container_cpu_throttled_seconds_total"] - before["container_cpu_throttled_seconds_total"]
    # On a machine too busy to give it its half core, nothing needed to be throttled.
    assert throttled > 0 if after["cpu_utilization_ratio"] > 0.98 else throttled >= 0


def test_a_process_moved_out_of_a_removed_group_is_followed(groups: list[Path]) -> None:
    """The group goes away under the kept files: the probe finds the new place, and other columns go on."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    homes = {path: _home(child.pid, path) for path in groups}
    probe = Probe(child.pid, environ={})
    try:
        for path in groups:
            _write(path, str(child.pid))
        inside = Probe(child.pid, environ={})
        before = _read(inside, 0.0)
        assert before.memory_limit_bytes == MEMORY
        assert before.memory_working_set_bytes < MEMORY
        for path, home in homes.items():
            _write(home, str(child.pid))
            path.parent.rmdir()
        # What is kept open of a removed group says "no such device".
        lost = _read(inside, 1.0)
        assert math.isnan(lost.container_memory_usage_bytes)
        assert lost.process_memory_rss_bytes > 0
        assert lost.system_memory_total_bytes == before.system_memory_total_bytes
        told = [event.message.split(" cannot")[0] for event in inside.take_events()]
        assert sorted(told) == ["container cpu", "container memory"]
        later = [_read(inside, float(at)) for at in range(2, 10)]
        own = _read(probe, 10.0)
        assert later[-1].memory_limit_bytes == own.memory_limit_bytes
        assert inside.limits == probe.limits
        assert later[-1].memory_utilization_ratio == pytest.approx(own.memory_utilization_ratio, rel=0.1)
        assert [event.kind for event in inside.take_events()] == ["probe_recovered"] * 2
        inside.close()
    finally:
        child.communicate(b"\n")
        probe.close()


def _home(pid: int, procs: Path) -> Path:
    """The file that takes a process back into the group it is in now, of the controller of another such file."""
    controller = "" if (Path("/sys/fs/cgroup") / "cgroup.controllers").exists() else procs.parents[1].name
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return procs.parents[1] / path.lstrip("/") / "cgroup.procs"
    raise AssertionError(f"process {pid} is in no group of {controller!r}")


def _read(probe: Probe, at: float) -> Sample:
    return probe.read(time_seconds=at, monotonic_seconds=at, interval_seconds=1.0, gap=False)
