"""Which tasks a first picture shows: the same choice in both views, and small whatever there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from wiseflow_nb.records import TaskRecord, TaskState

#: So many tasks that changed last, and so many older ones that have not ended: read in some milliseconds.
SHOWN_TASKS = 500
#: Where more than this have changed, a first picture takes the place of what changed.
CHANGED_TASKS = 1000
#: In which order those that have not ended are chosen, where there are more.
_UNFINISHED = (TaskState.RUNNING, TaskState.CANCELLING, TaskState.RETRY_WAIT, TaskState.PENDING, TaskState.WAITING)


class TaskSource(Protocol):
    """Where tasks are read from: the oldest change first, or the newest."""

    def count_changed(self, since_rev: int, most: int) -> int: ...

    def changed_tasks(self, since_rev: int, limit: int) -> Sequence[TaskRecord]: ...

    def newest_tasks(self, limit: int, until_rev: int = ...) -> Sequence[TaskRecord]: ...

    def unfinished_tasks(self, state: TaskState, limit: int, until_rev: int) -> Sequence[TaskRecord]: ...


class Picture(NamedTuple):
    """Tasks in the order of their last change; see ``Snapshot`` for ``reset`` and ``older_rev``."""

    tasks: tuple[TaskRecord, ...]
    reset: bool
    older_rev: int


def picture(source: TaskSource, since_rev: int) -> Picture:
    """Return what changed after ``since_rev``; a first picture where that is 0, or more than fits into one."""
    # Counted before they are read: what does not fit is never made into records.
    if since_rev > 0 and source.count_changed(since_rev, CHANGED_TASKS) <= CHANGED_TASKS:
        return Picture(tuple(source.changed_tasks(since_rev, CHANGED_TASKS)), False, 0)
    found = list(source.newest_tasks(SHOWN_TASKS + 1))
    if len(found) <= SHOWN_TASKS:
        return Picture(tuple(reversed(found)), True, 0)
    older_rev = found.pop().rev
    older: list[TaskRecord] = []
    for state in _UNFINISHED:
        if (left := SHOWN_TASKS - len(older)) > 0:
            older += source.unfinished_tasks(state, left, older_rev)
    return Picture((*sorted(older, key=lambda task: task.rev), *reversed(found)), True, older_rev)
