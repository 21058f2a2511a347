"""The book of all tasks: states, revisions and counts, written by one function per kind of change.

The caller holds the manager's lock.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator

from wiseflow_nb.clock import Clock
from wiseflow_nb.records import HasRecord, TaskRecord, TaskState, TaskTransition
from wiseflow_nb.tasks._job import Job
from wiseflow_nb.tasks._machine import (
    CANCELLING,
    COMPLETED,
    FIRST_TERMINAL,
    KEPT_MOVES,
    MOVES,
    PENDING,
    RUNNING,
    STATES,
    check_move,
)
from wiseflow_nb.tasks._stalled import UsualTimes

logger = logging.getLogger("wiseflow_nb.tasks")
OnChange = Callable[[TaskRecord, TaskTransition | None], None]
#: As ``OnChange``, with what gives the record when it is asked for it.
OnMove = Callable[[HasRecord, TaskTransition | None], None]

#: Records of finished tasks that are kept; the oldest are dropped.
FINISHED_KEPT = 100_000


class Ledger:
    """Tasks by id and by the order of their last change."""

    def __init__(self, clock: Clock, on_move: OnMove | None, kept: int = FINISHED_KEPT) -> None:
        self._clock = clock
        self._on_move = on_move
        self._kept = kept
        self._finished: deque[Job] = deque()
        # One entry a change, the newest last: of a task's entries the last is the one that counts.
        self._changes: list[Job] = []
        self._tidy_at = 4096
        self._counts = [0] * len(STATES)
        #: Of the tasks whose records are no longer kept: how many ended in which state, and their last change.
        self._dropped_counts = [0] * len(STATES)
        self.dropped_rev = 0
        self.jobs: dict[str, Job] = {}
        self.rev = 0
        # Changes without a transition: a revision is the number of a transition but for these.
        self._touches = 0
        self._touched = 0
        #: The last revision that ``on_move`` was told of.
        self._told = 0
        self.callback_failures = 0
        self.usual = UsualTimes()

    @property
    def counts(self) -> dict[TaskState, int]:
        """How many tasks are in each state."""
        return dict(zip(STATES, self._counts, strict=True))

    @property
    def counts_over_all(self) -> dict[TaskState, int]:
        """How many tasks are or ended in each state, those that are no longer kept included."""
        return {state: a + b for state, a, b in zip(STATES, self._counts, self._dropped_counts, strict=True)}

    @property
    def running(self) -> int:
        """How many tasks have code that runs."""
        return self._counts[RUNNING] + self._counts[CANCELLING]

    def born(self, job: Job) -> None:
        """Enter a new task; it tells the state it begins in."""
        code = job.code
        if code > PENDING:
            check_move(job.task_id, (), None, job.state)
        self.jobs[job.task_id] = job
        self._counts[code] += 1
        job.been = code + 1
        job.rev = self.rev = self.rev + 1
        self._changes.append(job)
        if self._on_move is not None:
            self._tell_move(job, None)

    def move(self, job: Job, code: int, reason: str = "") -> None:
        """Make one legal transition; whatever else changes in that moment has been written to the job."""
        source = job.code
        if not MOVES[source] >> code & 1:
            check_move(job.task_id, job.history, STATES[source], STATES[code])
        counts = self._counts
        counts[source] -= 1
        counts[code] += 1
        job.code = code
        if reason or job.reason:
            job.reason = reason
        job.been = job.been << 4 | code + 1
        job.rev = self.rev = self.rev + 1
        self._changes.append(job)
        if self._on_move is not None:
            self._tell_move(job, source)
        if code >= FIRST_TERMINAL:
            if code == COMPLETED:
                self.usual.add(job.name, job.figures[0])
            self._finished.append(job)
            if len(self._finished) > self._kept:
                self._drop(self._finished.popleft())
            if len(self._changes) > self._tidy_at:
                self._tidy()
        elif code == PENDING:
            # Each attempt comes by here: so a history does not grow without end.
            job.been &= KEPT_MOVES

    def catch_up(self) -> None:
        """Make the last change whole, if an interrupt came in the midst of it."""
        if not self._changes:
            return
        job = self._changes[-1]
        if self._on_move is not None and job.rev > self._told:
            if job.rev == self._touched:
                self._tell(job, None)
            else:
                source = job.been >> 4 & 15
                self._tell_move(job, source - 1 if source else None)
        if job.code >= FIRST_TERMINAL and not (self._finished and self._finished[-1] is job):
            self._finished.append(job)

    def touch(self, job: Job) -> None:
        """Something of a task changed without a transition."""
        self._touches += 1
        job.rev = self._touched = self.rev = self.rev + 1
        self._changes.append(job)
        if len(self._changes) > self._tidy_at:
            self._tidy()
        if self._on_move is not None:
            self._tell(job, None)

    def since(self, rev: int) -> tuple[TaskRecord, ...]:
        """Records changed after ``rev``, in order of change."""
        return tuple([job.record for job in self.changed(rev)][::-1])

    def changed(self, rev: int) -> Iterator[Job]:
        """Tasks changed after ``rev``, the newest change first."""
        # An older entry of a task that has been passed tells a revision that is no longer falling.
        last = self.rev + 1
        for job in reversed(self._changes):
            if job.rev < last and not job.dropped:
                if job.rev <= rev:
                    return
                last = job.rev
                yield job

    @property
    def seq(self) -> int:
        """The number of the last transition."""
        return self.rev - self._touches

    def tell_nobody(self) -> None:
        """In a forked child: who is told lives in the parent."""
        self._on_move = None

    def _tidy(self) -> None:
        kept = []
        last = self.rev + 1
        for job in reversed(self._changes):
            if job.rev < last and not job.dropped:
                last = job.rev
                kept.append(job)
        kept.reverse()
        self._changes = kept
        # Each change pays for its share of the next tidying, whatever the number of tasks.
        self._tidy_at = 4096 + 2 * len(self._changes)

    def _tell_move(self, job: Job, source: int | None) -> None:
        before = "" if source is None else STATES[source].value
        now = self._clock.time()
        self._tell(job, TaskTransition(self.seq, job.task_id, job.attempts, before, STATES[job.code], now, job.reason))

    def _tell(self, job: Job, transition: TaskTransition | None) -> None:
        assert self._on_move is not None
        self._told = job.rev
        try:
            self._on_move(job, transition)
        except BaseException:  # the caller's code: counted, and logged once with its traceback
            self.callback_failures += 1
            if self.callback_failures == 1:
                logger.exception("on_change failed; further failures are counted only")

    def _drop(self, job: Job) -> None:
        del self.jobs[job.task_id]
        job.dropped = True
        self._counts[job.code] -= 1
        self._dropped_counts[job.code] += 1
        self.dropped_rev = max(self.dropped_rev, job.rev)


def with_records(on_change: OnChange, on_move: OnMove | None) -> OnMove:
    """Both as one; the record is made for each change."""

    def both(job: HasRecord, transition: TaskTransition | None) -> None:
        if on_move is not None:
            on_move(job, transition)
        on_change(job.record, transition)

    return both
