"""Which running tasks look stuck, and why: a function of records and of what was usual so far."""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from wiseflow_nb.records import TaskRecord, TaskState

#: A task is slow when it has run this many times the usual time of its name, and this much longer.
SLOW_FACTOR = 3.0
SLOW_MARGIN_SECONDS = 10.0
#: From so many completed runs on there is a usual time.
USUAL_FROM = 3
#: A task that has told its progress before, and not for so long, has none.
NO_PROGRESS_SECONDS = 60.0
#: A task that was asked to stop is expected to have stopped within this time.
CANCELLING_SECONDS = 10.0
#: Names and runs that are remembered.
NAMES_KEPT = 1000
RUNS_KEPT = 16


@dataclass(frozen=True, slots=True)
class StalledTask:
    """A running task that needs a look.

    ``kind`` is ``slow``, ``no_progress`` or ``cancelling``; ``seconds`` is how long that has
    lasted, ``expected_seconds`` how long it may, and ``message`` says both in words.
    """

    task_id: str
    name: str
    kind: str
    seconds: float
    expected_seconds: float
    message: str


class UsualTimes:
    """The wall times of the last completed runs by name, bounded in both; the caller holds its lock."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, deque[float]] = OrderedDict()

    def add(self, name: str, wall_seconds: float) -> None:
        """A task of that name completed."""
        try:
            self._runs[name].append(wall_seconds)
        except KeyError:
            self._runs[name] = deque([wall_seconds], maxlen=RUNS_KEPT)
            if len(self._runs) > NAMES_KEPT:
                self._runs.popitem(last=False)

    def usual(self, name: str) -> float:
        """The median, in seconds; NaN while too few have completed."""
        runs = self._runs.get(name)
        return statistics.median(runs) if runs is not None and len(runs) >= USUAL_FROM else math.nan


def find_stalled(
    running: Iterable[tuple[TaskRecord, float, float]], usual: Callable[[str], float], now_seconds: float
) -> list[StalledTask]:
    """Return what is stuck among running tasks, the longest first.

    Parameters
    ----------
    running
        Records of running tasks, each with the moment of its last progress and that at which it was
        asked to stop (NaN: never).
    usual
        The usual wall time of a name, NaN if unknown.
    now_seconds
        The moment to judge by, since the epoch as in the records.

    Examples
    --------
    >>> record = TaskRecord("t1", "load", TaskState.RUNNING, started_seconds=100.0)
    >>> [item.message for item in find_stalled([(record, math.nan, math.nan)], lambda name: 2.0, 160.0)]
    ['runs for 60 s, usually 2 s']
    """
    found = []
    for record, progress_at, asked_at in running:
        kind, seconds, expected, message = "", 0.0, math.nan, ""
        wall, since = now_seconds - record.started_seconds, now_seconds - progress_at
        asked = now_seconds - asked_at
        typical = usual(record.name)
        if record.state is TaskState.CANCELLING:
            if asked > CANCELLING_SECONDS:
                kind, seconds, expected = "cancelling", asked, CANCELLING_SECONDS
                message = f"was asked to stop {asked:.0f} s ago and still runs"
        elif since > NO_PROGRESS_SECONDS:
            kind, seconds, expected = "no_progress", since, NO_PROGRESS_SECONDS
            message = f"told no progress for {since:.0f} s"
        elif wall > SLOW_FACTOR * typical and wall > typical + SLOW_MARGIN_SECONDS:
            kind, seconds, expected = "slow", wall, typical
            message = f"runs for {wall:.0f} s, usually {typical:.2g} s"
        if kind:
            found.append(StalledTask(record.task_id, record.name, kind, seconds, expected, message))
    return sorted(found, key=lambda item: -item.seconds)
