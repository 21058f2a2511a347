"""When a recorder that ended is started again: at once, and ever later where it ends, or cannot start, again and again."""

from __future__ import annotations

import math

#: So often it is started again at once.
AT_ONCE = 3
#: One that lived longer than this had no trouble of its own.
CALM_SECONDS = 60.0
FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 30.0


class Restarts:
    """Count how often in a row a recorder ended soon.

    Examples
    --------
    >>> restarts = Restarts()
    >>> for moment in (1.0, 2.0, 3.0):
    ...     restarts.ended(moment)
    >>> restarts.delay
    0.0
    >>> restarts.failed()
    >>> restarts.failed()
    >>> restarts.delay
    2.0
    """

    def __init__(self) -> None:
        #: How often in a row it ended soon after its start, or did not start.
        self.count = 0
        self._up_seconds = -math.inf

    @property
    def delay(self) -> float:
        """How long to wait before the next start (seconds)."""
        over = self.count - AT_ONCE
        return 0.0 if over <= 0 else min(FIRST_DELAY_SECONDS * 2.0 ** min(over - 1, 30), LONGEST_DELAY_SECONDS)

    def up(self, now: float) -> None:
        """It runs, since ``now`` (monotonic seconds)."""
        self._up_seconds = now

    def ended(self, now: float) -> None:
        """It has ended."""
        if now - self._up_seconds > CALM_SECONDS:
            self.count = 0
        self.count += 1

    def failed(self) -> None:
        """It could not start: the same cause will not be gone at once."""
        self.count = max(self.count, AT_ONCE) + 1
