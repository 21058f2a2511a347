"""What psutil says: the path for systems without Linux' files, and the reference for those with them.

Whatever a system does not offer is NaN. What psutil leaves out there (a missing function, a missing
field, None) is no failure.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import psutil

from wiseflow_nb.records import NAN
from wiseflow_nb.resources import _linux
from wiseflow_nb.resources._apart import Apart
from wiseflow_nb.resources._tree import Totals


class PortableHost:
    """The machine's own figures; see ``LinuxHost`` for what each returns."""

    newest_process = 0

    def memory(self) -> tuple[float, float, float]:
        """Return total, available and used swap, in bytes."""
        memory = psutil.virtual_memory()
        swap = psutil.swap_memory() if hasattr(psutil, "swap_memory") else None
        return float(memory.total), float(memory.available), NAN if swap is None else float(swap.used)

    def cpu(self) -> tuple[float, float, float, float]:
        """Return CPU seconds since boot: total, idle, waiting for a disk, stolen."""
        times = psutil.cpu_times()
        waiting = getattr(times, "iowait", NAN)
        idle = times.idle + (waiting if waiting == waiting else 0.0)
        # Time of guests is part of user time; interrupts are part of system time on Windows.
        inside = ("guest", "guest_nice") if sys.platform != "win32" else ("interrupt", "dpc")
        total = sum(times) - sum(getattr(times, name, 0.0) for name in inside)
        return total, idle, waiting, getattr(times, "steal", NAN)

    def load(self) -> tuple[float]:
        """Return the load of one minute."""
        return (float(psutil.getloadavg()[0]) if hasattr(psutil, "getloadavg") else NAN,)

    def disk(self) -> tuple[float, float]:
        """Return bytes read and written by whole devices, since boot."""
        counters = _of_psutil("disk_io_counters", perdisk=True)
        if counters and sys.platform == "linux":
            # psutil lists partitions too, and devices made of others.
            whole = _linux.whole_devices()
            counters = {name: counter for name, counter in counters.items() if name in whole}
        if not counters:
            return NAN, NAN
        return (
            float(sum(counter.read_bytes for counter in counters.values())),
            float(sum(counter.write_bytes for counter in counters.values())),
        )

    def network(self, pid: int | None) -> tuple[float, float]:
        """Return bytes received and sent by all interfaces but the loopback, since boot."""
        counters = _of_psutil("net_io_counters", pernic=True)
        if not counters:
            return NAN, NAN
        counted = [
            counter
            for name, counter in counters.items()
            if name not in ("lo", "lo0") and not name.startswith("Loopback")
        ]
        return float(sum(item.bytes_recv for item in counted)), float(sum(item.bytes_sent for item in counted))

    def own_memory(self) -> float:
        """Return the resident bytes of the reading process."""
        return float(psutil.Process().memory_info().rss)

    def look_again(self) -> None:
        """Nothing is kept here."""


def _of_psutil(name: str, **options: bool) -> Any:
    """What a function of psutil's gives; None where this system, or its version, does not have it."""
    function = getattr(psutil, name, None)
    return None if function is None else function(**options)


class PortableTree:
    """Read a process and its descendants through psutil; see ``LinuxTree``.

    The time of children that have ended is known on Linux only: elsewhere the tree's CPU time falls
    when one ends.
    """

    def __init__(self, pid: int, exclude: frozenset[int], apart: Apart | None = None) -> None:
        self._pid, self._exclude, self._apart = pid, exclude, apart
        self._pids: list[int] = [pid]
        self._top: psutil.Process | None = None
        # It is bound to the process' start time: a later one with the same number is not it.
        with contextlib.suppress(psutil.Error):
            self._top = psutil.Process(pid)
        self._alive = self._top is not None

    @property
    def alive(self) -> bool:
        """Whether the process at the top has not ended, as far as is known."""
        return self._alive

    @property
    def ending(self) -> bool:
        """Whether the process at the top is over at this moment."""
        return self._top is None or _is_zombie(self._top)

    def pids(self) -> Sequence[int]:
        """The members, as of the last reading; none after the end."""
        return self._pids if self._alive else []

    def read(self, newest: int) -> Totals:
        """Return the totals.

        Raises
        ------
        ProcessLookupError
            When the process at the top has ended, from then on.
        """
        top = self._top
        if top is None or not self._alive or not top.is_running() or _is_zombie(top):
            self._alive = False
            raise ProcessLookupError(f"process {self._pid} has ended")
        totals = self._add_up(top)
        while self._apart is not None and self._apart.look(self._pids):
            totals = self._add_up(top)
        return totals if self._apart is None else (self._apart.taken_off(totals[0]), *totals[1:])

    def _add_up(self, top: psutil.Process) -> Totals:
        members = self._members(top)
        self._pids = [process.pid for process in members]
        cpu, resident, threads = 0.0, 0.0, 0.0
        for process in members:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied), process.oneshot():
                times = process.cpu_times()
                reaped = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
                one = (times.user + times.system + reaped, process.memory_info().rss, process.num_threads())
                # Only whole: of one that ends while it is read nothing is counted.
                cpu, resident, threads = cpu + one[0], resident + one[1], threads + one[2]
        return cpu, resident, float(len(members)), threads

    def descriptors(self) -> tuple[float]:
        """Return the open descriptors of the process at the top; Windows counts handles otherwise."""
        count = getattr(self._top, "num_fds", None)
        return (NAN if count is None else float(count()),)

    def pss(self) -> tuple[float]:
        """Return the tree's proportional memory, which Linux alone knows."""
        total = NAN
        if sys.platform == "linux":
            for pid in self.pids():
                with contextlib.suppress(psutil.NoSuchProcess):
                    one = getattr(psutil.Process(pid).memory_full_info(), "pss", NAN)
                    total = one if total != total else total + one
        return (float(total),)

    def _members(self, top: psutil.Process) -> list[psutil.Process]:
        found = [top]
        for process in top.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                above = {process.pid, *(item.pid for item in process.parents())} if self._exclude else set()
                if not above & self._exclude:
                    found.append(process)
        return found


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
