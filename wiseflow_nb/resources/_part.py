"""One thing that a probe reads together: its columns, its failures, and what it may cost.

No clock in here: moments are passed in, and the timer is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import psutil

#: A part may take this share of the time at most; a dearer one is read less often.
SHARE = 0.01
#: Below this nothing is dear: it would fit a hundred times into half a second.
CHEAP_SECONDS = 0.005
#: So many readings running must be dear: one alone may only have been interrupted.
RUNNING = 3
#: Even the dearest, and what fails, is tried again after so long.
LONGEST_SECONDS, LONGEST_BACKOFF_SECONDS = 300.0, 60.0
#: What reading can raise: the system's errors, files that say something else, psutil's own errors,
#: and what psutil leaves out on a system.
FAILURES = (OSError, ValueError, LookupError, AttributeError, RuntimeError, psutil.Error)

Values = Sequence[float]
#: Takes the kind and the message of an event.
Tell = Callable[[str, str], None]


class Part:
    """Read some columns, or say once that they cannot be read, and try again later and later.

    A part that is too dear is read less often; between its readings its gauges repeat the last
    value and its counters (``*_total``) are NaN, so that no rate is made of a value that stood still:
    rates go from one reading to the next that there is, over the time between the two.

    Parameters
    ----------
    name
        What it is, for people.
    columns
        The columns that it fills.
    read
        Returns their values in this order.
    every
        Seconds between readings, if they are to be seldom anyway.
    share
        The share of the time that it may take, 0-1.

    Examples
    --------
    >>> part = Part("load", ("system_load1",), lambda: (0.5,))
    >>> part.values(0.0, print, lambda: 0.0)
    (0.5,)
    """

    __slots__ = (
        "_costs",
        "_every",
        "_failures",
        "_nothing",
        "_read",
        "_share",
        "_slow_told",
        "columns",
        "due",
        "held",
        "name",
        "slow",
        "watched",
    )

    def __init__(
        self,
        name: str,
        columns: Sequence[str],
        read: Callable[[], Values],
        *,
        every: float = 0.0,
        share: float = SHARE,
    ) -> None:
        self.name = name
        self.columns = tuple(columns)
        self._read, self._every, self._share = read, every, share
        self._nothing: Values = (math.nan,) * len(columns)
        self.held: Values = self._nothing
        #: Before this moment ``values`` returns what is ``held``.
        self.due = -math.inf
        self._failures = 0
        self._costs: list[float] = []
        #: Whether it is so dear that it is read less often; what is missing between is not a failure.
        self.slow = False
        self._slow_told = False
        #: Whether something is to be done after a reading that went well.
        self.watched = bool(every)

    def values(self, now: float, tell: Tell, timer: Callable[[], float], timed: bool = True) -> Values:
        """Return the columns' values at a moment (seconds of a clock that only goes forward).

        ``timed=False`` leaves out the timer where nothing is to be watched: readings that are cheap
        as a whole have no dear part.
        """
        if now < self.due:
            if self.slow and not self._slow_told:
                # Only now: a cadence that is slow anyway leaves nothing out.
                self._slow_told = True
                tell("probe_slowed", f"{self.name} takes {self._costs[-1]:.3g} s; it is read less often from now on")
            return self.held
        try:
            if not timed and not self.watched:
                return self._read()
            started = timer()
            values = self._read()
            cost = timer() - started
        except FAILURES as error:
            return self._failed(error, now, tell)
        if self._failures:
            self._failures = 0
            tell("probe_recovered", f"{self.name} can be read again")
        if self._every or cost > CHEAP_SECONDS:
            self._budget(cost, values, now)
        else:
            self._costs, self.slow, self._slow_told = [], False, False
        self.watched = bool(self._every or self._costs)
        return values

    def _failed(self, error: BaseException, now: float, tell: Tell) -> Values:
        self._failures += 1
        self.watched, self.slow = True, False
        self.due = now + min(2.0 ** min(self._failures - 1, 10), LONGEST_BACKOFF_SECONDS)
        self.held = self._nothing
        if self._failures == 1:
            tell("probe_failed", f"{self.name} cannot be read: {error}")
        return self._nothing

    def _budget(self, cost: float, values: Values, now: float) -> None:
        self._costs = [*self._costs, cost][-RUNNING:]
        if self._every:
            wait = max(self._every, cost / self._share)
        elif len(self._costs) == RUNNING and min(self._costs) > CHEAP_SECONDS:
            wait = min(self._costs) / self._share
        else:
            return
        wait = min(wait, LONGEST_SECONDS)
        self.due = now + wait
        self.held = tuple(
            math.nan if column.endswith("_total") else value for column, value in zip(self.columns, values, strict=True)
        )
        self.slow = not self._every
