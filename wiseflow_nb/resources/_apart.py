"""Processes that are left out of a tree, and their time: when one is waited for, its parent takes that over."""

from __future__ import annotations

import os
from collections.abc import Container

from wiseflow_nb.resources import _linux
from wiseflow_nb.resources._files import KeptFiles

_GONE = (FileNotFoundError, ProcessLookupError)


class Apart:
    """Know what processes outside the tree left in it.

    What one used between the last look and its end stays counted; so does the time of one whose parent
    ended at the same moment. A parent that does not wait for its children takes nothing over.

    Parameters
    ----------
    proc
        Where the processes' directories are.
    pids
        The processes; the reading one itself ends after its last reading, and is not followed.
    files
        The kept files.
    seconds
        What such processes had left before this one began to look.
    """

    __slots__ = ("_files", "_followed", "_proc", "_seen", "_ticks")

    def __init__(self, proc: str, pids: frozenset[int], files: KeptFiles, seconds: float = 0.0) -> None:
        self._proc, self._files = proc, files
        self._followed = pids - {os.getpid()}
        #: Of each: its parent, its ticks, and the ticks that its parent had taken over by then.
        self._seen: dict[int, tuple[int, int, int]] = {}
        #: What is in the tree's time, and is not the tree's.
        self._ticks = round(seconds * _linux.CLOCK_TICKS)

    def look(self, members: Container[int]) -> bool:
        """Look again, after the members were read; return whether one left its time meanwhile."""
        left = False
        for pid in tuple(self._followed):
            path = f"{self._proc}/{pid}/stat"
            try:
                parent, _, _, ticks, _, _ = self._files.parsed(path, _linux.process, 1024)
            except _GONE:
                self._files.forget(path)
                self._followed -= {pid}
                left = self._took_over(pid) or left
            except PermissionError:
                continue
            else:
                self._note(pid, int(parent), ticks, members)
        return left

    def taken_off(self, seconds: float) -> float:
        """Return the tree's CPU seconds without what others left in them."""
        # In ticks: differences of fractions would not be the same from one reading to the next.
        return max(round(seconds * _linux.CLOCK_TICKS) - self._ticks, 0) / _linux.CLOCK_TICKS

    def _note(self, pid: int, parent: int, ticks: int, members: Container[int]) -> None:
        self._seen.pop(pid, None)
        if parent in members and (taken := self._taken(parent)) is not None:
            self._seen[pid] = (parent, ticks, taken)

    def _took_over(self, pid: int) -> bool:
        parent, ticks, before = self._seen.pop(pid, (0, 0, 0))
        taken = self._taken(parent) if ticks else None
        if taken is None or taken - before < ticks:
            return False
        self._ticks += ticks
        return True

    def _taken(self, pid: int) -> int | None:
        try:
            return _linux.taken_over(self._files.read(f"{self._proc}/{pid}/stat", 1024))
        except (*_GONE, PermissionError):
            return None
