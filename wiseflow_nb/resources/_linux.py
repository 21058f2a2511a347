"""What Linux' own files say: bytes in, numbers out. No file is opened here.

Everything is done on bytes, without patterns and with as few objects as will do: at one reading a
second each of them is a walk through cold memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

CLOCK_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
#: In the kernel's flags of a process (include/linux/sched.h): it is on its way out.
PF_EXITING = 0x4
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
SECTOR_BYTES = 512  # the unit of the block devices' counters, whatever the device


def key(name: str) -> bytes:
    """Return what ``value_of`` looks for; made once, not at each reading."""
    return b"\n" + name.encode() + b" "


def value_of(data: bytes, wanted: bytes) -> float:
    """Return the number in the line ``<name> <number>`` (``memory.stat``, ``cpu.stat``); NaN without it.

    Examples
    --------
    >>> value_of(b"oom_kill_disable 0\\noom_kill 3\\n", key("oom_kill"))
    3.0
    """
    at = data.find(wanted)
    if at < 0:
        if not data.startswith(wanted[1:]):
            return math.nan
        at = -1
    start = at + len(wanted)
    end = data.find(b"\n", start)
    return float(int(data[start:end] if end >= 0 else data[start:]))


def number(data: bytes) -> float:
    """Return the whole number that a file consists of."""
    return float(int(data))


def memory_bytes(data: bytes) -> tuple[float, float, float]:
    """Return total, available and used swap of ``meminfo``, in bytes.

    Raises
    ------
    ValueError, IndexError
        If it does not say them.
    """
    # The first lines are MemTotal, MemFree, MemAvailable; other kernels than today's may differ.
    fields = data.split(None, 8)
    if fields[6] != b"MemAvailable:":
        fields[7] = data[data.index(b"MemAvailable:") :].split(None, 2)[1]
    # SwapFree follows SwapTotal.
    swap = data[data.index(b"SwapTotal:") :].split(None, 5)
    return int(fields[1]) * 1024.0, int(fields[7]) * 1024.0, (int(swap[1]) - int(swap[4])) * 1024.0


def proportional_bytes(data: bytes) -> float:
    """Return ``Pss`` of a ``smaps_rollup``, in bytes; 0.0 of a process without memory."""
    return int(data[data.index(b"\nPss:") :].split(None, 2)[1]) * 1024.0 if data else 0.0


def cpu_ticks(data: bytes) -> tuple[int, int, int, int]:
    """Return ticks since boot of the whole machine: all, idle, waiting for a disk, stolen.

    The first line of ``/proc/stat`` says them; time of guests is part of user time.
    """
    user, nice, system, idle, iowait, hard, soft, steal = map(int, data.split(None, 9)[1:9])
    idle += iowait
    return user + nice + system + idle + hard + soft + steal, idle, iowait, steal


def pressure_seconds(data: bytes) -> float:
    """Return the ``some`` total of a pressure file, in seconds; its first line says it.

    Raises
    ------
    ValueError
        If it does not.
    """
    # some avg10=0.00 avg60=0.00 avg300=0.00 total=0; one way to look for it costs less than three.
    fields = data.split(None, 5)
    if fields[:1] != [b"some"]:
        raise ValueError("a pressure file that does not begin with 'some'")
    if len(fields) < 5 or fields[4][:6] != b"total=":
        # Other kernels than today's may differ.
        start = data.index(b"total=") + 6
        return int(data[start : data.index(b"\n", start)]) / 1e6
    return int(fields[4][6:]) / 1e6


def device_bytes(data: bytes) -> tuple[float, float]:
    """Return bytes read and written of one ``/sys/block/<device>/stat``."""
    fields = data.split(None, 7)
    return float(int(fields[2]) * SECTOR_BYTES), float(int(fields[6]) * SECTOR_BYTES)


def disk_bytes(data: bytes, devices: Iterable[str]) -> tuple[int, int]:
    """Return bytes read and written over some devices of ``/proc/diskstats``."""
    wanted = {name.encode() for name in devices}
    read = written = 0
    for line in data.splitlines():
        fields = line.split(None, 10)
        if len(fields) > 9 and fields[2] in wanted:
            read += int(fields[5])
            written += int(fields[9])
    return read * SECTOR_BYTES, written * SECTOR_BYTES


def whole_devices(root: str = "/") -> tuple[str, ...]:
    """Devices that are neither partitions nor made of others (those would count twice)."""
    try:
        names = os.listdir(os.path.join(root, "sys/block"))
    except OSError:
        return ()
    return tuple(sorted(name for name in names if not name.startswith(("loop", "ram", "dm-", "md", "zram"))))


def network_bytes(data: bytes) -> tuple[float, float]:
    """Return bytes received and sent over all interfaces of ``net/dev`` but the loopback.

    Raises
    ------
    ValueError
        If it is no table of a name and sixteen numbers a line.
    """
    # Some kernels leave no blank after the name's colon.
    fields = data[data.index(b"\n", data.index(b"\n") + 1) :].replace(b":", b" ").split()
    if len(fields) % 17:
        raise ValueError("a table of interfaces that is not understood")
    received = sent = 0
    for name, came, went in zip(fields[::17], fields[1::17], fields[9::17], strict=True):
        if name != b"lo":
            received += int(came)
            sent += int(went)
    return float(received), float(sent)


#: What ``/proc/<pid>/stat`` says: parent, start time, whether it ended, ticks, threads, resident pages.
#: A bare tuple: one is made for each process of a tree at each reading, and a class costs twice as much.
Process = tuple[bytes, bytes, bool, int, int, int]


def process(data: bytes) -> Process:
    """Return parent, start time, whether it ended, ticks, threads and resident pages of a process.

    The start time tells it from a later one with the same number; the ticks are user and system time,
    its own and that of reaped children.

    Raises
    ------
    ValueError, IndexError
        If it is no ``/proc/<pid>/stat``.
    """
    # The name, in brackets, may hold anything; nothing after it holds a bracket.
    fields = data[data.rindex(b")") + 2 :].split(None, 22)
    ticks = int(fields[11]) + int(fields[12]) + int(fields[13]) + int(fields[14])
    return fields[1], fields[19], fields[0] in b"ZXx", ticks, int(fields[17]), int(fields[21])


def taken_over(data: bytes) -> int:
    """Return the ticks of the children that a process has waited for, of its ``/proc/<pid>/stat``."""
    fields = data[data.rindex(b")") + 2 :].split(None, 15)
    return int(fields[13]) + int(fields[14])


def is_ending(data: bytes) -> bool:
    """Return whether a process ends or has ended, of its ``/proc/<pid>/stat``.

    Raises
    ------
    ValueError, IndexError
        If it is none.
    """
    fields = data[data.rindex(b")") + 2 :].split(None, 7)
    return fields[0] in b"ZXx" or bool(int(fields[6]) & PF_EXITING)


def numbers(data: bytes) -> tuple[int, ...]:
    """Return the numbers of a list such as ``task/<tid>/children``."""
    return tuple(map(int, data.split()))


def resident_bytes(data: bytes) -> float:
    """Return the second number of ``statm``, in bytes."""
    return int(data.split(None, 2)[1]) * float(PAGE_BYTES)
