"""The space of file systems: of each watched path, and of the fullest of them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import psutil

from wiseflow_nb.records import NAN
from wiseflow_nb.resources._part import Part, Tell, Values
from wiseflow_nb.resources._patience import Patience

_OFFERED = hasattr(os, "statvfs")
COLUMNS = ("filesystem_size_bytes", "filesystem_avail_bytes", "filesystem_utilization_ratio")


class Disk(NamedTuple):
    """The file system that holds a path: bytes, and the used share as ``df`` shows it; NaN if unknown."""

    path: str
    size_bytes: float = NAN
    avail_bytes: float = NAN
    utilization_ratio: float = NAN


def split_paths(text: str) -> tuple[str, ...]:
    """Return the paths of a setting: one, or several with the system's separator (``:``, ``;`` on Windows).

    A leading ``~`` is the home directory. What exists as it stands is one path, also where a name
    in it holds the separator; nothing at all is ``.``.

    Examples
    --------
    >>> split_paths(os.pathsep.join(["/data", "/scratch"]))
    ('/data', '/scratch')
    """
    pieces, found = text.split(os.pathsep), []
    while pieces:
        # The longest that exists; what does not (yet) is taken apart at each separator.
        for count in range(len(pieces), 0, -1):
            path = os.path.expanduser(os.pathsep.join(pieces[:count]))
            if count == 1 or (path.strip(os.pathsep) and os.path.exists(path)):
                break
        del pieces[:count]
        if path:
            found.append(path)
    return tuple(dict.fromkeys(found)) or (".",)


def absolute_paths(text: str) -> str:
    """Return the paths of a setting made absolute, joined again: for a process in another directory.

    Examples
    --------
    >>> absolute_paths("/data/../scratch") == os.path.abspath("/scratch")
    True
    """
    return os.pathsep.join(map(_absolute, split_paths(text)))


def _absolute(path: str) -> str:
    # Without a working directory (it was removed) nothing relative can be found anyway.
    with contextlib.suppress(OSError):
        return os.path.abspath(path)
    return path


def space(path: str, portable: bool = False) -> tuple[float, float, float]:
    """Return size, available bytes and used share of the file system that holds a path.

    Raises
    ------
    OSError
        If it cannot be looked at.
    """
    if _OFFERED and not portable:
        # By position: names of such a record are looked up one by one.
        _, unit, blocks, free, left = os.statvfs(path)[:5]
        size, avail, used = blocks * unit, left * unit, (blocks - free) * unit
    else:
        usage = psutil.disk_usage(path)
        size, avail, used = usage.total, usage.free, usage.used
    # As df does: what is reserved for root is neither used nor available.
    return float(size), float(avail), used / (used + avail) if used + avail else NAN


class Disks:
    """The watched paths; each has its own failures and its own budget.

    The columns are those of the fullest of what can be read: one path that vanished is told once and
    hides none of the others. With ``patience`` (seconds) so is one that hangs; without it, it is waited
    for on this thread.
    """

    def __init__(self, text: str, portable: bool, patience: float | None = None) -> None:
        self.text, self._portable = text, portable
        # Absolute: what is watched does not move when somebody changes the working directory.
        paths = tuple(dict.fromkeys(map(_absolute, split_paths(text))))
        self._names = paths
        readers = [_reader(path, portable) for path in paths]
        self._asked: list[Patience[Values]] = []
        if patience is not None:
            self._asked = [Patience("wiseflow-disk", reader, patience) for reader in readers]
            readers = [asked.ask for asked in self._asked]
        self._parts = [
            Part(f"disk space of {path}", COLUMNS, reader) for path, reader in zip(paths, readers, strict=True)
        ]
        self._last: list[Values] = [(NAN, NAN, NAN)] * len(paths)

    def values(self, now: float, tell: Tell, timer: Callable[[], float], timed: bool = True) -> Values:
        """Return the columns of the fullest."""
        if len(self._parts) == 1:
            found = self._last[0] = self._parts[0].values(now, tell, timer, timed)
            return found
        self._last = [part.values(now, tell, timer, timed) for part in self._parts]
        return max(self._last, key=_fullness)

    @property
    def watched(self) -> bool:
        """Whether one of them fails or is dear."""
        return any(part.watched for part in self._parts)

    def now(self) -> Values:
        """Return the columns of the fullest, where none is ``watched``.

        Raises
        ------
        OSError
            If one cannot be looked at.
        """
        if len(self._names) == 1 and not self._asked:
            found = self._last[0] = space(self._names[0], self._portable)
            return found
        self._last = [asked.ask() for asked in self._asked] or [space(path, self._portable) for path in self._names]
        return max(self._last, key=_fullness)

    def close(self) -> None:
        """Let the threads end that wait for file systems."""
        for asked in self._asked:
            asked.close()

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds that were spent on other threads for it."""
        return sum(asked.cpu_seconds for asked in self._asked)

    def records(self) -> tuple[Disk, ...]:
        """Return each path's, as of the last reading."""
        return tuple(Disk(path, *values) for path, values in zip(self._names, self._last, strict=True))


def _fullness(values: Values) -> float:
    return -1.0 if math.isnan(values[2]) else values[2]


def _reader(path: str, portable: bool) -> Callable[[], Values]:
    return lambda: space(path, portable)
