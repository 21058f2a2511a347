"""The process tree: a process, its children and theirs, counted together."""

from __future__ import annotations

import contextlib
import os
import time

import psutil

from wiseflow_nb.records import NAN
from wiseflow_nb.resources import _linux

PSS_SECONDS = 30.0
#: The dear reading of PSS may take this share of the time at most.
PSS_SHARE = 0.01
_GONE = (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess)


class ProcessTree:
    """Read a process and all its descendants.

    Parameters
    ----------
    pid
        The process at the top.
    root
        Where ``/proc`` is; for tests.
    exclude
        Processes that are not counted, nor what they started.
    portable
        Read through psutil only.
    files
        The kept files.
    """

    def __init__(self, pid: int, root: str, exclude: frozenset[int], portable: bool, files: _linux.KeptFiles) -> None:
        self.pid = pid
        self.alive = True
        self.pids: list[int] = [pid]
        self._proc = os.path.join(root, "proc")
        self._stat = f"{self._proc}/{pid}/stat"
        self._exclude, self._portable, self._files = exclude, portable, files
        # Some kernels and sandboxes do not offer the list of children.
        self._listed = not portable and os.path.exists(f"{self._proc}/{pid}/task/{pid}/children")
        self._mark = ""
        self._pss, self._pss_due = NAN, 0.0

    def read(self, values: dict[str, float]) -> None:
        """Fill CPU, memory, threads and number of the tree's processes.

        Raises
        ------
        ProcessLookupError
            When the process at the top has ended, from then on: its number may be another's later.
        """
        if self.alive:
            try:
                self._read(values)
            except _GONE:
                self.alive = False
        if not self.alive:
            self.pids = []
            raise ProcessLookupError(f"process {self.pid} has ended")

    def _read(self, values: dict[str, float]) -> None:
        cpu, threads, rss = self._top()
        self.pids = self._descendants()
        for pid in self.pids[1:]:
            try:
                one = self._one(pid)
            except (*_GONE, PermissionError, psutil.AccessDenied):
                continue  # it ended between the listing and the look, or is another user's
            cpu, threads, rss = cpu + one[0], threads + one[1], rss + one[2]
        values["process_cpu_seconds_total"] = cpu
        values["process_memory_rss_bytes"] = rss
        values["process_count"] = float(len(self.pids))
        values["process_threads"] = float(threads)

    def _top(self) -> tuple[float, int, float]:
        if self._portable:
            return self._one(self.pid)
        cpu, threads, rss, mark = _linux.process_stat(self._files.read(self._stat))
        self._mark = self._mark or mark
        if mark != self._mark or mark.startswith("Z"):
            raise ProcessLookupError(self.pid)
        return cpu, threads, rss

    def _one(self, pid: int) -> tuple[float, int, float]:
        if not self._portable:
            with open(f"{self._proc}/{pid}/stat", encoding="ascii", errors="replace") as stream:
                return _linux.process_stat(stream.read())[:3]
        process = psutil.Process(pid)
        times = process.cpu_times()
        reaped = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
        return times.user + times.system + reaped, process.num_threads(), float(process.memory_info().rss)

    def _descendants(self) -> list[int]:
        tree = [self.pid]
        if not self._listed:
            for process in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    above = {process.pid, *(item.pid for item in process.parents())} if self._exclude else set()
                    if not above & self._exclude:
                        tree.append(process.pid)
            return tree
        root = os.path.dirname(self._proc)
        for pid in tree:
            try:
                tree.extend(child for child in _linux.children(pid, root) if child not in self._exclude)
            except _GONE:
                if pid == self.pid:
                    raise
        return tree

    def descriptors(self, values: dict[str, float]) -> None:
        """Fill the open descriptors of the process at the top."""
        if not self.alive:
            return
        try:
            if not self._portable:
                values["process_open_fds"] = float(len(os.listdir(f"{self._proc}/{self.pid}/fd")))
            elif hasattr(psutil.Process, "num_fds"):
                values["process_open_fds"] = float(psutil.Process(self.pid).num_fds())
        except _GONE:
            return  # the reading of the process itself tells of its end

    def pss(self, values: dict[str, float]) -> None:
        """Fill the proportional memory, read on a slow cadence: it costs 19 ms a mapped GB."""
        if self._portable or not self.alive:
            return
        now = time.monotonic()
        if now >= self._pss_due:
            total = 0.0
            for pid in self.pids:
                with contextlib.suppress(OSError), open(f"{self._proc}/{pid}/smaps_rollup", encoding="ascii") as stream:
                    total += _linux.keyed(stream.read(), ("Pss",)).get("Pss", 0.0) * 1024
            cost = time.monotonic() - now
            self._pss, self._pss_due = total or NAN, now + max(PSS_SECONDS, cost / PSS_SHARE)
        values["process_memory_pss_bytes"] = self._pss

    def top(self, count: int) -> tuple[tuple[int, str, float, float], ...]:
        """The largest processes: (pid, name, resident bytes, CPU seconds)."""
        found = []
        for pid in self.pids:
            with contextlib.suppress(psutil.Error, OSError):
                process = psutil.Process(pid)
                cpu = process.cpu_times()
                found.append((pid, process.name(), float(process.memory_info().rss), cpu.user + cpu.system))
        return tuple(sorted(found, key=lambda item: -item[2])[:count])
