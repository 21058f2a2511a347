"""Time as an object: everything that waits or stamps takes a ``Clock``, so tests drive it."""

from __future__ import annotations

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """What the library needs of time.

    ``time()`` is seconds since the epoch (UTC), for records. ``monotonic()`` is seconds that never
    go back, for durations and deadlines. ``wait(event, timeout)`` blocks until the event is set or
    the timeout has passed on this clock, and returns whether the event is set.
    """

    def time(self) -> float: ...

    def monotonic(self) -> float: ...

    def wait(self, event: threading.Event, timeout: float | None) -> bool: ...


class SystemClock:
    """The machine's own clock.

    Examples
    --------
    >>> clock = SystemClock()
    >>> clock.monotonic() <= clock.monotonic()
    True
    """

    __slots__ = ()

    def time(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def wait(self, event: threading.Event, timeout: float | None) -> bool:
        return event.wait(timeout)

    def __repr__(self) -> str:
        return "SystemClock()"


SYSTEM_CLOCK = SystemClock()
