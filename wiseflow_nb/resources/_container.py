"""What a control group says of its usage, at the level whose limit binds."""

from __future__ import annotations

import errno
import os

from wiseflow_nb.records import NAN
from wiseflow_nb.resources import _linux
from wiseflow_nb.resources._files import KeptFiles
from wiseflow_nb.resources._limits import Bound, cpu_place, kill_files, memory_place, pressure_dir

PRESSURES = ("cpu", "memory", "io")
_SWITCHED_OFF = (errno.EOPNOTSUPP, errno.ENOTSUP)

_USAGE, _THROTTLED, _THROTTLED_V1, _KILLS = map(
    _linux.key, ("usage_usec", "throttled_usec", "throttled_time", "oom_kill")
)


class Container:
    """Read the usage of the groups that bind a process; NaN where the host alone counts.

    Pressure is the group's own where the kernel keeps it (version 2), else the host's: a container
    waits for its quota as well, which the host does not see.
    """

    def __init__(self, root: str, files: KeptFiles) -> None:
        self._root, self._files = root, files
        #: Used memory that cannot be dropped, as of the last reading of ``memory``.
        self.working_set = NAN
        self._usage = self._memory_stat = self._cpu_usage = self._cpu_stat = ""
        self._kills: tuple[str, ...] = ()
        self._pressures: list[tuple[str, ...]] = []
        self._memory_version = self._cpu_version = 0

    def place(self, found: Bound) -> None:
        """Read where ``found`` says, from now on."""
        kept = (self._usage, self._memory_stat, self._cpu_usage, self._cpu_stat, *self._kills)
        for path in (*kept, *(path for paths in self._pressures for path in paths)):
            self._files.forget(path)
        self._memory_version, directory = memory_place(found)
        names = {1: ("memory.usage_in_bytes", "total_inactive_file"), 2: ("memory.current", "inactive_file")}
        usage, inactive = names.get(self._memory_version, ("", ""))
        self._usage, self._memory_stat = os.path.join(directory, usage), os.path.join(directory, "memory.stat")
        self._inactive = _linux.key(inactive)
        self._kills = kill_files(found)
        self._cpu_version, directory, account = cpu_place(found)
        self._cpu_stat = os.path.join(directory, "cpu.stat") if directory else ""
        self._cpu_usage = os.path.join(account, "cpuacct.usage") if account else ""
        # The best first; one that is switched off is left out.
        own, host = pressure_dir(found), os.path.join(self._root, "proc", "pressure")
        self._pressures = [tuple(os.path.join(own, f"{name}.pressure") for name in PRESSURES)] if own else []
        if os.path.isdir(host):
            self._pressures.append(tuple(os.path.join(host, name) for name in PRESSURES))

    def memory(self) -> tuple[float, float]:
        """Return usage in bytes and the number of OOM kills; sets ``working_set``.

        Raises
        ------
        OSError
            If a file of the group cannot be read.
        """
        self.working_set = NAN
        if not self._memory_version:
            return NAN, NAN
        read = self._files.read
        usage = float(read(self._usage, 64))
        data = read(self._memory_stat, 16384)
        inactive = _linux.value_of(data, self._inactive)
        kills = NAN
        for path in self._kills:
            one = self._files.parsed(path, _kills, 512)
            kills = one if kills != kills else kills + one
        # Both are counted lazily, each on its own: the difference can fall below nothing.
        self.working_set = max(usage - (inactive if inactive == inactive else 0.0), 0.0)
        return usage, kills

    def cpu(self) -> tuple[float, float]:
        """Return CPU seconds and seconds throttled.

        Raises
        ------
        OSError
            If a file of the group cannot be read.
        """
        if self._cpu_version == 2:
            data = self._files.read(self._cpu_stat, 2048)
            return _linux.value_of(data, _USAGE) / 1e6, _linux.value_of(data, _THROTTLED) / 1e6
        seconds = throttled = NAN
        if self._cpu_usage:
            seconds = int(self._files.read(self._cpu_usage, 64)) / 1e9
        if self._cpu_stat:
            throttled = _linux.value_of(self._files.read(self._cpu_stat, 2048), _THROTTLED_V1) / 1e9
        return seconds, throttled

    def pressure(self) -> tuple[float, float, float]:
        """Return the seconds in which some task waited for CPU, for memory, for a disk.

        Raises
        ------
        OSError
            If it is offered and cannot be read.
        """
        while self._pressures:
            read, (cpu, memory, disk) = self._files.parsed, self._pressures[0]
            try:
                seconds = _linux.pressure_seconds
                return read(cpu, seconds, 256), read(memory, seconds, 256), read(disk, seconds, 256)
            except OSError as error:
                # Built in, but switched off: not offered is not a failure.
                if error.errno not in _SWITCHED_OFF:
                    raise
                del self._pressures[0]
        return NAN, NAN, NAN


def _kills(data: bytes) -> float:
    return _linux.value_of(data, _KILLS)
