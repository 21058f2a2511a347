"""The effective limits of a process: the minimum of all that bind it, with the one that won.

The environment (``MEM_LIMIT``, ``CPU_LIMIT``) binds nothing: it counts where only the host would.

Pure given a root path: tests hand in trees of files. Source of the rules: the kernel's
Documentation/admin-guide/cgroup-v1 and cgroup-v2.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from wiseflow_nb.records import Limits

#: v1 says "no limit" with the largest page-aligned number, about 2**63.
V1_NO_LIMIT = 2**60


@dataclass(frozen=True, slots=True)
class Group:
    """One control group of one controller: its version, its directory, and the mount's top directory."""

    version: int
    path: str
    top: str
    name: str

    def ancestors(self) -> Iterator[tuple[str, str]]:
        """(directory, name) from the group up to the top of the mount."""
        path, name = self.path, self.name
        while True:
            yield path, name or "/"
            if path == self.top or len(path) <= len(self.top):
                return
            path, name = os.path.dirname(path), os.path.dirname(name)


@dataclass(frozen=True, slots=True)
class Bound:
    """What binds, and the directories where its usage is read; empty where no group binds."""

    limits: Limits
    memory_version: int = 0
    memory_dir: str = ""
    cpu_version: int = 0
    cpu_dir: str = ""
    cpuacct_dir: str = ""
    groups: Mapping[str, Group] = field(default_factory=dict)
    #: The other levels with a memory limit of their own: version, directory, limit in bytes.
    memory_levels: tuple[tuple[int, str, float], ...] = ()

    @property
    def cpu_is_counted(self) -> bool:
        """Whether CPU time is counted at the very level that binds it."""
        return bool(self.cpuacct_dir) or self.cpu_version == 2


def locate(pid: int | str = "self", root: str = "/") -> dict[str, Group]:
    """Return the process' control group by controller; ``""`` is the v2 one."""
    proc = os.path.join(root, "proc", str(pid))
    memberships: dict[str, str] = {}
    for line in _lines(os.path.join(proc, "cgroup")):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        for controller in controllers.split(","):
            memberships[controller] = path
    groups: dict[str, Group] = {}
    sure: set[str] = set()
    for line in _lines(os.path.join(proc, "mountinfo")):
        left, _, right = line.partition(" - ")
        fields, after = left.split(), right.split()
        if len(fields) < 5 or len(after) < 3 or after[0] not in ("cgroup", "cgroup2"):
            continue
        mount_root, mount_point = _unescape(fields[3]), _unescape(fields[4])
        names = [""] if after[0] == "cgroup2" else [item for item in after[2].split(",") if item in memberships]
        for controller in names:
            if controller in sure or controller not in memberships:
                continue
            name = memberships[controller]
            inside = _below(name, mount_root)
            top = os.path.join(root, mount_point.lstrip("/"))
            path = os.path.join(top, inside.lstrip("/")).rstrip("/")
            if os.path.isdir(path):
                sure.add(controller)
            elif controller in groups:
                continue
            else:
                # A path from outside this namespace is not there: then the mount's top is the group,
                # unless another mount of the same controller shows it.
                path, inside = top.rstrip("/"), "/"
            groups[controller] = Group(2 if after[0] == "cgroup2" else 1, path, top.rstrip("/"), inside)
    return groups


def _below(name: str, mount_root: str) -> str:
    if mount_root == "/" or name.startswith("/.."):
        return name if not name.startswith("/..") else "/"
    if name == mount_root or name.startswith(mount_root + "/"):
        return name[len(mount_root) :] or "/"
    return name


def bound(
    pid: int | str = "self",
    root: str = "/",
    environ: Mapping[str, str] | None = None,
    host_memory: float | None = None,
    host_cores: float | None = None,
    affinity: int | None = None,
) -> Bound:
    """Return what binds the process, and where its usage is to be read; see ``effective_limits``."""
    groups = locate(pid, root)
    host_memory = _host_memory(root) if host_memory is None else host_memory
    host_cores = _host_cores(root) if host_cores is None else host_cores
    memory, memory_source = host_memory, "host"
    memory_dir, memory_version = "", 0
    levels: list[tuple[int, str, float]] = []
    for version, directory, name, value in _memory_limits(groups):
        if value < host_memory:
            levels.append((version, directory, value))
        if value < memory:
            memory, memory_source, memory_dir, memory_version = value, f"cgroup{version}:{name}", directory, version
    cores, cpu_source = host_cores, "host"
    cpu_dir, cpuacct_dir, cpu_version = "", "", 0
    for version, directory, name, value in _cpu_limits(groups):
        if value < cores:
            cores, cpu_source, cpu_dir, cpu_version = value, f"cgroup{version}:{name}", directory, version
    if cpu_version == 1:
        cpuacct_dir = _beside(groups, "cpu", cpu_dir, "cpuacct", "cpuacct.usage")
    count, directory = _cpuset(groups)
    if 0 < count < cores:
        cores, cpu_source = float(count), "cpuset"
        cpu_version, cpu_dir, cpuacct_dir = _counted_beside_cpuset(groups, directory)
    if affinity and affinity < cores:
        cores, cpu_source, cpu_dir, cpuacct_dir, cpu_version = float(affinity), "affinity", "", "", 0
    environ = os.environ if environ is None else environ
    if memory_source == "host" and (given := _number(environ.get("MEM_LIMIT", ""))) and given < memory:
        memory, memory_source = given, "environment:MEM_LIMIT"
    if cpu_source == "host" and (given := _number(environ.get("CPU_LIMIT", ""))) and given < cores:
        cores, cpu_source = given, "environment:CPU_LIMIT"
    limits = Limits(float(memory), float(cores), memory_source, cpu_source)
    # Less may be left at another level: its usage is that of sister groups, too.
    others = tuple(level for level in levels if level[1] != memory_dir and _counts_memory(*level[:2]))
    return Bound(limits, memory_version, memory_dir, cpu_version, cpu_dir, cpuacct_dir, groups, others)


