"""One reading of everything, for any process: the columns of a ``Sample``.

The only door to the operating system. Each part fills its own columns; one that fails leaves NaN in
them, says so once, and is tried again later and later; the rest goes on.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from time import thread_time

import psutil

from wiseflow_nb.records import NAN, EventRecord, Limits, Sample
from wiseflow_nb.resources._apart import Apart
from wiseflow_nb.resources._container import PRESSURES, Container
from wiseflow_nb.resources._disk import Disk, Disks
from wiseflow_nb.resources._files import KeptFiles
from wiseflow_nb.resources._host import Host, LinuxHost
from wiseflow_nb.resources._limits import Bound, bound, kill_files
from wiseflow_nb.resources._linux import CLOCK_TICKS
from wiseflow_nb.resources._part import CHEAP_SECONDS, FAILURES, Part, Values
from wiseflow_nb.resources._portable import PortableHost, PortableTree
from wiseflow_nb.resources._together import Together
from wiseflow_nb.resources._tree import PSS_SECONDS, LinuxTree, Tree

#: A container's limits can change while it runs: they are looked at again after so long.
LIMITS_SECONDS = 30.0
#: In such steps the kernel tells the CPU time of processes.
TICK_SECONDS = 1.0 / CLOCK_TICKS
#: In the watched process itself a file system that hangs must hold up neither the sampling nor a cell.
PATIENCE_SECONDS = 2.0
LINUX_FILES, PSUTIL = "linux files", "psutil"
LINUX = sys.platform == "linux"
#: What a limit binds: the machine, a control group, or this tree of processes alone.
HOST, GROUP, TREE = range(3)

_UNKNOWN: Values = (NAN,)
#: What rates go by: the host's times, when and how much CPU time the bound level had used, and its last rate.
_Before = tuple[tuple[float, float, float, float] | None, tuple[float, float] | None, float]
INF = math.inf
_new: Callable[[type[Sample], tuple[float, ...]], Sample] = tuple.__new__


class Probe:
    """Read the resources of a process, its container and its host.

    Parameters
    ----------
    pid
        The process whose tree and limits are read.
    disk_path
        A path on the file system that is watched, or several with ``os.pathsep`` between them: then
        the columns are those of the fullest. May be set anew between readings.
    root
        Where ``/proc`` and ``/sys`` are; for tests.
    exclude_pids
        Processes that are not counted in the tree. When one ends, and is waited for by a process of the
        tree, what it had used by the reading before is taken off the tree's CPU time.
    environ
        Default ``os.environ``; see ``effective_limits``.
    portable
        Read through psutil only (what other systems than Linux always do).
    timer
        What parts' costs are measured with, in seconds; for tests.
    left_seconds
        CPU seconds of processes like those excluded that were waited for before; taken off as well.
    patience
        Seconds for which a file system is waited for, on a thread beside this one: one that hangs costs its
        columns, and is told. Default None: for ever, without another thread.

    Notes
    -----
    The two paths give the same figures within: nothing for sizes, limits, counts of processes, and
    the counters of disks and network; 10 ms a process for CPU time; what the kernel counts lazily for
    resident memory (32 pages a CPU and process, up to 6.1 MB on four CPUs). psutil has no figures of
    the container; they come from its files on both paths.

    Examples
    --------
    >>> probe = Probe(os.getpid())
    >>> sample = probe.read(time_seconds=0.0, monotonic_seconds=0.0, interval_seconds=NAN, gap=False)
    >>> sample.process_memory_rss_bytes > 0
    True
    >>> probe.close()
    """

    # With so many attributes a dictionary takes two walks through cold memory for each of them.
    __slots__ = (
        "_aside",
        "_bound",
        "_container",
        "_cores_used",
        "_cpu",
        "_cpu_before",
        "_dear",
        "_disk",
        "_disks",
        "_environ",
        "_events",
        "_fds",
        "_files",
        "_group_cpu",
        "_group_memory",
        "_host",
        "_host_before",
        "_in_kernel",
        "_levels",
        "_load",
        "_look_due",
        "_memory",
        "_network",
        "_own_cpu",
        "_parts",
        "_patience",
        "_pressure",
        "_processes",
        "_pss",
        "_recorder",
        "_root",
        "_seen",
        "_timer",
        "_together",
        "_told",
        "_tree",
        "pid",
        "portable",
    )

    def __init__(
        self,
        pid: int,
        disk_path: str = ".",
        root: str = "/",
        exclude_pids: frozenset[int] = frozenset(),
        environ: Mapping[str, str] | None = None,
        portable: bool = False,
        timer: Callable[[], float] = time.perf_counter,
        left_seconds: float = 0.0,
        patience: float | None = None,
    ) -> None:
        self.pid = pid
        self.portable = portable or not os.path.isdir(os.path.join(root, "proc", "self"))
        self._root, self._environ, self._timer = root, environ, timer
        self._patience = patience
        self._disks = Disks(disk_path, self.portable, patience)
        self._files = files = KeptFiles()
        host: Host = PortableHost() if self.portable else LinuxHost(root, files)
        self._host = host
        tree: Tree
        if self.portable:
            # Elsewhere nobody takes over the time of those that ended.
            tree = PortableTree(pid, exclude_pids, Apart("/proc", exclude_pids, files, left_seconds) if LINUX else None)
        else:
            tree = LinuxTree(pid, root, exclude_pids, files, left_seconds)
        self._tree = tree
        self._container = container = Container(root, files)
        self._told: list[tuple[str, str]] = []
        self._events: list[EventRecord] = []
        self._host_before: tuple[float, float, float, float] | None = None
        self._cpu_before: tuple[float, float] | None = None
        self._cores_used = NAN
        #: The three of above for ``read_now``; None: those of the last ``read``.
        self._aside: _Before | None = None
        # In the watched process itself its CPU time is not the recorder's.
        self._in_kernel = pid == os.getpid()
        self._own_cpu = 0.0
        self._dear = False
        self._seen = False
        self._together: Together | None = None
        self._look_due = math.inf
        self._bind(self._find_bound())
        self._load = Part("load", ("system_load1",), host.load)
        self._memory = Part(
            "host memory",
            ("system_memory_total_bytes", "system_memory_available_bytes", "system_swap_used_bytes"),
            host.memory,
        )
        self._cpu = Part(
            "host cpu",
            ("system_cpu_utilization_ratio", "system_cpu_iowait_ratio", "system_cpu_steal_ratio"),
            self._host_cpu,
        )
        self._group_cpu = Part(
            "container cpu",
            ("container_cpu_seconds_total", "container_cpu_throttled_seconds_total"),
            container.cpu,
        )
        self._group_memory = Part(
            "container memory",
            ("container_memory_usage_bytes", "container_memory_oom_kills_total"),
            container.memory,
        )
        self._pressure = Part(
            "pressure",
            tuple(f"pressure_{name}_waiting_seconds_total" for name in PRESSURES),
            container.pressure,
        )
        self._disk = Part("disk counters", ("disk_read_bytes_total", "disk_written_bytes_total"), host.disk)
        self._network = Part(
            "network counters",
            ("network_receive_bytes_total", "network_transmit_bytes_total"),
            self._interfaces,
        )
        self._processes = Part(
            "processes",
            ("process_cpu_seconds_total", "process_memory_rss_bytes", "process_count", "process_threads"),
            lambda: tree.read(host.newest_process),
        )
        self._pss = Part("proportional memory", ("process_memory_pss_bytes",), tree.pss, every=PSS_SECONDS)
        self._fds = Part("descriptors", ("process_open_fds",), tree.descriptors)
        self._recorder = Part("recorder", ("recorder_cpu_seconds_total", "recorder_memory_rss_bytes"), self._own_cost)
        # Those that are read together as long as all of them are well.
        self._parts = (
            *(self._load, self._memory, self._cpu, self._group_cpu, self._group_memory, self._pressure),
            *(self._disk, self._processes, self._fds, self._network, self._recorder),
        )

    @property
    def path(self) -> str:
        """Which way the figures come: ``"linux files"`` or ``"psutil"``."""
        return PSUTIL if self.portable else LINUX_FILES

    @property
    def limits(self) -> Limits:
        """The effective limits, as of the last look."""
        return self._bound.limits

    @property
    def kill_files(self) -> tuple[str, ...]:
        """Where the OOM kills are counted that bear on the process; empty where nothing counts them."""
        return kill_files(self._bound)

    @property
    def disk_path(self) -> str:
        """The watched path, or paths with ``os.pathsep`` between them."""
        return self._disks.text

    @disk_path.setter
    def disk_path(self, text: str) -> None:
        if text != self._disks.text:
            self._disks.close()
            self._disks = Disks(text, self.portable, self._patience)

    def disks(self) -> tuple[Disk, ...]:
        """Each watched path's file system, as of the last reading; NaN before the first."""
        return self._disks.records()

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
        now, timer = monotonic_seconds, self._timer
        started = timer()
        # The parts are timed one by one when the last reading was dear as a whole.
        dear = self._dear
        own, disks = thread_time() if self._in_kernel else 0.0, self._disks
        beside = disks.cpu_seconds if self._patience is not None else 0.0
        if self._files.forked:
            self._files.after_fork()
        if now >= self._look_due or self._look_due == INF:
            if self._look_due != math.inf:
                self._look_again()
            self._look_due = now + LIMITS_SECONDS
            self._together = None
        self._aside = None
        if gap:
            self._host_before = self._cpu_before = None
            self._cores_used = NAN
        together = None
        if self._together is not None and not dear:
            try:
                together = self._together.read(self._disks)
            except FAILURES:
                # The parts find out which of them it is, and go on without it.
                self._together = None
        if together is not None:
            load, memory, ticks, group_cpu, group_memory, pressure, disk, network, own_memory, tree, fds, space = (
                together
            )
            cpu = self._host_rates(ticks)
            cpu_seconds, resident, count, threads = tree
            # What is read so seldom is seldom asked for.
            pss = self._pss.held if now < self._pss.due else self._pss.values(now, self._tell, timer, dear)
            recorder: Values = (self._own_cpu if self._in_kernel else time.process_time(), own_memory)
        else:
            tell = self._tell
            # Before the processes: it names the newest one.
            load = self._load.values(now, tell, timer, dear)
            memory = self._memory.values(now, tell, timer, dear)
            cpu = self._cpu.values(now, tell, timer, dear)
            group_cpu = self._group_cpu.values(now, tell, timer, dear)
            group_memory = self._group_memory.values(now, tell, timer, dear)
            pressure = self._pressure.values(now, tell, timer, dear)
            space = self._disks.values(now, tell, timer, dear)
            disk = self._disk.values(now, tell, timer, dear)
            cpu_seconds, resident, count, threads = self._processes.values(now, tell, timer, dear)
            pss = fds = _UNKNOWN
            self._seen = count == count
            # Only of a process that was found: one that is hidden or over is told once.
            if self._seen:
                pss = self._pss.values(now, tell, timer, dear)
                fds = self._fds.values(now, tell, timer, dear)
            network = self._network.values(now, tell, timer, dear)
            recorder = self._recorder.values(now, tell, timer, dear)
            self._plan(dear)
        effective = self._effective(now, memory, cpu[0], group_cpu[0], cpu_seconds, resident)
        if self._told:
            self._events += [EventRecord(time_seconds, kind, message) for kind, message in self._told]
            self._told = []
        if self._in_kernel:
            self._own_cpu += thread_time() - own
            if self._patience is not None:
                self._own_cpu += disks.cpu_seconds - beside
        duration = timer() - started
        self._dear = duration > CHEAP_SECONDS
        # Groups of columns in the order of the schema.
        return _new(
            Sample,
            (
                *(time_seconds, now, interval_seconds, float(gap), duration),
                *effective,
                *group_cpu,
                *group_memory,
                *cpu,
                *memory,
                *load,
                *pressure,
                *space,
                *disk,
                *network,
                *(cpu_seconds, resident, *pss, count, threads, *fds),
                *recorder,
                float(settings_revision),
            ),
        )

    def read_now(self, *, time_seconds: float, monotonic_seconds: float) -> Sample:
        """Return one reading beside the others: the rates of each ``read`` are as if it had not been.

        Its own rates go from the newest reading of either kind to this one.
        """
        bound, kept = self._bound, (self._host_before, self._cpu_before, self._cores_used)
        if self._aside is not None:
            self._host_before, self._cpu_before, self._cores_used = self._aside
        try:
            return self.read(
                time_seconds=time_seconds, monotonic_seconds=monotonic_seconds, interval_seconds=NAN, gap=False
            )
        finally:
            self._aside = (self._host_before, self._cpu_before, self._cores_used)
            self._host_before, self._cpu_before, self._cores_used = kept
            if self._bound is not bound:
                # The kept counters are those of another level.
                self._cpu_before, self._cores_used = None, NAN

    def take_events(self) -> list[EventRecord]:
        """What failed, works again or is read less often since the last call."""
        taken, self._events = self._events, []
        return taken

    def top_processes(self, count: int = 3) -> tuple[tuple[int, str, float, float], ...]:
        """The largest processes of the tree: (pid, name, resident bytes, CPU seconds)."""
        found = []
        for pid in self._tree.pids():
            with contextlib.suppress(*FAILURES):
                process = psutil.Process(pid)
                cpu = process.cpu_times()
                found.append((pid, process.name(), float(process.memory_info().rss), cpu.user + cpu.system))
        return tuple(sorted(found, key=lambda item: -item[2])[:count])

    def rest(self) -> None:
        """Let the thread end that waits for file systems: there is no next reading for a while."""
        self._disks.close()

    def close(self) -> None:
        """Close the kept files; what is read later is opened anew."""
        self._files.close()
        self.rest()

    def _tell(self, kind: str, message: str) -> None:
        self._told.append((kind, message))
        if kind == "probe_failed" and message.startswith("container"):
            # Moved to another group, perhaps: at the next reading it is looked for.
            self._look_due = -math.inf

    def _look_again(self) -> None:
        """Find the limits anew, and where usage is counted."""
        self._host.look_again()
        if not self._tree.alive:
            return
        found = self._find_bound()
        # Looked at afterwards: one that ends is told to be in the top group of version 1, from the moment
        # at which its memory begins to be given back.
        if self._tree.ending:
            return
        # Hidden from us all of a sudden: what bound us binds on, as far as we know.
        if found == self._bound or (self._bound.groups and not found.groups):
            return
        # Counters of another level must not be compared with those of this one.
        self._cpu_before, self._cores_used = None, NAN
        self._bind(found)

    def _bind(self, found: Bound) -> None:
        """Compare with these limits from now on, and read usage at their levels."""
        limits = found.limits
        counted = GROUP if found.cpu_is_counted else TREE
        cpu_level = HOST if limits.cpu_source == "host" else counted
        given = limits.memory_source.startswith("environment")
        memory_level = HOST if limits.memory_source == "host" else TREE if given else GROUP
        self._bound = found
        self._levels = (limits.cpu_limit_cores, limits.memory_limit_bytes, cpu_level, memory_level)
        self._container.place(found)

    def _find_bound(self) -> Bound:
        affinity = None
        if self._root == "/":
            with contextlib.suppress(*FAILURES):
                affinity = (
                    len(os.sched_getaffinity(self.pid))
                    if hasattr(os, "sched_getaffinity")
                    else len(psutil.Process(self.pid).cpu_affinity() or ())
                )
        return bound(
            self.pid if os.path.isdir(os.path.join(self._root, "proc", str(self.pid))) else "self",
            self._root,
            self._environ,
            host_memory=float(psutil.virtual_memory().total) if self.portable else None,
            host_cores=float(psutil.cpu_count() or 1) if self.portable else None,
            affinity=affinity,
        )

    def _plan(self, dear: bool) -> None:
        """Read all together from the next reading on, if all is well."""
        host, tree = self._host, self._tree
        self._together = None
        if not isinstance(host, LinuxHost) or not isinstance(tree, LinuxTree) or not self._seen or dear:
            return
        if not any(part.watched for part in self._parts) and not self._disks.watched:
            self._together = Together(host, self._container, tree, self._files, not self._in_kernel)

    def _host_cpu(self) -> Values:
        return self._host_rates(self._host.cpu())

    def _host_rates(self, times: tuple[float, float, float, float]) -> Values:
        before = self._host_before
        elapsed = NAN if before is None else times[0] - before[0]
        if before is None or elapsed <= 0:
            # Two readings within one tick of the kernel's: the next one compares with the older.
            self._host_before = before or times
            return NAN, NAN, NAN
        self._host_before = times
        busy, waiting, stolen = (
            1.0 - (times[1] - before[1]) / elapsed,
            (times[2] - before[2]) / elapsed,
            (times[3] - before[3]) / elapsed,
        )
        if 0.0 <= busy <= 1.0 and 0.0 <= waiting <= 1.0 and 0.0 <= stolen <= 1.0:
            return busy, waiting, stolen
        return _ratio(busy), _ratio(waiting), _ratio(stolen)

    def _interfaces(self) -> Values:
        try:
            # Those of the process' own network; of ours, when it is over.
            return self._host.network(self.pid if self._tree.alive else None)
        except FileNotFoundError:
            if self._seen:
                raise
            return NAN, NAN  # hidden as the process is, which was told

    def _own_cost(self) -> Values:
        """The recorder's CPU seconds and resident bytes; in the watched process itself, the sampling alone."""
        if self._in_kernel:
            return self._own_cpu, NAN
        return time.process_time(), self._host.own_memory()

    # What all of it amounts to.

    def _effective(
        self, now: float, memory: Values, host_cpu: float, group_cpu: float, tree_cpu: float, resident: float
    ) -> Values:
        """Compare each limit with the usage of the very level that it binds."""
        cores, limit, cpu_level, memory_level = self._levels
        if cpu_level == HOST:
            utilization = host_cpu
        else:
            # Affinity and the environment bind this tree of processes; so does a group whose CPU time
            # is counted elsewhere.
            used, part = (group_cpu, self._group_cpu) if cpu_level == GROUP else (tree_cpu, self._processes)
            least = 0.0 if cpu_level == GROUP else TICK_SECONDS
            utilization = self._rate(used, now, least, part.slow) / cores
        total, spare, _ = memory
        if memory_level == HOST:
            used = total - spare
        else:
            used = self._container.working_set if memory_level == GROUP else resident
        # A group may be allowed more than the machine, or a group above it, has left.
        available = NAN
        if used == used:
            available, elsewhere = limit - used, self._container.left_elsewhere
            if elsewhere < available:
                available = elsewhere
            if spare < available:
                available = spare
            if available < 0.0:
                available = 0.0
        if limit == math.inf:
            return cores, utilization, NAN, used, spare, NAN
        return cores, utilization, limit, used, available, used / limit

    def _rate(self, used: float, now: float, least: float, slow: bool) -> float:
        """CPU seconds a second since the last reading that had them; NaN at the first.

        NaN, too, where fewer are counted than before: a process left the tree with its time. And where no
        more than ``least`` seconds, of what the counter is told in, went by: then the next reading is
        compared with the one before this.
        Where they are read less often than samples are taken, the samples between repeat the last one.
        """
        if used != used:
            return self._cores_used if slow else NAN
        before = self._cpu_before
        if before is not None and 0.0 <= now - before[0] <= least:
            return NAN
        self._cpu_before = (now, used)
        if before is None or now <= before[0] or used < before[1]:
            self._cores_used = NAN
        else:
            self._cores_used = (used - before[1]) / (now - before[0])
        return self._cores_used


def _ratio(value: float) -> float:
    return min(max(value, 0.0), 1.0) if value == value else NAN
