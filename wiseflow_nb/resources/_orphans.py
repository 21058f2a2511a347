"""Processes that a process left behind: children that ended unseen, and descendants whose parent is gone."""

from __future__ import annotations

import contextlib
import os

import psutil

#: (pid, name, what tells it from a later process with the same number)
Found = tuple[int, str, float]


def zombies(pid: int) -> list[Found]:
    """The children of a process that have ended and wait for it to take their exit status."""
    found: list[Found] = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children():
            with contextlib.suppress(psutil.Error):
                if child.status() == psutil.STATUS_ZOMBIE:
                    found.append((child.pid, child.name(), child.create_time()))
    return found


def orphans(pid: int, exclude: frozenset[int] = frozenset()) -> list[Found]:
    """Processes of this one's session whose own parent has ended.

    A process that leads its session (a kernel does) is known to have started all others in it; of
    one that does not, or where there are no sessions (Windows), nothing is told.
    """
    getsid = getattr(os, "getsid", None)
    try:
        if getsid is None or getsid(pid) != pid:
            return []
    except OSError:
        return []
    found: list[Found] = []
    for process in psutil.process_iter(["ppid", "name", "create_time"]):
        info = process.info
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid in exclude or process.pid == pid or info["ppid"] not in (0, 1):
                continue
            if getsid(process.pid) == pid:
                found.append((process.pid, str(info["name"]), float(info["create_time"])))
    return found
