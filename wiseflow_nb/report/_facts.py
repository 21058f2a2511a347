"""What is known of a session's end, as one frozen record; every judgement is made from it alone."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from wiseflow_nb.records import (
    NAN,
    AlertView,
    CellRecord,
    EventRecord,
    Sample,
    SessionInfo,
    SessionState,
    TaskRecord,
    TaskState,
)

#: "The last minutes": what is shown, and what is looked at for a cause.
WINDOW_SECONDS = 300.0


class Confidence(enum.StrEnum):
    """How sure a cause is, by rule.

    ``certain``: the record says it, or a counter rose across the very moment. ``likely``: figures
    point to it and nothing contradicts. ``possible``: figures allow it, something is missing or speaks
    against it. ``unknown``: nothing in the record points anywhere.
    """

    CERTAIN = "certain"
    LIKELY = "likely"
    POSSIBLE = "possible"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Cause:
    """One explanation of how a session ended: a sentence, how sure it is, and the figures behind it."""

    kind: str
    sentence: str
    confidence: Confidence
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Growth:
    """How much the kernel tree's memory grew while a task or a cell ran, in the last minutes.

    ``alone_bytes`` is the part that came while nothing else ran; ``others`` are those that ran
    meanwhile. Bytes and seconds.
    """

    label: str
    key: str
    is_task: bool
    grown_bytes: float
    alone_bytes: float
    seconds: float
    others: tuple[str, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether nearly all of the growth came while it alone ran."""
        return self.alone_bytes >= 0.8 * self.grown_bytes


@dataclass(frozen=True, slots=True)
class Shutdown:
    """A shutdown command that was answered: by whom, when (seconds since the epoch), how."""

    time_seconds: float
    who: str
    mode: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What the record of one session holds about its last minutes.

    Times are seconds since the epoch. ``samples`` are those of the last minutes, oldest first;
    ``first`` is the oldest that is kept. ``tasks`` and ``cells`` are those that were in flight at the end
    or ran in the last minutes, with the states that were written (not LOST). ``host_now``,
    ``boot_id_now`` and ``boot_seconds_now`` are those of the machine that reads. ``oom_kills_now`` is
    the container's counter as it is read for the report, where nothing outlived a crash to read it
    then; NaN elsewhere. ``recorder_lives`` is the process of a recorder that still runs though it has not
    marked the end of a crashed session; 0 elsewhere.
    """

    info: SessionInfo
    now_seconds: float
    ended_mark_seconds: float = NAN
    end_reason: str = ""
    heartbeat_seconds: float = NAN
    boot_id: str = ""
    host_now: str = ""
    boot_id_now: str = ""
    boot_seconds_now: float = NAN
    recorder_on_thread: bool = False
    recorder_lives: int = 0
    first: Sample | None = None
    samples: tuple[Sample, ...] = ()
    tasks: tuple[TaskRecord, ...] = ()
    tasks_in_flight: int = 0
    cells: tuple[CellRecord, ...] = ()
    alerts: tuple[AlertView, ...] = ()
    events: tuple[EventRecord, ...] = ()
    shutdowns: tuple[Shutdown, ...] = ()
    thresholds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    oom_kills_now: float = NAN
    dropped_rows: int = 0
    dropped_tasks: int = 0
    task_counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def live(self) -> bool:
        """Whether the session has not ended."""
        return self.info.state is SessionState.LIVE

    @property
    def crashed(self) -> bool:
        """Whether the session ended without saying so."""
        return self.info.state is SessionState.CRASHED

    @property
    def marked(self) -> bool:
        """Whether somebody wrote an end mark: the kernel in order, or its recorder after its death."""
        return math.isfinite(self.ended_mark_seconds)

    @property
    def last_alive(self) -> Sample | None:
        """The last sample in which the kernel's process tree was seen."""
        for sample in reversed(self.samples):
            if sample.process_memory_rss_bytes > 0:
                return sample
        return None

    @property
    def after_death(self) -> tuple[Sample, ...]:
        """The samples of the recorder after the kernel had gone; empty unless it crashed."""
        if not self.crashed:
            return ()
        found: list[Sample] = []
        for sample in reversed(self.samples):
            if sample.process_memory_rss_bytes > 0:
                break
            found.append(sample)
        return tuple(reversed(found)) if len(found) < len(self.samples) else ()

    @property
    def end_seconds(self) -> float:
        """The last moment at which the work is known to have been there (now, if it still is).

        After a crash that is the last sample with the kernel in it, or the newest sign of life.
        """
        if self.live:
            return self.now_seconds
        if self.crashed:
            if (alive := self.last_alive) is not None:
                return alive.time_seconds
            return _first_finite(self.heartbeat_seconds, self.info.ended_seconds, self.now_seconds)
        return _first_finite(self.ended_mark_seconds, self.info.ended_seconds, self.info.last_seen_seconds)

    def was_running(self, task: TaskRecord) -> bool:
        """Whether the task was in flight when the session ended (or is now)."""
        return not task.state.terminal or task.state is TaskState.LOST


def _first_finite(*values: float) -> float:
    return next((value for value in values if math.isfinite(value)), NAN)
