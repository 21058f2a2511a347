"""The book of all tasks: records, revisions and counts, written by one function per kind of change.

The caller holds the manager's lock.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from tests.oracles.plain_tasks._job import Job
from tests.oracles.plain_tasks._machine import check_move
from wiseflow_nb.clock import Clock
from wiseflow_nb.records import TaskRecord, TaskState, TaskTransition
from wiseflow_nb.tasks._stalled import UsualTimes

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("wiseflow_nb.tasks")
OnChange = Callable[[TaskRecord, TaskTransition | None], None]

#: Records of finished tasks that are kept; the oldest are dropped.
FINISHED_KEPT = 100_000


class Ledger:
    """Tasks by id and by the order of their last change."""

    def __init__(self, clock: Clock, on_change: OnChange | None, kept: int = FINISHED_KEPT) -> None:
        self._clock = clock
        self._on_change = on_change
        self._kept = kept
        self._finished: deque[str] = deque()
        self._changed: dict[str, Job] = {}
        self.jobs: dict[str, Job] = {}
        self.counts: dict[TaskState, int] = dict.fromkeys(TaskState, 0)
        self.rev = 0
        self.seq = 0
        self.callback_failures = 0
        self.usual = UsualTimes()

    def born(self, job: Job) -> None:
        """Enter a new task; its record tells the state it begins in."""
        state = job.record.state
        check_move(job.task_id, job.history, None, state)
        self.jobs[job.task_id] = job
        self.counts[state] += 1
        self._write(job, None, state, "", {})

    def move(self, job: Job, state: TaskState, reason: str = "", **changes: Any) -> None:
        """Make one legal transition, with whatever else changes in the same moment."""
        source = job.record.state
        check_move(job.task_id, job.history, source, state)
        self.counts[source] -= 1
        self.counts[state] += 1
        self._write(job, source, state, reason, changes)
        if state is TaskState.COMPLETED:
            self.usual.add(job.record.name, job.record.wall_seconds)
        if state.terminal:
            self._finished.append(job.task_id)
            if len(self._finished) > self._kept:
                self._drop(self._finished.popleft())

    def touch(self, job: Job, **changes: Any) -> None:
        """Change a record without a transition."""
        self.rev += 1
        job.record = replace(job.record, rev=self.rev, **changes)
        self._reorder(job)
        self._tell(job.record, None)

    def since(self, rev: int) -> tuple[TaskRecord, ...]:
        """Records changed after ``rev``, in order of change."""
        found = []
        for job in reversed(self._changed.values()):
            if job.record.rev <= rev:
                break
            found.append(job.record)
        return tuple(reversed(found))

    def _write(
        self, job: Job, source: TaskState | None, state: TaskState, reason: str, changes: dict[str, Any]
    ) -> None:
        self.rev += 1
        self.seq += 1
        job.record = replace(job.record, state=state, reason=reason, rev=self.rev, **changes)
        job.history.append(state.value)
        self._reorder(job)
        self._tell(
            job.record,
            TaskTransition(
                self.seq,
                job.task_id,
                job.record.attempt,
                "" if source is None else source.value,
                state,
                self._clock.time(),
                reason,
            ),
        )

    def _reorder(self, job: Job) -> None:
        self._changed.pop(job.task_id, None)
        self._changed[job.task_id] = job

    def _tell(self, record: TaskRecord, transition: TaskTransition | None) -> None:
        if self._on_change is None:
            return
        try:
            self._on_change(record, transition)
        except Exception:  # the caller's code: counted, and logged once with its traceback
            self.callback_failures += 1
            if self.callback_failures == 1:
                logger.exception("on_change failed; further failures are counted only")

    def _drop(self, task_id: str) -> None:
        job = self.jobs.pop(task_id)
        self._changed.pop(task_id, None)
        self.counts[job.record.state] -= 1


def records_frame(rows: Sequence[TaskRecord]) -> pd.DataFrame:
    """One row a record, indexed by ``task_id``, times in UTC."""
    import pandas as pd

    frame = pd.DataFrame([asdict(row) for row in rows], columns=[item.name for item in fields(TaskRecord)])
    frame["state"] = [row.state.value for row in rows]
    frame["priority"] = [row.priority.name.lower() for row in rows]
    names = list(frame.columns)
    for column in ("created", "ready", "started", "finished"):
        values = frame.pop(f"{column}_seconds").astype("float64")
        frame.insert(names.index(f"{column}_seconds"), column, pd.to_datetime(values, unit="s", utc=True))
    return frame.set_index("task_id")