def effective_limits(
    pid: int | str = "self",
    root: str = "/",
    environ: Mapping[str, str] | None = None,
    host_memory: float | None = None,
    host_cores: float | None = None,
    affinity: int | None = None,
) -> Limits:
    """Return the effective limits of a process; see ``Limits`` for units and sources.

    Parameters
    ----------
    pid
        The process.
    root
        Where ``/proc`` and ``/sys`` are; for tests.
    environ
        Default ``os.environ``; ``MEM_LIMIT`` (bytes) and ``CPU_LIMIT`` (cores) count where no
        control group, cpuset or affinity binds.
    host_memory
        Bytes; default what ``<root>/proc/meminfo`` tells, infinite where it is not.
    host_cores
        Default the CPUs in ``<root>/proc/stat``, infinite where it is not.
    affinity
        CPUs that the process may run on, if known.

    Examples
    --------
    >>> effective_limits(root="/nowhere", environ={}, host_memory=8e9, host_cores=4.0)
    Limits(memory_limit_bytes=8000000000.0, cpu_limit_cores=4.0, memory_source='host', cpu_source='host')
    """
    return bound(pid, root, environ, host_memory, host_cores, affinity).limits


def _memory_limits(groups: Mapping[str, Group]) -> Iterator[tuple[int, str, str, float]]:
    for group in (groups.get("memory"), groups.get("")):
        for directory, name in group.ancestors() if group else ():
            if group is not None and group.version == 2:
                value = _number(_read(os.path.join(directory, "memory.max")))
            else:
                value = _number(_read(os.path.join(directory, "memory.limit_in_bytes")))
                if group is not None and directory == group.top:
                    # Ancestors above a container's mount are out of sight, but not their limit.
                    value = min(value or math.inf, _hierarchical(directory) or math.inf)
                value = value if value < V1_NO_LIMIT else 0.0
            if value and group is not None:
                yield group.version, directory, name, value


def _cpu_limits(groups: Mapping[str, Group]) -> Iterator[tuple[int, str, str, float]]:
    for group in (groups.get("cpu"), groups.get("")):
        for directory, name in group.ancestors() if group else ():
            if group is not None and group.version == 2:
                quota, _, period = _read(os.path.join(directory, "cpu.max")).partition(" ")
            else:
                quota = _read(os.path.join(directory, "cpu.cfs_quota_us"))
                period = _read(os.path.join(directory, "cpu.cfs_period_us"))
            allowed, per = _number(quota), _number(period)
            if allowed and per and group is not None:
                yield group.version, directory, name, allowed / per


def _beside(groups: Mapping[str, Group], of: str, directory: str, controller: str, file: str) -> str:
    """The directory of another controller at the very level of ``directory``, if it has a file.

    Empty where the process is not below it there: the trees of version 1 need not be alike.
    """
    group, other = groups.get(of), groups.get(controller)
    if group is None or other is None:
        return ""
    path = other.top + directory[len(group.top) :]
    inside = other.path == path or other.path.startswith(path + os.sep)
    return path if inside and os.path.isfile(os.path.join(path, file)) else ""


def _cpuset(groups: Mapping[str, Group]) -> tuple[int, str]:
    """How many CPUs the process' set has, and the directory of the group that says so."""
    for group in (groups.get("cpuset"), groups.get("")):
        # Where the controller is not switched on for the group, its nearest ancestor's set holds.
        for directory, _ in group.ancestors() if group else ():
            for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
                text = _read(os.path.join(directory, name))
                if text:
                    return count_cpus(text), directory
    return 0, ""


