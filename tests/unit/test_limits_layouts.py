"""Version 2 as real machines lay it out: what binds, and whose usage is compared with it.

The names of groups and the lines of ``mountinfo`` are those that systemd, Docker, Kubernetes and Podman
document; the files of a group are those that the kernel offers where the controller is switched on.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from wiseflow_nb.resources._probe import Probe

linux = pytest.mark.skipif(sys.platform != "linux", reason="compares Linux' own files with psutil")
MIB = 2**20
GIB = 2**30
HOST_MEMORY, HOST_CPUS = 16 * GIB, 8
PID = 4242
#: The whole tree, as the machine sees it, and a container with a namespace of its own.
MACHINE = "35 24 0:29 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot"
PRIVATE = "1215 1210 0:29 / /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw,nsdelegate"
#: A container that was given the machine's namespace and a view of its own group.
SHOWN = "1215 1210 0:29 /system.slice/docker-1f.scope /sys/fs/cgroup ro,relatime - cgroup2 cgroup rw"


@dataclass(frozen=True)
class Layout:
    """Groups, by their directory below the mount, and what is to come out."""

    cgroup: str
    groups: Mapping[str, Mapping[str, object]]
    mount: str = MACHINE
    memory: tuple[float, str] = (HOST_MEMORY, "host")
    cores: tuple[float, str] = (HOST_CPUS, "host")
    #: Whose memory, CPU time and pressure are told; None: no group's.
    memory_of: str | None = None
    cpu_of: str | None = None
    pressure_of: str | None = None
    #: What is left of the memory, where another level has less left than the one whose limit won.
    available: float | None = None
    environ: Mapping[str, str] = field(default_factory=dict)


def memory(limit: object = "max", current: int = 300, inactive: int = 100, high: object = "max") -> dict[str, object]:
    """The memory controller's files, in MiB."""
    return {
        "memory.max": limit * MIB if isinstance(limit, int) else limit,
        "memory.high": high * MIB if isinstance(high, int) else high,
        "memory.min": 0,
        "memory.low": 64 * MIB,
        "memory.current": current * MIB,
        "memory.swap.max": "max",
        "memory.stat": f"anon {(current - inactive) * MIB}\nfile {inactive * MIB}\ninactive_anon 0\nactive_anon 1\n"
        f"inactive_file {inactive * MIB}\nactive_file 0",
        "memory.events": f"low 0\nhigh 7\nmax 3\noom 1\noom_kill {current % 7}\noom_group_kill 0",
        "memory.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=2000000\nfull avg10=0.00 total=1",
    }


def cpu(limit: str = "max 100000", used: int = 5) -> dict[str, object]:
    """The cpu controller's files; seconds that were used."""
    return {
        "cpu.max": limit,
        "cpu.weight": 100,
        "cpu.stat": f"usage_usec {used}000000\nuser_usec 1\nsystem_usec 1\nnr_periods 9\nnr_throttled 2\nthrottled_usec 250000",
        "cpu.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1000000\nfull avg10=0.00 total=0",
        "io.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=3000000\nfull avg10=0.00 total=0",
    }


#: What every group has, with no controller switched on: CPU time and pressure are counted all the same.
BARE = {
    "cgroup.controllers": "",
    "cgroup.events": "populated 1\nfrozen 0",
    "cgroup.type": "domain",
    "memory.pressure": memory()["memory.pressure"],
    **{name: text for name, text in cpu().items() if name not in ("cpu.max", "cpu.weight")},
}
#: The machine's own group: no limits, no events.
ROOT = {
    "cgroup.controllers": "cpuset cpu io memory hugetlb pids rdma misc",
    "cgroup.subtree_control": "cpuset cpu io memory pids",
    "cpuset.cpus.effective": "0-7",
    "cpu.stat": "usage_usec 99000000\nuser_usec 1\nsystem_usec 1",
    "memory.stat": "anon 1\ninactive_file 1",
    "memory.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 total=1",
    "cpu.pressure": "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 total=1",
}

USER = "user.slice/user-1000.slice/user@1000.service"
TERMINAL = f"{USER}/app.slice/app-org.gnome.Terminal.slice/vte-spawn-7.scope"
POD = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podab.slice"
CONTAINER = f"{POD}/cri-containerd-cd.scope"
LIBPOD = f"{USER}/user.slice/libpod-9e.scope"

