"""Fast reads of Linux' own files: descriptors are kept open and read again with ``pread``."""

from __future__ import annotations

import os
from collections.abc import Iterable

CLOCK_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
SECTOR_BYTES = 512  # the unit of /proc/diskstats, whatever the device
_SIZE = 65536


class KeptFiles:
    """Files that stay open between reads; opened anew after a fork or when one went away."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}
        self._pid = os.getpid()

    def read(self, path: str) -> str:
        """Return a file's text (up to 64 kB).

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
            return os.pread(fd, _SIZE, 0).decode("ascii", "replace")
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
    wanted = set(names)
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        name = name.rstrip(":")
        if name in wanted:
            found[name] = float(rest.split()[0])
    return found


def pressure_seconds(text: str) -> float:
    """Return the ``some`` total of a pressure file, in seconds."""
    for line in text.splitlines():
        if line.startswith("some"):
            return float(line.rsplit("total=", 1)[1]) / 1e6
    raise ValueError("a pressure file without a 'some' line")


def disk_bytes(text: str, devices: frozenset[str]) -> tuple[float, float]:
    """Sum bytes read and written over whole devices."""
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
        except FileNotFoundError:
            if thread == str(pid):
                raise
    return found


def process_stat(text: str) -> tuple[float, int, float, float]:
    """Return (CPU seconds with those of reaped children, threads, resident bytes, own CPU seconds)."""
    fields = text[text.rindex(")") + 2 :].split()
    own = int(fields[11]) + int(fields[12])
    reaped = int(fields[13]) + int(fields[14])
    return (own + reaped) / CLOCK_TICKS, int(fields[17]), float(int(fields[21]) * PAGE_BYTES), own / CLOCK_TICKS
