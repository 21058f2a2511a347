"""What a control group says of its usage, at the level whose limit binds."""

from __future__ import annotations

import errno
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

from wiseflow_nb.records import NAN
from wiseflow_nb.resources import _linux
from wiseflow_nb.resources._files import KeptFiles, Source
from wiseflow_nb.resources._limits import Bound, cpu_place, kill_files, memory_files, memory_place, pressure_dir

PRESSURES = ("cpu", "memory", "io")
_SWITCHED_OFF = (errno.EOPNOTSUPP, errno.ENOTSUP)

_USAGE, _THROTTLED, _THROTTLED_V1, _KILLS = map(
    _linux.key, ("usage_usec", "throttled_usec", "throttled_time", "oom_kill")
)


class Container:
    """Read the usage of the groups that bind a process; NaN where the host alone counts.

    Pressure is the group's own where the kernel keeps it (version 2), else the host's: a container
    waits for its quota as well, which the host does not see.

    Each figure can be had on its own (``memory``), or made of values that were read together with
    others (``memory_of``, of ``memory_files``).
    """

    __slots__ = (
        "_counts_cpu",
        "_counts_throttled",
        "_files",
        "_levels_at",
        "_limits",
        "_pressures",
        "_root",
        "cpu_files",
        "left_elsewhere",
        "memory_files",
        "working_set",
    )

    def __init__(self, root: str, files: KeptFiles) -> None:
        self._root, self._files = root, files
        #: Used memory that cannot be dropped, as of the last reading of ``memory``.
        self.working_set = NAN
        #: The least that is left at the other levels with a limit of their own; infinite without them.
        self.left_elsewhere = math.inf
        self.memory_files: list[Source] = []
        # Where their files begin among those, and their limits.
        self._levels_at = 0
        self._limits: list[float] = []
        self.cpu_files: list[Source] = []
        self._pressures: list[list[Source]] = []
        self._counts_cpu = self._counts_throttled = False

    @property
    def pressure_files(self) -> list[Source]:
        """What says the pressure; nothing where it is not offered."""
        return self._pressures[0] if self._pressures else []

    def place(self, found: Bound) -> None:
        """Read where ``found`` says, from now on."""
        for sources in (self.memory_files, self.cpu_files, *self._pressures):
            for source in sources:
                self._files.forget(source.path)
        version, directory = memory_place(found)
        self.memory_files = []
        if version:
            kills = kill_files(found)
            self.memory_files = [*_usage(version, directory), *(Source(path, _line(_KILLS), 512) for path in kills)]
        self._levels_at, self._limits = len(self.memory_files), []
        for other, above, limit in found.memory_levels:
            self.memory_files += _usage(other, above)
            self._limits.append(limit)
        version, directory, account = cpu_place(found)
        self.cpu_files = []
        self._counts_cpu = bool(account) and version == 1
        self._counts_throttled = bool(directory) and version == 1
        if version == 2:
            self.cpu_files = [Source(os.path.join(directory, "cpu.stat"), _seconds, 2048)]
        if self._counts_cpu:
            self.cpu_files.append(Source(os.path.join(account, "cpuacct.usage"), int, 64))
        if self._counts_throttled:
            self.cpu_files.append(Source(os.path.join(directory, "cpu.stat"), _line(_THROTTLED_V1), 2048))
        # The best first; one that is switched off is left out.
        own, host = pressure_dir(found), os.path.join(self._root, "proc", "pressure")
        names = [[os.path.join(own, f"{name}.pressure") for name in PRESSURES]] if own else []
        if os.path.isdir(host):
            names.append([os.path.join(host, name) for name in PRESSURES])
        self._pressures = [[Source(path, _linux.pressure_seconds, 96) for path in paths] for paths in names]

    def memory(self) -> tuple[float, float]:
        """Return usage in bytes and the number of OOM kills; sets ``working_set`` and ``left_elsewhere``.

        Raises
        ------
        OSError
            If a file of the group cannot be read.
        """
        self.working_set, self.left_elsewhere = NAN, math.inf
        return self.memory_of(self._each(self.memory_files))

    def memory_of(self, values: Sequence[float]) -> tuple[float, float]:
        """Return what ``memory`` does, of the values of ``memory_files``."""
        if not values:
            self.working_set, self.left_elsewhere = NAN, math.inf
            return NAN, NAN
        at = self._levels_at
        usage, kills = values[0], NAN
        self.working_set, left = _working_set(usage, values[1]), math.inf
        if at > 2:
            kills = values[2] if at == 3 else sum(values[2:at])
        for limit in self._limits:
            left = min(left, limit - _working_set(values[at], values[at + 1]))
            at += 2
        self.left_elsewhere = left
        return usage, kills

    def cpu(self) -> tuple[float, float]:
        """Return CPU seconds and seconds throttled.

        Raises
        ------
        OSError
            If a file of the group cannot be read.
        """
        return self.cpu_of(self._each(self.cpu_files))

    def cpu_of(self, values: Sequence[Any]) -> tuple[float, float]:
        """Return what ``cpu`` does, of the values of ``cpu_files``."""
        if not values:
            return NAN, NAN
        if not (self._counts_cpu or self._counts_throttled):
            seconds, throttled = values[0]
            return seconds, throttled
        return (
            values[0] / 1e9 if self._counts_cpu else NAN,
            values[-1] / 1e9 if self._counts_throttled else NAN,
        )

    def pressure(self) -> tuple[float, float, float]:
        """Return the seconds in which some task waited for CPU, for memory, for a disk.

        Raises
        ------
        OSError
            If it is offered and cannot be read.
        """
        while self._pressures:
            try:
                cpu, memory, disk = self._each(self._pressures[0])
            except OSError as error:
                # Built in, but switched off: not offered is not a failure.
                if error.errno not in _SWITCHED_OFF:
                    raise
                del self._pressures[0]
            else:
                return cpu, memory, disk
        return NAN, NAN, NAN

    def _each(self, sources: Sequence[Source]) -> list[Any]:
        parsed = self._files.parsed
        return [parsed(path, parse, size) for path, parse, size, _ in sources]


def _usage(version: int, directory: str) -> list[Source]:
    usage, statistics, inactive = memory_files(version, directory)
    return [Source(usage, _linux.number, 64), Source(statistics, _line(_linux.key(inactive)), 16384)]


def _working_set(usage: float, inactive: float) -> float:
    # Both are counted lazily, each on its own: the difference can fall below nothing.
    if inactive > usage:
        return 0.0
    return usage - inactive if inactive == inactive else usage


def _line(wanted: bytes) -> functools.partial[float]:
    return functools.partial(_linux.value_of, wanted=wanted)


def _seconds(data: bytes) -> tuple[float, float]:
    return _linux.value_of(data, _USAGE) / 1e6, _linux.value_of(data, _THROTTLED) / 1e6


def count_kills(paths: Sequence[str]) -> float:
    """Return the OOM kills that files such as ``Probe.kill_files`` count now; NaN if one cannot be read.

    Examples
    --------
    >>> count_kills(["/nowhere/memory.events"])
    nan
    """
    try:
        counts = [_linux.value_of(_beginning(path), _KILLS) for path in paths]
    except (OSError, ValueError):
        return NAN
    return sum(counts) if counts else NAN


def _beginning(path: str) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(512)