LAYOUTS = {
    "a terminal of a desktop without limits": Layout(
        f"/{TERMINAL}",
        {
            "": ROOT,
            "user.slice": {**BARE, **memory(current=9000), **cpu(used=90)},
            "user.slice/user-1000.slice": {**BARE, **memory(current=8000), **cpu(used=80)},
            USER: {**BARE, **memory(current=7000)},
            f"{USER}/app.slice": {**BARE, **memory(current=6000)},
            f"{USER}/app.slice/app-org.gnome.Terminal.slice": {**BARE, **memory(current=500)},
            TERMINAL: {**BARE, **memory()},
        },
        memory_of=TERMINAL,
        cpu_of=TERMINAL,
        pressure_of=TERMINAL,
    ),
    "a user's slice with MemoryMax and CPUQuota": Layout(
        f"/{TERMINAL}",
        {
            "": ROOT,
            "user.slice": {**BARE, **memory(), **cpu()},
            "user.slice/user-1000.slice": {**BARE, **memory(4096, current=3000), **cpu("200000 100000", used=80)},
            USER: {**BARE, **memory(current=2500)},
            TERMINAL: {**BARE, **memory()},
        },
        memory=(4 * GIB, "cgroup2:/user.slice/user-1000.slice"),
        cores=(2.0, "cgroup2:/user.slice/user-1000.slice"),
        memory_of="user.slice/user-1000.slice",
        cpu_of="user.slice/user-1000.slice",
        pressure_of=TERMINAL,
    ),
    "a service with MemoryMax, MemoryHigh and CPUQuota=150%": Layout(
        "/system.slice/jupyter.service",
        {
            "": ROOT,
            "system.slice": {**BARE, **memory(current=5000), **cpu(used=70)},
            "system.slice/jupyter.service": {**BARE, **memory(512, high=400), **cpu("150000 100000")},
        },
        memory=(512 * MIB, "cgroup2:/system.slice/jupyter.service"),
        cores=(1.5, "cgroup2:/system.slice/jupyter.service"),
        memory_of="system.slice/jupyter.service",
        cpu_of="system.slice/jupyter.service",
        pressure_of="system.slice/jupyter.service",
    ),
    "memory.high alone is soft, and memory.low protects": Layout(
        "/system.slice/soft.service",
        {"": ROOT, "system.slice": BARE, "system.slice/soft.service": {**BARE, **memory(high=200), **cpu()}},
        memory_of="system.slice/soft.service",
        cpu_of="system.slice/soft.service",
        pressure_of="system.slice/soft.service",
    ),
    "docker with a namespace of its own": Layout(
        "/",
        {"": {**BARE, **memory(1024), **cpu("50000 100000"), "cpuset.cpus.effective": "0-7"}},
        mount=PRIVATE,
        memory=(GIB, "cgroup2:/"),
        cores=(0.5, "cgroup2:/"),
        memory_of="",
        cpu_of="",
        pressure_of="",
    ),
    "docker without limits": Layout(
        "/",
        {"": {**BARE, **memory(), **cpu(), "cpuset.cpus.effective": "0-7"}},
        mount=PRIVATE,
        memory_of="",
        cpu_of="",
        pressure_of="",
    ),
    "docker --cpuset-cpus with more quota than CPUs": Layout(
        "/",
        {"": {**BARE, **memory(), **cpu("400000 100000"), "cpuset.cpus": "2,5-6", "cpuset.cpus.effective": "2,5-6"}},
        mount=PRIVATE,
        cores=(3.0, "cpuset"),
        memory_of="",
        cpu_of="",
        pressure_of="",
    ),
    "docker with the machine's namespace, its own group shown": Layout(
        "/system.slice/docker-1f.scope",
        {"": {**BARE, **memory(2048), **cpu("300000 100000")}},
        mount=SHOWN,
        memory=(2 * GIB, "cgroup2:/"),
        cores=(3.0, "cgroup2:/"),
        memory_of="",
        cpu_of="",
        pressure_of="",
    ),
    "docker with the machine's namespace, all shown": Layout(
        "/system.slice/docker-1f.scope",
        {
            "": ROOT,
            "system.slice": {**BARE, **memory(), **cpu()},
            "system.slice/docker-1f.scope": {**BARE, **memory(2048), **cpu("300000 100000")},
        },
        memory=(2 * GIB, "cgroup2:/system.slice/docker-1f.scope"),
        cores=(3.0, "cgroup2:/system.slice/docker-1f.scope"),
        memory_of="system.slice/docker-1f.scope",
        cpu_of="system.slice/docker-1f.scope",
        pressure_of="system.slice/docker-1f.scope",
    ),
    "docker in docker: the processes are moved one group down": Layout(
        "/init",
        {
            "": {**BARE, **memory(3072, current=900), **cpu("250000 100000", used=50)},
            "init": {**BARE, **memory(), **cpu()},
        },
        mount=PRIVATE,
        memory=(3 * GIB, "cgroup2:/"),
        cores=(2.5, "cgroup2:/"),
        memory_of="",
        cpu_of="",
        pressure_of="init",
    ),
    "a pod that is tighter in CPU, its container in memory": Layout(
        f"/{CONTAINER}",
        {
            "": ROOT,
            # What the node may give to pods.
            "kubepods.slice": {**BARE, **memory(14 * 1024, current=13900, inactive=200), **cpu(used=500)},
            "kubepods.slice/kubepods-burstable.slice": {**BARE, **memory(), **cpu(used=400)},
            POD: {**BARE, **memory(3072, current=2600), **cpu("100000 100000", used=40)},
            CONTAINER: {**BARE, **memory(2048), **cpu("200000 100000")},
        },
        memory=(2 * GIB, f"cgroup2:/{CONTAINER}"),
        cores=(1.0, f"cgroup2:/{POD}"),
        memory_of=CONTAINER,
        cpu_of=POD,
        pressure_of=CONTAINER,
        # Of the pod 572 MiB are left, of the node's share 636, of the container 1,848.
        available=572 * MIB,
    ),
    "a container of a pod that sees itself alone": Layout(
        "/",
        {"": {**BARE, **memory(2048), **cpu("200000 100000")}},
        mount=PRIVATE,
        memory=(2 * GIB, "cgroup2:/"),
        cores=(2.0, "cgroup2:/"),
        memory_of="",
        cpu_of="",
        pressure_of="",
        environ={"MEM_LIMIT": str(GIB), "CPU_LIMIT": "1"},
    ),
    "a pod without limits, told by the hub's environment": Layout(
        "/",
        {"": {**BARE, **memory(), **cpu()}},
        mount=PRIVATE,
        memory=(GIB, "environment:MEM_LIMIT"),
        cores=(1.0, "environment:CPU_LIMIT"),
        memory_of="",
        cpu_of="",
        pressure_of="",
        environ={"MEM_LIMIT": str(GIB), "CPU_LIMIT": "1"},
    ),
    "podman without root: memory is delegated, cpu and cpuset are not": Layout(
        f"/{LIBPOD}/container",
        {
            "": ROOT,
            USER: {**BARE, **memory(current=7000)},
            LIBPOD: {**BARE, **memory(256, current=240, inactive=40)},
            f"{LIBPOD}/container": {**BARE, **memory(current=230, inactive=30)},
        },
        memory=(256 * MIB, f"cgroup2:/{LIBPOD}"),
        memory_of=LIBPOD,
        cpu_of=f"{LIBPOD}/container",
        pressure_of=f"{LIBPOD}/container",
    ),
    "no controller at all below an ancestor with limits": Layout(
        "/batch/job/step",
        {
            "": ROOT,
            "batch": {
                **BARE,
                **memory(1024, current=700),
                **cpu("50000 200000", used=33),
                "cpuset.cpus.effective": "0-3",
            },
            "batch/job": BARE,
            "batch/job/step": BARE,
        },
        memory=(GIB, "cgroup2:/batch"),
        cores=(0.25, "cgroup2:/batch"),
        memory_of="batch",
        cpu_of="batch",
        pressure_of="batch/job/step",
    ),
    "a machine whose notebook server is in no group": Layout("/", {"": ROOT}),
    "a group that was removed meanwhile": Layout("/system.slice/old.service (deleted)", {"": ROOT}),
    "a group above the namespace's top": Layout(
        "/../other",
        {"": {**BARE, **memory(1024), **cpu("100000 100000")}},
        mount=PRIVATE,
        memory=(GIB, "cgroup2:/"),
        cores=(1.0, "cgroup2:/"),
        memory_of="",
        cpu_of="",
        pressure_of="",
    ),
    "kernels without pressure": Layout(
        "/app",
        {"": ROOT, "app": {name: text for name, text in {**BARE, **memory(512)}.items() if "pressure" not in name}},
        memory=(512 * MIB, "cgroup2:/app"),
        memory_of="app",
        cpu_of="app",
    ),
}


