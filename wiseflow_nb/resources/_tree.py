"""The process tree, read from Linux' own files: a process, its children and theirs, counted together."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from typing import Protocol

import psutil

from wiseflow_nb.records import NAN
from wiseflow_nb.resources import _linux
from wiseflow_nb.resources._apart import Apart
from wiseflow_nb.resources._files import KeptFiles, Source

#: PSS is read so seldom, and more seldom where it is dear: it costs 19 ms a mapped GB.
PSS_SECONDS = 30.0
#: Even where nothing seems to have been started, the children are listed again after so many readings.
LIST_EVERY = 10
#: A tree that changes under us is read again, so often.
PASSES = 3
GONE = (FileNotFoundError, ProcessLookupError)

#: (CPU seconds with those of reaped children, resident bytes, processes, threads).
Totals = tuple[float, float, float, float]


class Tree(Protocol):
    """What the probe needs of a process tree; see ``LinuxTree`` and ``PortableTree``."""

    @property
    def alive(self) -> bool: ...

    @property
    def ending(self) -> bool: ...

    def read(self, newest: int) -> Totals: ...

    def descriptors(self) -> tuple[float]: ...

    def pss(self) -> tuple[float]: ...

    def pids(self) -> Sequence[int]: ...


class LinuxTree:
    """Read a process and all its descendants; ``/proc/<pid>/stat`` of each stays open.

    Who is in the tree is looked up only where it can have changed: when the number of the newest
    process (``/proc/loadavg`` names it) is another than at the last reading, or when a member ended
    or got another parent. A number that is used again is noticed by the start time, and a kept
    descriptor never shows the later process.

    Parameters
    ----------
    pid
        The process at the top.
    root
        Where ``/proc`` is; for tests.
    exclude
        Processes that are not counted, nor what they started; nor their time, once they were waited for.
    files
        The kept files.
    left_seconds
        CPU seconds of such processes that were waited for before.
    """

    __slots__ = (
        "_alive",
        "_apart",
        "_exclude",
        "_fds",
        "_files",
        "_listed",
        "_listings_left",
        "_members",
        "_newest",
        "_pages",
        "_pid",
        "_proc",
        "_root",
        "_settled",
        "_start",
        "_threads",
        "_ticks",
        "counted_fds",
        "generation",
    )

    def __init__(
        self, pid: int, root: str, exclude: frozenset[int], files: KeptFiles, left_seconds: float = 0.0
    ) -> None:
        self._pid = pid
        self._root, self._proc = root, os.path.join(root, "proc")
        self._exclude, self._files = exclude, files
        self._apart = Apart(self._proc, exclude, files, left_seconds) if exclude or left_seconds else None
        self._alive = True
        self._members: dict[int, _Member] = {pid: _Member(self._proc, pid)}
        #: Another one as soon as ``stats`` are others, or their values.
        self.generation = 0
        # Some kernels and sandboxes do not offer the list of children.
        self._listed = os.path.exists(f"{self._proc}/{pid}/task/{pid}/children")
        self._newest = self._listings_left = 0
        # Over the members, as of their last rows.
        self._ticks = self._threads = self._pages = 0
        self._settled = False
        self._fds = f"{self._proc}/{pid}/fd"
        #: The directory whose size is the number of open descriptors, if there is one.
        self.counted_fds = ""
        self._start = b""
        # Known from the start: a process that ends before the first reading must not be taken for a later one.
        with contextlib.suppress(OSError, ValueError, IndexError):
            self._start = self._look(self._members[pid])[1]

    @property
    def alive(self) -> bool:
        """Whether the process at the top has not ended, as far as is known."""
        return self._alive

    @property
    def ending(self) -> bool:
        """Whether the process at the top is on its way out, or over, at this moment."""
        try:
            with open(f"{self._proc}/{self._pid}/stat", "rb") as stream:
                return _linux.is_ending(stream.read(1024))
        except (OSError, ValueError, IndexError):
            return True

    def pids(self) -> Sequence[int]:
        """The members, as of the last reading; none after the end."""
        return list(self._members) if self._alive else []

    def read(self, newest: int) -> Totals:
        """Return the totals; ``newest`` is the number of the newest process, 0 if it is not known.

        Raises
        ------
        ProcessLookupError
            When the process at the top has ended, from then on: its number may be another's later.
        OSError
            If it cannot be seen.
        """
        totals = self._sum() if self._is_known(newest) else None
        if totals is None:
            totals = self._list()
        return totals if self._apart is None else self._without(self._apart, totals)

    @property
    def stats(self) -> list[Source]:
        """What says each member's figures; to be asked for anew with each ``generation``.

        Reading one raises ``LookupError`` where it is no longer the process it was.
        """
        return [Source(one.stat, functools.partial(self._keep, one), 1024) for one in self._members.values()]

    def totals(self, newest: int) -> Totals:
        """Return what ``read`` does, where ``stats`` have been read just now.

        Raises
        ------
        OSError
            As ``read`` does.
        """
        if newest == self._newest and newest > 0 and self._settled and self._listings_left > 0 and self._alive:
            self._listings_left -= 1
        # Stats first, children later: who started or ended between the two is noticed.
        elif not (self._is_known(newest) or self._same_children()):
            totals = self._list()
            return totals if self._apart is None else self._without(self._apart, totals)
        totals = (
            self._ticks / _linux.CLOCK_TICKS,
            float(self._pages * _linux.PAGE_BYTES),
            float(len(self._members)),
            float(self._threads),
        )
        return totals if self._apart is None else self._without(self._apart, totals)

    def _without(self, apart: Apart, totals: Totals) -> Totals:
        # Looked at after the members: what was still there then was in nobody's time when they were read.
        while apart.look(self._members):
            totals = self._list()
        return (apart.taken_off(totals[0]), *totals[1:])

    def _keep(self, member: _Member, data: bytes) -> _linux.Process:
        """Keep what a member says, and the sums with it: they cost nothing for members that stood still.

        Returned as well: one by one, the kept files hold it as what was made of these bytes.
        """
        parent, start, ended, ticks, threads, pages = row = _linux.process(data)
        before = member.row
        if parent != before[0] or start != before[1] or (ended and member.pid == self._pid):
            raise LookupError(f"process {member.pid} is not what it was")
        self._ticks += ticks - before[3]
        self._threads += threads - before[4]
        self._pages += pages - before[5]
        member.row = row
        return row

    def _is_known(self, newest: int) -> bool:
        """Whether nobody can have come since the last listing."""
        if not self._alive:
            raise ProcessLookupError(f"process {self._pid} has ended")
        same = 0 < newest == self._newest
        # Listed once more after a change: a process gets its number a moment before it can be seen.
        known = same and self._settled and self._listings_left > 0
        # Before it is read: what starts meanwhile has a newer number at the next reading.
        self._newest, self._settled = newest, same
        self._listings_left = self._listings_left - 1 if known else LIST_EVERY
        return known

    def _list(self) -> Totals:
        totals, left = None, PASSES
        while totals is None:
            left -= 1
            # The listing and the counters are of one moment, or it is read again: the time of a child
            # that ended in between would else be missing now and come back at the next reading.
            totals = self._walk(final=left == 0)
        return totals

    def descriptors(self) -> tuple[float]:
        """Return the open descriptors of the process at the top.

        Newer kernels (6.2) tell their number as the directory's size, at a fifth of the cost of the
        listing; trusted once it agreed with the listing.
        """
        counted = os.stat(self._fds).st_size
        if self.counted_fds:
            return (float(counted),)
        # Our own listing holds the descriptor that lists.
        listed = len(os.listdir(self._fds)) - (self._pid == os.getpid())
        if counted == listed:
            self.counted_fds = self._fds
        return (float(listed),)

    def pss(self) -> tuple[float]:
        """Return the tree's proportional memory; it costs 19 ms a mapped GB.

        Raises
        ------
        PermissionError
            If one of the processes does not show it: the sum would tell too little.
        """
        total = NAN
        for pid in self.pids():
            with contextlib.suppress(*GONE):
                # Kernel threads and zombies have no memory, and an empty file or none.
                with open(f"{self._proc}/{pid}/smaps_rollup", "rb") as stream:
                    one = _linux.proportional_bytes(stream.read())
                total = one if total != total else total + one
        return (total,)

    def _sum(self) -> Totals | None:
        """The members' totals; None when the tree is not what it was."""
        parsed = self._files.parsed
        try:
            for member in self._members.values():
                row = parsed(member.stat, _linux.process, 1024)
                if row is not member.row:
                    if row[:2] != member.row[:2]:  # parent and start
                        return None
                    member.row = row
        except GONE:
            return None
        return None if self._members[self._pid].row[2] else self._add_up()

    def _same_children(self) -> bool:
        """Whether the members, read just now, are still all there are."""
        if not self._listed:
            return False
        found: set[int] = set()
        try:
            for member in self._members.values():
                found.update(member.children(self._files, member.row[4]))
        except (*GONE, PermissionError):
            return False
        found -= self._exclude
        found.add(self._pid)
        return found == self._members.keys()

    def _walk(self, final: bool) -> Totals | None:
        """List the tree and read it; None when it changed meanwhile, unless this is the final pass."""
        before, found, whole = self._members, {}, True
        order = [self._pid] if self._listed else [self._pid, *self._descendants()]
        known, files = {*order, *self._exclude}, self._files
        for pid in order:
            member = before.get(pid) or _Member(self._proc, pid)
            try:
                row = self._top(member) if pid == self._pid else self._look(member)
                if row[1] != member.row[1] and member.row is not _UNSEEN:
                    member.close(files)  # another process by now
                member.row = row
                found[pid] = member
                if self._listed:
                    for child in member.children(files, row[4]):
                        if child not in known:
                            known.add(child)
                            order.append(child)
            except (*GONE, PermissionError) as error:
                if pid == self._pid:
                    raise
                # Another user's may be hidden from us.
                whole = whole and isinstance(error, PermissionError)
        for pid in before.keys() - found.keys():
            before[pid].close(files)
        self._members = found
        totals = self._add_up()
        return totals if whole or final else None

    def _add_up(self) -> Totals:
        # What was kept of each member's bytes goes by other rows than these.
        self.generation += 1
        self._ticks = self._threads = self._pages = 0
        for member in self._members.values():
            _, _, _, ticks, threads, pages = member.row
            self._ticks += ticks
            self._threads += threads
            self._pages += pages
        return (
            self._ticks / _linux.CLOCK_TICKS,
            float(self._pages * _linux.PAGE_BYTES),
            float(len(self._members)),
            float(self._threads),
        )

    def _look(self, member: _Member) -> _linux.Process:
        return self._files.parsed(member.stat, _linux.process, 1024)

    def _top(self, member: _Member) -> _linux.Process:
        try:
            row = self._look(member)
            _, start, ended, _, _, _ = row
            self._start = self._start or start
            if start == self._start and not ended:
                return row
        except ProcessLookupError:
            pass  # what a kept descriptor says of a process that ended
        except FileNotFoundError:
            # Ended, or /proc is hidden from us.
            if self._root != "/" or psutil.pid_exists(self._pid):
                raise
        self._alive = False
        for one in self._members.values():
            one.close(self._files)
        raise ProcessLookupError(f"process {self._pid} has ended")

    def _descendants(self) -> list[int]:
        """All that descend from the process at the top, by way of psutil's look at every process."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    above = {process.pid, *(item.pid for item in process.parents())} if self._exclude else set()
                    if not above & self._exclude:
                        found.append(process.pid)
        return found


_UNSEEN: _linux.Process = (b"", b"", False, 0, 0, 0)


class _Member:
    """One process of the tree, and the paths of what is read of it."""

    __slots__ = ("_first", "_task", "_threads", "pid", "row", "stat")

    def __init__(self, proc: str, pid: int) -> None:
        self.pid = pid
        self.stat = f"{proc}/{pid}/stat"
        self.row = _UNSEEN
        self._task = f"{proc}/{pid}/task"
        self._first = f"{self._task}/{pid}/children"
        self._threads: dict[str, str] = {}

    def children(self, files: KeptFiles, threads: int) -> Sequence[int]:
        """The direct children, over all threads.

        Raises
        ------
        FileNotFoundError, ProcessLookupError
            If the process is gone.
        """
        if threads == 1 and not self._threads:
            # The only thread is the first one: it stays, if only as a zombie, until the last has ended.
            return files.listing(self._first, _linux.numbers)
        own = str(self.pid)
        names = os.listdir(self._task)
        for name in self._threads.keys() - set(names):
            files.forget(self._threads.pop(name))
        found: list[int] = []
        for name in names:
            path = self._threads.get(name)
            if path is None:
                path = self._threads[name] = f"{self._task}/{name}/children"
            try:
                found.extend(files.listing(path, _linux.numbers))
            except GONE:
                if name == own:
                    raise
        return found

    def close(self, files: KeptFiles) -> None:
        """Close what is open of it."""
        files.forget(self.stat)
        files.forget(self._first)
        for path in self._threads.values():
            files.forget(path)
        self._threads = {}
