"""Which tasks a retry by hand brings back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from wiseflow_nb.errors import UsageError
from wiseflow_nb.records import TaskState
from wiseflow_nb.tasks._job import Job


def retry_plan(jobs: Mapping[str, Job], task_id: str) -> list[Job]:
    """The tasks to submit anew: the given one and what was skipped because of it, in order of creation.

    Raises
    ------
    UsageError
        If the task is unknown, or is none that is retried.
    """
    first = jobs.get(task_id)
    if first is None:
        raise UsageError(f"there is no task {task_id!r}; look in records()")
    if not first.state.terminal or first.state in (TaskState.COMPLETED, TaskState.SKIPPED):
        root = first.skipped_for
        told = "submit it again instead" if root is None else f"retry {root[0]}, which brings it along"
        raise UsageError(f"task {first.label} is {first.state}, which is not retried; {told}")
    found: dict[str, Job] = {}
    stack = [first]
    while stack:
        job = stack.pop()
        found[job.task_id] = job
        stack += [jobs[item] for item in job.skipped if item in jobs and item not in found]
    for job in found.values():
        if inspect.iscoroutine(job.call[0]):
            raise UsageError(f"task {job.label} was a coroutine object, which runs once; submit its function")
    return sorted(found.values(), key=lambda job: job.number)