def lay_out(root: Path, layout: Layout) -> None:
    cpus = "".join(f"cpu{number} 1 1 1 1 1 1 1 1 0 0\n" for number in range(HOST_CPUS))
    available = HOST_MEMORY // 1024 // 2
    files: dict[str, object] = {
        "proc/meminfo": f"MemTotal: {HOST_MEMORY // 1024} kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n"
        "SwapTotal: 0 kB\nSwapFree: 0 kB",
        "proc/stat": f"cpu 100 0 100 800 0 0 0 0 0 0\n{cpus}",
        "proc/loadavg": "0.50 0.00 0.00 1/1 1",
        "proc/self/statm": "10 5 1 1 0 1 0",
        f"proc/{PID}/cgroup": f"0::{layout.cgroup}",
        f"proc/{PID}/mountinfo": layout.mount,
        f"proc/{PID}/net/dev": "a\nb",
        f"proc/{PID}/task/{PID}/children": "",
        f"proc/{PID}/stat": f"{PID} (jupyter) S 1 1 1 0 -1 0 0 0 0 0 7 0 0 0 20 0 1 0 7 1 100 0 0",
    }
    for group, texts in layout.groups.items():
        files |= {os.path.join("sys/fs/cgroup", group, name): text for name, text in texts.items()}
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{text}\n")
    (root / f"proc/{PID}/fd").mkdir()


