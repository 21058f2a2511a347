"""Fast reads of Linux' own files: descriptors are kept open and read again with ``pread``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

CLOCK_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
SECTOR_BYTES = 512  # the unit of /proc/diskstats, whatever the device
_SIZE = 65536
#: Listings of many records (diskstats, net/dev) come a page at a time; less than this is the whole.
_WHOLE = 3072


class KeptFiles:
    """Files that stay open between reads; opened anew after a fork or when one went away."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}
        self._pid = os.getpid()

    def read(self, path: str, first: int = 0) -> str:
        """Return a file's text, or only what one read of ``first`` bytes gives.

        Raises
        ------
        OSError
            If it cannot be read.
        """
        if self._pid != os.getpid():
            # /proc/self of a kept descriptor is the parent's.
            self.close()
            self._pid = os.getpid()
        fd = self._open.get(path)
        if fd is None:
            fd = self._open[path] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            data = os.pread(fd, first or _SIZE, 0)
            if len(data) >= _WHOLE and not first:
                while chunk := os.pread(fd, _SIZE, len(data)):
                    data += chunk
            return data.decode("ascii", "replace")
        except OSError:
            os.close(self._open.pop(path))
            raise

    def close(self) -> None:
        """Close all."""
        for fd in self._open.values():
            os.close(fd)
        self._open = {}


def keyed(text: str, names: Iterable[str]) -> dict[str, float]:
    """Return ``name value`` lines (``memory.stat``, ``cpu.stat``, ``/proc/meminfo``) as numbers."""
    text = "\n" + text
    found: dict[str, float] = {}
    for name in names:
        at = text.find(f"\n{name} ")
        if at < 0:
            at = text.find(f"\n{name}:")
        if at >= 0:
            start = at + len(name) + 2
            found[name] = float(text[start : start + 40].split(None, 1)[0])
    return found


def pressure_seconds(text: str) -> float:
    """Return the ``some`` total of a pressure file, in seconds."""
    for line in text.splitlines():
        if line.startswith("some"):
            return float(line.rsplit("total=", 1)[1]) / 1e6
    raise ValueError("a pressure file without a 'some' line")


def disk_bytes(text: str, devices: frozenset[str]) -> tuple[float, float]:
    """Sum bytes read and written over whole devices; NaN where none is known."""
    if not devices:
        return math.nan, math.nan
    read = written = 0
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 10 and fields[2] in devices:
            read += int(fields[5])
            written += int(fields[9])
    return float(read * SECTOR_BYTES), float(written * SECTOR_BYTES)


def whole_devices(root: str = "/") -> frozenset[str]:
    """Devices that are neither partitions nor made of others (those would count twice)."""
    try:
        names = os.listdir(os.path.join(root, "sys/block"))
    except OSError:
        return frozenset()
    return frozenset(name for name in names if not name.startswith(("loop", "ram", "dm-", "md", "zram")))


def network_bytes(text: str) -> tuple[float, float]:
    """Sum bytes received and sent over all interfaces but the loopback."""
    received = sent = 0
    for line in text.splitlines()[2:]:
        name, _, rest = line.partition(":")
        fields = rest.split()
        if len(fields) >= 9 and name.strip() != "lo":
            received += int(fields[0])
            sent += int(fields[8])
    return float(received), float(sent)


def children(pid: int, root: str = "/") -> list[int]:
    """The direct children of a process, over all its threads.

    Raises
    ------
    OSError
        If the process is gone or the kernel does not offer the file.
    """
    base = os.path.join(root, "proc", str(pid), "task")
    found: list[int] = []
    for thread in os.listdir(base):
        try:
            with open(f"{base}/{thread}/children", "rb") as stream:
                found.extend(int(item) for item in stream.read().split())
        except (FileNotFoundError, ProcessLookupError):
            if thread == str(pid):
                raise
    return found


def process_stat(text: str) -> tuple[float, int, float, str]:
    """Return (CPU seconds with those of reaped children, threads, resident bytes, state and start).

    The last tells one process from a later one with the same number; it starts with ``Z`` when the
    process has ended and waits for its parent.
    """
    fields = text[text.rindex(")") + 2 :].split()
    ticks = int(fields[11]) + int(fields[12]) + int(fields[13]) + int(fields[14])
    mark = ("Z" if fields[0] in "ZX" else "") + fields[19]
    return ticks / CLOCK_TICKS, int(fields[17]), float(int(fields[21]) * PAGE_BYTES), mark
