"""Whether the memory that there is lets a ready task start: a decision on values, and its reason."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import Any, Protocol

from wiseflow_nb.clock import Clock
from wiseflow_nb.config import Settings
from wiseflow_nb.errors import UsageError
from wiseflow_nb.records import NAN, Priority, Sample
from wiseflow_nb.sizing import pressure_of

logger = logging.getLogger("wiseflow_nb.tasks")

#: While a task is held back for memory, the gauges are read again this often.
RECHECK_SECONDS = 0.5
#: The pressure gauge is read at most this often: samples come once a second at best.
PRESSURE_SECONDS = 0.25
#: A task that has just started has not yet taken what it asked for: that long it counts as promised.
SETTLE_SECONDS = 2.0

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(value: object) -> float:
    """Return a size in bytes from a number, or from a text as ``"2GB"`` (10**9) or ``"2GiB"`` (2**30).

    Raises
    ------
    UsageError
        If it is no size above 0.

    Examples
    --------
    >>> parse_size("2GB"), parse_size("1.5 MiB"), parse_size(4096)
    (2000000000.0, 1572864.0, 4096.0)
    """
    size = NAN
    if isinstance(value, str):
        found = _SIZE.fullmatch(value)
        if found is not None and found[2].lower() in _UNITS:
            size = float(found[1]) * _UNITS[found[2].lower()]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        size = float(value)
    if not (size > 0 and math.isfinite(size)):
        raise UsageError(f"memory {value!r} is not a size; give bytes, or a text such as '500MB', '2GB', '1.5GiB'")
    return size


def hold_reason(
    label: str,
    level: Priority,
    need_bytes: float | None,
    *,
    available_bytes: float,
    promised_bytes: float,
    pressure: str,
    reserve_taken: bool,
) -> str:
    """Return why a task may not start now, or nothing if it may.

    Parameters
    ----------
    need_bytes
        What the task asks for; None if nothing.
    available_bytes
        What the container has left; NaN (unknown) holds nothing back.
    promised_bytes
        What tasks that have just started asked for and may not have taken yet.
    pressure
        ``critical`` lets no task start but one of class CRITICAL at a time.
    reserve_taken
        Whether that one runs already.

    Examples
    --------
    >>> options = dict(promised_bytes=0.0, pressure="none", reserve_taken=False)
    >>> hold_reason("'etl' (t1)", Priority.NORMAL, 2e9, available_bytes=5e8, **options)
    "'etl' (t1) waits for 2.00 GB of memory: 0.50 GB are available"
    """
    if pressure == "critical":
        if level < Priority.CRITICAL:
            return "memory is critical: no task starts until it is free again, but one of class critical"
        if reserve_taken:
            return "memory is critical: one task of class critical runs, the next waits for it"
    if need_bytes is not None and available_bytes - promised_bytes < need_bytes:
        promised = f", {promised_bytes / 1e9:.2f} GB of it promised to tasks just started" if promised_bytes else ""
        return (
            f"{label} waits for {need_bytes / 1e9:.2f} GB of memory: "
            f"{available_bytes / 1e9:.2f} GB are available{promised}"
        )
    return ""


class SampleSource(Protocol):
    """What gives readings of the resources: a ``ResourceMonitor``."""

    def sample_now(self) -> Sample: ...

    def latest(self) -> Sample | None: ...


def memory_gauges(source: SampleSource, settings: Callable[[], Settings], clock: Clock) -> dict[str, Any]:
    """Return ``memory_available`` and ``pressure`` for a ``TaskManager``, read from a monitor.

    Parameters
    ----------
    settings
        Gives the settings in force, for the thresholds of memory.

    Examples
    --------
    >>> from wiseflow_nb.resources.monitor import ResourceMonitor
    >>> from wiseflow_nb.clock import SYSTEM_CLOCK
    >>> settings = Settings()
    >>> gauges = memory_gauges(ResourceMonitor(settings), lambda: settings, SYSTEM_CLOCK)
    >>> gauges["memory_available"]() > 0, gauges["pressure"]()
    (True, 'none')
    """

    def available() -> float:
        return source.sample_now().memory_available_bytes

    def pressure() -> str:
        sample, current = source.latest(), settings()
        # An old sample (of a sampler that died) must not hold tasks back for ever.
        if sample is None or clock.time() - sample.time_seconds > 3 * current.resource_check_interval:
            return "none"
        warning, critical = current.thresholds()["memory"]
        return ("none", "warning", "critical")[pressure_of(sample.memory_utilization_ratio, warning, critical)]

    return {"memory_available": available, "pressure": pressure}


class Admission:
    """The gauges, read no more often than needed. No lock of its own: the manager's is held."""

    def __init__(
        self, clock: Clock, memory_available: Callable[[], float] | None, pressure: Callable[[], str] | None
    ) -> None:
        self._clock = clock
        self._memory_available = memory_available
        self._pressure = pressure
        self._pressure_read = -math.inf
        self._pressure_now = "none"
        self._promised: dict[int, tuple[float, float]] = {}
        self.failures = 0

    @property
    def idle(self) -> bool:
        """Whether there is no gauge, so that nothing is ever held back."""
        return self._memory_available is None and self._pressure is None

    def reason(self, number: int, label: str, level: Priority, need_bytes: float | None, *, reserve_taken: bool) -> str:
        """Why a task may not start now; nothing if it may."""
        available, promised = NAN, 0.0
        if need_bytes is not None and self._memory_available is not None:
            try:
                available = float(self._memory_available())
            except Exception:
                self._failed("memory_available")
            horizon = self._clock.monotonic() - SETTLE_SECONDS
            for old in [key for key, (since, _) in self._promised.items() if since <= horizon]:
                del self._promised[old]
            promised = sum(size for key, (_, size) in self._promised.items() if key != number)
        return hold_reason(
            label,
            level,
            need_bytes,
            available_bytes=available,
            promised_bytes=promised,
            pressure=self.pressure(),
            reserve_taken=reserve_taken,
        )

    def promise(self, number: int, need_bytes: float | None) -> None:
        """A task that asked for so much starts, or is about to."""
        if need_bytes is not None and self._memory_available is not None:
            self._promised[number] = (self._clock.monotonic(), need_bytes)

    def withdraw(self, number: int) -> None:
        """A task that was about to start does not."""
        self._promised.pop(number, None)

    def pressure(self) -> str:
        """The newest reading: none, warning or critical."""
        if self._pressure is None:
            return "none"
        now = self._clock.monotonic()
        if now - self._pressure_read >= PRESSURE_SECONDS:
            self._pressure_read = now
            try:
                self._pressure_now = str(self._pressure())
            except Exception:
                self._pressure_now = "none"
                self._failed("pressure")
        return self._pressure_now

    def _failed(self, name: str) -> None:
        self.failures += 1
        if self.failures == 1:
            logger.exception("the gauge %s failed; further failures are counted only", name)