@linux
@pytest.mark.parametrize("layout", [pytest.param(layout, id=name) for name, layout in LAYOUTS.items()])
def test_limits_and_usage_go_by_the_groups_that_bind(tmp_path: Path, layout: Layout) -> None:
    lay_out(tmp_path, layout)
    probe = Probe(PID, disk_path=str(tmp_path), root=str(tmp_path), environ=layout.environ)
    samples = [
        probe.read(time_seconds=at, monotonic_seconds=at, interval_seconds=1.0, gap=False) for at in (0.0, 1.0, 2.0)
    ]
    limits = probe.limits
    assert (limits.memory_limit_bytes, limits.memory_source) == layout.memory
    assert (limits.cpu_limit_cores, limits.cpu_source) == layout.cores
    for sample in samples:
        told = sample.container_memory_usage_bytes, sample.container_memory_oom_kills_total
        if layout.memory_of is None:
            assert all(math.isnan(value) for value in told)
        else:
            group = layout.groups[layout.memory_of]
            kills = int(str(group["memory.events"]).split("oom_kill ")[1].split()[0])
            assert told == (group["memory.current"], kills)
        if layout.memory[1].startswith("cgroup2"):
            group = layout.groups[layout.memory_of or ""]
            inactive = int(str(group["memory.stat"]).split("inactive_file ")[1].split()[0])
            used = float(str(group["memory.current"])) - inactive
            assert sample.memory_working_set_bytes == used
            assert sample.memory_utilization_ratio == used / layout.memory[0]
            left = layout.memory[0] - used if layout.available is None else layout.available
            assert sample.memory_available_bytes == left
        told = sample.container_cpu_seconds_total, sample.container_cpu_throttled_seconds_total
        if layout.cpu_of is None:
            assert all(math.isnan(value) for value in told)
        else:
            used = int(str(layout.groups[layout.cpu_of]["cpu.stat"]).split()[1]) / 1e6
            assert told == (used, 0.25)
        pressures = tuple(getattr(sample, f"pressure_{name}_waiting_seconds_total") for name in ("cpu", "memory", "io"))
        if layout.pressure_of is None:
            assert all(math.isnan(value) for value in pressures)
        else:
            assert pressures == (1.0, 2.0, 3.0)
    assert probe.take_events() == []
    probe.close()


@linux
def test_utilization_is_that_of_the_level_whose_quota_won(tmp_path: Path) -> None:
    layout = LAYOUTS["a pod that is tighter in CPU, its container in memory"]
    lay_out(tmp_path, layout)
    probe = Probe(PID, disk_path=str(tmp_path), root=str(tmp_path), environ={})
    ratios = []
    for at, (pod, container) in enumerate([(40, 5), (41, 5), (41, 9)]):
        for group, used in ((POD, pod), (CONTAINER, container)):
            (tmp_path / "sys/fs/cgroup" / group / "cpu.stat").write_text(str(cpu(used=used)["cpu.stat"]) + "\n")
        sample = probe.read(time_seconds=2 * at, monotonic_seconds=2 * at, interval_seconds=2.0, gap=False)
        ratios.append(sample.cpu_utilization_ratio)
    # One second of the pod's CPU time in two, of the one core that it may have.
    assert ratios == pytest.approx([math.nan, 0.5, 0.0], nan_ok=True)
    probe.close()
