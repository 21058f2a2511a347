"""The only module that reads the operating system: one reading of everything, for any process.

Each part fills its own columns. A part that fails leaves NaN in them, says so once, and is tried
again later and later; the rest goes on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Mapping

import psutil

from wiseflow_nb.records import NAN, EventRecord, Limits, Sample
from wiseflow_nb.resources import _linux
from wiseflow_nb.resources._limits import Bound, bound, cpu_place, memory_place
from wiseflow_nb.resources._tree import ProcessTree

LIMITS_EVERY = 30
LONGEST_BACKOFF = 64
Values = dict[str, float]


class Probe:
    """Read the resources of a process, its container and its host.

    Parameters
    ----------
    pid
        The process whose tree and limits are read.
    disk_path
        A path on the file system that is watched; may be set anew between readings.
    root
        Where ``/proc`` and ``/sys`` are; for tests.
    exclude_pids
        Processes that are not counted in the tree.
    portable
        Read through psutil only (what other systems than Linux always do).

    Examples
    --------
    >>> probe = Probe(os.getpid())
    >>> sample = probe.read(time_seconds=0.0, monotonic_seconds=0.0, interval_seconds=NAN, gap=False)
    >>> sample.process_memory_rss_bytes > 0
    True
    >>> probe.close()
    """

    def __init__(
        self,
        pid: int,
        disk_path: str = ".",
        root: str = "/",
        exclude_pids: frozenset[int] = frozenset(),
        environ: Mapping[str, str] | None = None,
        portable: bool = False,
    ) -> None:
        self.pid = pid
        self.portable = portable or not os.path.isdir(os.path.join(root, "proc", "self"))
        self.disk_path = disk_path
        self._root, self._environ = root, environ
        self._proc_path = os.path.join(root, "proc")
        self._files = _linux.KeptFiles()
        self._tree = ProcessTree(pid, root, exclude_pids, self.portable, self._files)
        self._has_pressure = not self.portable and os.path.isdir(f"{self._proc_path}/pressure")
        self._events: list[EventRecord] = []
        self._failures: dict[str, int] = {}
        self._skip: dict[str, int] = {}
        self._reads = 0
        self._before: dict[str, float] = {}
        self._look_again()
        self._parts: tuple[tuple[str, Callable[[Values], None]], ...] = (
            ("host memory", self._host_memory),
            ("host cpu", self._host_cpu),
            ("load", self._load),
            ("pressure", self._pressure),
            ("processes", self._tree.read),
            ("descriptors", self._tree.descriptors),
            ("proportional memory", self._tree.pss),
            ("container memory", self._container_memory),
            ("container cpu", self._container_cpu),
            ("disk space", self._disk_space),
            ("disk counters", self._disk_counters),
            ("network counters", self._network),
            ("recorder", self._own_cost),
        )

    @property
    def limits(self) -> Limits:
        """The effective limits, as of the last look."""
        return self._bound.limits

    def read(
        self,
        *,
        time_seconds: float,
        monotonic_seconds: float,
        interval_seconds: float,
        gap: bool,
        settings_revision: int = 0,
    ) -> Sample:
        """Return one reading; the first one, and one after a gap, has no rates."""
        started = time.perf_counter()
        if self._reads and self._reads % LIMITS_EVERY == 0:
            self._look_again()
        self._reads += 1
        if gap:
            self._before.clear()
        values: Values = {}
        for name, part in self._parts:
            self._guarded(name, part, values, time_seconds)
        self._effective(values, monotonic_seconds)
        values.update(
            time_seconds=time_seconds,
            monotonic_seconds=monotonic_seconds,
            interval_seconds=interval_seconds,
            gap=float(gap),
            settings_revision=float(settings_revision),
            sample_duration_seconds=time.perf_counter() - started,
        )
        return Sample(**values)

    def take_events(self) -> list[EventRecord]:
        """What failed or works again since the last call."""
        taken, self._events = self._events, []
        return taken

    def top_processes(self, count: int = 3) -> tuple[tuple[int, str, float, float], ...]:
        """The largest processes of the tree: (pid, name, resident bytes, CPU seconds)."""
        return self._tree.top(count)

    def close(self) -> None:
        """Close the kept files."""
        self._files.close()

    def _guarded(self, name: str, part: Callable[[Values], None], values: Values, now: float) -> None:
        if self._skip.get(name, 0) > 0:
            self._skip[name] -= 1
            return
        try:
            part(values)
        except (OSError, ValueError, IndexError, KeyError, psutil.Error) as error:
            failures = self._failures[name] = self._failures.get(name, 0) + 1
            self._skip[name] = min(2 ** (failures - 1), LONGEST_BACKOFF)
            if failures == 1:
                self._events.append(EventRecord(now, "probe_failed", f"{name} cannot be read: {error}"))
        else:
            if self._failures.pop(name, 0):
                self._events.append(EventRecord(now, "probe_recovered", f"{name} can be read again"))

    def _look_again(self) -> None:
        """Find the limits and where usage is counted: a container's limits can change while it runs."""
        if not self.portable:
            self._devices = _linux.whole_devices(self._root)
        if self._reads and not self._tree.alive:
            return
        found = self._find_bound()
        if self._reads and found == self._bound:
            return
        # Counters of another level must not be compared with those of this one.
        self._before.pop("effective cpu", None)
        self._files.close()
        self._bound: Bound = found
        self._memory_at = memory_place(found)
        self._cpu_at = cpu_place(found)

    def _find_bound(self) -> Bound:
        affinity = None
        if self._root == "/":
            with contextlib.suppress(OSError, AttributeError, psutil.Error):
                affinity = len(psutil.Process(self.pid).cpu_affinity() or ())
        return bound(
            self.pid if os.path.isdir(f"{self._proc_path}/{self.pid}") else "self",
            self._root,
            self._environ,
            host_memory=float(psutil.virtual_memory().total) if self.portable else None,
            host_cores=float(psutil.cpu_count() or 1) if self.portable else None,
            affinity=affinity,
        )

    def _proc(self, name: str, first: int = 0) -> str:
        return self._files.read(f"{self._proc_path}/{name}", first)

    # The parts.

    def _host_memory(self, values: Values) -> None:
        if self.portable:
            memory, swap = psutil.virtual_memory(), psutil.swap_memory()
            total, available, used = float(memory.total), float(memory.available), float(swap.used)
        else:
            found = _linux.keyed(self._proc("meminfo"), ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree"))
            total, available = found["MemTotal"] * 1024, found["MemAvailable"] * 1024
            used = (found["SwapTotal"] - found["SwapFree"]) * 1024
        values["system_memory_total_bytes"] = total
        values["system_memory_available_bytes"] = available
        values["system_swap_used_bytes"] = used

    def _host_cpu(self, values: Values) -> None:
        if self.portable:
            times = psutil.cpu_times()
            idle = times.idle + getattr(times, "iowait", 0.0)
            iowait, steal = getattr(times, "iowait", NAN), getattr(times, "steal", NAN)
            # guest time is part of user time.
            total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        else:
            ticks = [int(item) / _linux.CLOCK_TICKS for item in self._proc("stat", 1024).split("\n", 1)[0].split()[1:9]]
            idle, iowait, steal, total = ticks[3] + ticks[4], ticks[4], ticks[7], sum(ticks)
        elapsed = self._change("cpu total", total)
        if elapsed > 0:
            values["system_cpu_utilization_ratio"] = _ratio(1.0 - self._change("cpu idle", idle) / elapsed)
            values["system_cpu_iowait_ratio"] = _ratio(self._change("cpu iowait", iowait) / elapsed)
            values["system_cpu_steal_ratio"] = _ratio(self._change("cpu steal", steal) / elapsed)
        else:
            for name, value in (("cpu idle", idle), ("cpu iowait", iowait), ("cpu steal", steal)):
                self._change(name, value)

    def _load(self, values: Values) -> None:
        values["system_load1"] = float(psutil.getloadavg()[0] if self.portable else self._proc("loadavg").split()[0])

    def _pressure(self, values: Values) -> None:
        if not self._has_pressure:
            return
        try:
            for name in ("cpu", "memory", "io"):
                text = self._proc(f"pressure/{name}")
                values[f"pressure_{name}_waiting_seconds_total"] = _linux.pressure_seconds(text)
        except OSError as error:
            # Built in, but switched off at boot: not offered is not a failure.
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTSUP):
                raise
            self._has_pressure = False

    def _container_memory(self, values: Values) -> None:
        version, directory = self._memory_at
        if not directory:
            return
        if version == 2:
            usage = float(self._files.read(f"{directory}/memory.current"))
            cache = _linux.keyed(self._files.read(f"{directory}/memory.stat"), ("inactive_file",))["inactive_file"]
            kills = _linux.keyed(self._files.read(f"{directory}/memory.events"), ("oom_kill",)).get("oom_kill", NAN)
        else:
            usage = float(self._files.read(f"{directory}/memory.usage_in_bytes"))
            found = _linux.keyed(self._files.read(f"{directory}/memory.stat"), ("total_inactive_file", "inactive_file"))
            cache = found.get("total_inactive_file", found.get("inactive_file", 0.0))
            kills = _linux.keyed(self._files.read(f"{directory}/memory.oom_control"), ("oom_kill",)).get(
                "oom_kill", NAN
            )
        values["container_memory_usage_bytes"] = usage
        values["container_memory_oom_kills_total"] = kills
        if self._bound.memory_dir:
            values["memory_working_set_bytes"] = max(usage - cache, 0.0)

    def _container_cpu(self, values: Values) -> None:
        version, directory, account = self._cpu_at
        if version == 1:
            if account:
                values["container_cpu_seconds_total"] = float(self._files.read(f"{account}/cpuacct.usage")) / 1e9
            if directory:
                found = _linux.keyed(self._files.read(f"{directory}/cpu.stat"), ("throttled_time",))
                values["container_cpu_throttled_seconds_total"] = found.get("throttled_time", NAN) / 1e9
        elif version == 2:
            found = _linux.keyed(self._files.read(f"{directory}/cpu.stat"), ("usage_usec", "throttled_usec"))
            values["container_cpu_seconds_total"] = found["usage_usec"] / 1e6
            values["container_cpu_throttled_seconds_total"] = found.get("throttled_usec", NAN) / 1e6

    def _disk_space(self, values: Values) -> None:
        if hasattr(os, "statvfs") and not self.portable:
            status = os.statvfs(self.disk_path)
            size, avail = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
            used = (status.f_blocks - status.f_bfree) * status.f_frsize
        else:
            usage = psutil.disk_usage(self.disk_path)
            size, used, avail = usage.total, usage.used, usage.free
        values["filesystem_size_bytes"] = float(size)
        values["filesystem_avail_bytes"] = float(avail)
        # As df does: what is reserved for root is neither used nor available.
        values["filesystem_utilization_ratio"] = used / (used + avail) if used + avail else NAN

    def _disk_counters(self, values: Values) -> None:
        if self.portable:
            counters = psutil.disk_io_counters()
            if counters is None:
                return
            read, written = float(counters.read_bytes), float(counters.write_bytes)
        else:
            read, written = _linux.disk_bytes(self._proc("diskstats"), self._devices)
        values["disk_read_bytes_total"] = read
        values["disk_written_bytes_total"] = written

    def _network(self, values: Values) -> None:
        if self.portable:
            counters = psutil.net_io_counters(pernic=True)
            names = [name for name in counters if name != "lo" and not name.startswith("Loopback") and name != "lo0"]
            received = float(sum(counters[name].bytes_recv for name in names))
            sent = float(sum(counters[name].bytes_sent for name in names))
        else:
            received, sent = _linux.network_bytes(self._proc(f"{self.pid if self._tree.alive else 'self'}/net/dev"))
        values["network_receive_bytes_total"] = received
        values["network_transmit_bytes_total"] = sent

    def _own_cost(self, values: Values) -> None:
        values["recorder_cpu_seconds_total"] = time.process_time()
        if self.portable:
            values["recorder_memory_rss_bytes"] = float(psutil.Process().memory_info().rss)
        else:
            values["recorder_memory_rss_bytes"] = float(int(self._proc("self/statm").split()[1]) * _linux.PAGE_BYTES)

    # What all of it amounts to.

    def _effective(self, values: Values, now: float) -> None:
        """Compare each limit with the usage of the very level that it binds."""
        found = self._bound
        limit, source = found.limits.memory_limit_bytes, found.limits.memory_source
        if source == "host":
            total, available = (
                values.get("system_memory_total_bytes", NAN),
                values.get("system_memory_available_bytes", NAN),
            )
            values["memory_working_set_bytes"] = total - available
        elif source.startswith("environment"):
            values["memory_working_set_bytes"] = values.get("process_memory_rss_bytes", NAN)
        used = values.get("memory_working_set_bytes", NAN)
        values["memory_limit_bytes"] = limit
        # A group may be allowed more than the machine has left.
        spare = values.get("system_memory_available_bytes", NAN)
        values["memory_available_bytes"] = max(min(limit - used, spare), 0.0) if used == used else NAN
        values["memory_utilization_ratio"] = used / limit
        cores, source = found.limits.cpu_limit_cores, found.limits.cpu_source
        values["cpu_limit_cores"] = cores
        if source == "host":
            values["cpu_utilization_ratio"] = values.get("system_cpu_utilization_ratio", NAN)
            return
        # Affinity, cpuset and the environment bind this tree of processes; so does a group of v1
        # whose CPU time is counted elsewhere.
        counted = source.startswith("cgroup") and (self._cpu_at[0] == 2 or self._cpu_at[2])
        used = values.get("container_cpu_seconds_total" if counted else "process_cpu_seconds_total", NAN)
        elapsed = self._change("effective time", now)
        change = self._change("effective cpu", used)
        if elapsed > 0 and change == change:
            values["cpu_utilization_ratio"] = max(change, 0.0) / elapsed / cores

    def _change(self, name: str, value: float) -> float:
        """The change since the last reading; NaN at the first."""
        before = self._before.get(name, NAN)
        self._before[name] = value
        return value - before


def _ratio(value: float) -> float:
    return min(max(value, 0.0), 1.0) if value == value else NAN
