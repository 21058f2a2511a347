"""The machine's own figures from Linux' files."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Protocol

from wiseflow_nb.records import NAN
from wiseflow_nb.resources import _linux
from wiseflow_nb.resources._files import KeptFiles, Source

#: With so many disks one file for each costs more than one for all.
FEW_DISKS = 4


class Host(Protocol):
    """What the probe needs of the machine; see ``LinuxHost`` and ``PortableHost``."""

    @property
    def newest_process(self) -> int: ...

    @property
    def memory(self) -> Callable[[], tuple[float, float, float]]: ...

    @property
    def cpu(self) -> Callable[[], tuple[float, float, float, float]]: ...

    def load(self) -> tuple[float]: ...

    def disk(self) -> tuple[float, float]: ...

    def network(self, pid: int | None) -> tuple[float, float]: ...

    @property
    def own_memory(self) -> Callable[[], float]: ...

    def look_again(self) -> None: ...


class LinuxHost:
    """Read the machine's figures; ``root`` is where ``/proc`` and ``/sys`` are, for tests.

    ``memory`` gives total, available and used swap in bytes, ``cpu`` the ticks since boot (all, idle,
    waiting for a disk, stolen), ``own_memory`` the resident bytes of the reading process.
    """

    __slots__ = (
        "_device_files",
        "_devices",
        "_diskstats",
        "_files",
        "_loadavg",
        "_net",
        "_proc",
        "_root",
        "_tells_newest",
        "cpu",
        "memory",
        "newest_process",
        "own_memory",
    )

    def __init__(self, root: str, files: KeptFiles) -> None:
        self._root, self._files = root, files
        proc = self._proc = os.path.join(root, "proc")
        # Bound once: at each reading a call of Python's less for each file.
        self.memory = functools.partial(files.parsed, f"{proc}/meminfo", _linux.memory_bytes, 1024)
        self.cpu = functools.partial(files.parsed, f"{proc}/stat", _linux.cpu_ticks, 512)
        self.own_memory = functools.partial(files.parsed, f"{proc}/self/statm", _linux.resident_bytes, 128)
        self._loadavg, self._diskstats = f"{proc}/loadavg", f"{proc}/diskstats"
        self._net: tuple[int | None, str] = (0, "")
        #: The number of the process (or thread) started last, as of the last ``load``; 0 if not known.
        self.newest_process = 0
        # lxcfs, a file system of its own, makes these files up, and a little late.
        self._tells_newest = False
        with contextlib.suppress(OSError):
            self._tells_newest = os.stat(self._loadavg).st_dev == os.stat(f"{proc}/self/statm").st_dev
        self.look_again()

    def look_again(self) -> None:
        """Find the disks that there are now."""
        self._files.forget(self._diskstats)  # what was made of it goes by the devices that were
        self._devices = _linux.whole_devices(self._root)
        self._device_files = [os.path.join(self._root, "sys/block", name, "stat") for name in self._devices]

    def load(self) -> tuple[float]:
        """Return the load of one minute."""
        self.newest_process = 0
        load, self.newest_process = self._load_and_newest(self._files.read(self._loadavg, 128))
        return (load,)

    def _load_and_newest(self, data: bytes) -> tuple[float, int]:
        fields = data.split()
        return float(fields[0]), int(fields[4]) if self._tells_newest else 0

    def disk(self) -> tuple[float, float]:
        """Return bytes read and written by whole devices, since boot; NaN where none is known."""
        try:
            return self._disk()
        except OSError:
            self.look_again()  # one was unplugged
            return self._disk()

    def _sum_devices(self, data: bytes) -> tuple[float, float]:
        read, written = _linux.disk_bytes(data, self._devices)
        return float(read), float(written)

    def _disk(self) -> tuple[float, float]:
        if len(self._devices) > FEW_DISKS:
            return self._files.listing(self._diskstats, self._sum_devices)
        parsed = self._files.parsed
        return self.disk_of([parsed(path, _linux.device_bytes, 512) for path in self._device_files])

    def network(self, pid: int | None) -> tuple[float, float]:
        """Return bytes received and sent by all interfaces but the loopback, where a process (or we) are."""
        if self._net[0] != pid:
            self._files.forget(self._net[1])
            self._net = (pid, f"{self._proc}/{'self' if pid is None else pid}/net/dev")
        return self._files.listing(self._net[1], _linux.network_bytes)

    # The same, of files that are read together.

    @property
    def general(self) -> list[Source]:
        """What says load and newest process, memory, and CPU time."""
        return [
            Source(self._loadavg, self._load_and_newest, 128),
            Source(f"{self._proc}/meminfo", _linux.memory_bytes, 1024),
            Source(f"{self._proc}/stat", _linux.cpu_ticks, 512),
        ]

    @property
    def disks(self) -> list[Source]:
        """What ``disk_of`` adds up."""
        if len(self._devices) > FEW_DISKS:
            return [Source(self._diskstats, self._sum_devices, listing=True)]
        return [Source(path, _linux.device_bytes, 512) for path in self._device_files]

    def disk_of(self, values: list[tuple[float, float]]) -> tuple[float, float]:
        """Return bytes read and written over what was read of ``disks``."""
        if len(values) == 1:
            return values[0]
        if not values:
            return NAN, NAN
        read = written = 0.0
        for one in values:
            read, written = read + one[0], written + one[1]
        return read, written

    @property
    def interfaces(self) -> Source:
        """What says the bytes of the network, where it was last read."""
        return Source(self._net[1], _linux.network_bytes, listing=True)

    @property
    def own(self) -> Source:
        """What says the resident bytes of the reading process."""
        return Source(f"{self._proc}/self/statm", _linux.resident_bytes, 128)