def _counted_beside_cpuset(groups: Mapping[str, Group], directory: str) -> tuple[int, str, str]:
    """(version, directory of ``cpu.stat``, directory of ``cpuacct.usage``) at the level of a CPU set.

    Nothing where that level counts no CPU time: then only the process' own tree is known to be in it.
    """
    if "cpuset" in groups:
        account = _beside(groups, "cpuset", directory, "cpuacct", "cpuacct.usage")
        return (1, _beside(groups, "cpuset", directory, "cpu", "cpu.stat"), account) if account else (0, "", "")
    return (2, directory, "") if os.path.isfile(os.path.join(directory, "cpu.stat")) else (0, "", "")


def _hierarchical(directory: str) -> float:
    for line in _lines(os.path.join(directory, "memory.stat")):
        if line.startswith("hierarchical_memory_limit "):
            return _number(line.split()[1])
    return 0.0


def _host_memory(root: str) -> float:
    for line in _lines(os.path.join(root, "proc/meminfo")):
        if line.startswith("MemTotal:"):
            return float(line.split()[1]) * 1024
    return math.inf


def _host_cores(root: str) -> float:
    return float(len(re.findall(r"(?m)^cpu\d", _read(os.path.join(root, "proc/stat"))))) or math.inf


def memory_files(version: int, directory: str) -> tuple[str, str, str]:
    """The files of a group's usage and of its statistics, and what the latter call the memory that can be dropped."""
    usage, inactive = (
        ("memory.usage_in_bytes", "total_inactive_file") if version == 1 else ("memory.current", "inactive_file")
    )
    return os.path.join(directory, usage), os.path.join(directory, "memory.stat"), inactive


def _counts_memory(version: int, directory: str) -> bool:
    usage, statistics, _ = memory_files(version, directory)
    return os.path.isfile(usage) and os.path.isfile(statistics)


def memory_place(found: Bound) -> tuple[int, str]:
    """(version, directory) where the group's memory is counted; (0, "") where only the host counts it.

    The level of the limit that won; without a limit, the process' own group.
    """
    if found.memory_dir:
        return found.memory_version, found.memory_dir
    for name, version in (("memory", 1), ("", 2)):
        group = found.groups.get(name)
        if group is None or group.version != version or not _inner(group):
            continue
        if os.path.isfile(os.path.join(group.path, ("memory.usage_in_bytes", "memory.current")[version - 1])):
            return version, group.path
    return 0, ""


def cpu_place(found: Bound) -> tuple[int, str, str]:
    """(version, directory of ``cpu.stat``, directory of v1's ``cpuacct.usage``); see ``memory_place``."""
    if found.cpu_version:
        return found.cpu_version, found.cpu_dir, found.cpuacct_dir
    account, unified = found.groups.get("cpuacct"), found.groups.get("")
    if account is not None and _inner(account):
        cpu = found.groups.get("cpu")
        return 1, cpu.path if cpu is not None and _inner(cpu) else "", account.path
    if unified is not None and _inner(unified) and os.path.isfile(os.path.join(unified.path, "cpu.stat")):
        return 2, unified.path, ""
    return 0, "", ""


def kill_files(found: Bound) -> tuple[str, ...]:
    """The files whose ``oom_kill`` lines add up to the kills at the level where memory is counted.

    Version 2 counts those of all groups below. Version 1 counts each group's own: then they are those
    of the process' group and of all between it and that level; sister groups stay out of sight.
    """
    version, directory = memory_place(found)
    if version == 2:
        names = [os.path.join(directory, "memory.events")]
    elif version == 1:
        names = []
        for path, _ in found.groups["memory"].ancestors():
            names.append(os.path.join(path, "memory.oom_control"))
            if path == directory:
                break
    else:
        names = []
    return tuple(name for name in names if os.path.isfile(name))


def pressure_dir(found: Bound) -> str:
    """The process' own group, if the kernel keeps its pressure; else empty, and the host's is to be taken."""
    group = found.groups.get("")
    if group is None or not _inner(group) or not os.path.isfile(os.path.join(group.path, "cpu.pressure")):
        return ""
    return group.path


def _inner(group: Group) -> bool:
    """Whether a group is not the machine's own.

    At the top of its mount, as a container with a namespace of its own sees itself, a file tells: the
    machine's group has no ``cgroup.events`` (version 2), and alone has ``release_agent`` (version 1).
    """
    if group.path != group.top:
        return True
    if group.version == 2:
        return os.path.isfile(os.path.join(group.path, "cgroup.events"))
    return not os.path.exists(os.path.join(group.path, "release_agent"))


def count_cpus(text: str) -> int:
    """Return how many CPUs a list such as ``0-2,7`` names.

    Examples
    --------
    >>> count_cpus("0-2,7")
    4
    """
    total = 0
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        if low.isdigit():
            total += int(high) - int(low) + 1 if high.isdigit() else 1
    return total


def _number(text: str) -> float:
    """A positive number, or 0.0 for ``max``, ``-1``, nothing and nonsense."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if value > 0 and math.isfinite(value) else 0.0


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found.group(1), 8)), text)


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as stream:
            return stream.read().strip()
    except OSError:
        return ""


def _lines(path: str) -> list[str]:
    return _read(path).splitlines()
