"""How a task comes in beside the usual way: behind others, in the midst of a change, or interrupted.

As in ``_lives``: functions whose name begins with an underscore expect the lock to be held (but for those
that say otherwise), and append to ``effects`` what must happen after it is released.
"""

from __future__ import annotations

import contextvars
import functools
from typing import Any, NoReturn

from wiseflow_nb.errors import DependencyError, PoolClosedError
from wiseflow_nb.tasks import _output
from wiseflow_nb.tasks._job import Effects, Job
from wiseflow_nb.tasks._lives import perform
from wiseflow_nb.tasks._machine import COMPLETED, FIRST_TERMINAL, WAITING
from wiseflow_nb.tasks._options import TaskOptions
from wiseflow_nb.tasks._steering import Steering
from wiseflow_nb.tasks.task import Task


class Entering(Steering):
    """Dependencies, submits that are put off, and submits that are taken back."""

    def _enter_behind(self, job: Job, parents: list[Job], effects: Effects) -> bool:
        # Enter a task that has dependencies; return False if it is ready all the same.
        job.parents = tuple([parent.task_id for parent in parents])
        unfinished = [parent for parent in parents if parent.code != COMPLETED]
        if not unfinished:
            return False
        failed = None
        for parent in unfinished:
            if parent.code > COMPLETED:
                failed = parent
                break
        if failed is not None:
            if job.options.trigger == "all_completed":
                job.code = WAITING
                self.ledger.born(job)
                self._skip(job, failed, effects)
                return True
            unfinished = [parent for parent in unfinished if parent.code < FIRST_TERMINAL]
            if not unfinished:
                return False
        job.code = WAITING
        self.ledger.born(job)
        job.remaining = len(unfinished)
        job.dependencies = tuple(unfinished)
        level = job.level
        for parent in unfinished:
            if parent.dependents is None:
                parent.dependents = [job]
            else:
                parent.dependents.append(job)
            if parent.level < level:
                self._lend(parent, level)
        return True

    def _parents(self, task_id: str, needed: list[Task[Any]], named: tuple[Task[Any] | str, ...]) -> list[Job]:
        parents = []
        for task in needed:
            job = task._job
            if task._scheduler is not self or (job.code == COMPLETED and not job.options.keep_result):
                self._refuse(task_id, task)
            parents.append(job)
        if not named:
            return parents
        for item in named:
            if isinstance(item, Task):
                found: Job | None = item._job
                if item._scheduler is not self or (item._job.code == COMPLETED and item._job.released):
                    self._refuse(task_id, item)
            elif item == task_id:
                raise DependencyError(f"a task cannot depend on itself: {task_id} -> {task_id}; leave it out")
            else:
                found = self.ledger.jobs.get(item)
            if found is None:
                raise DependencyError(f"{task_id} -> {item}: there is no task {item!r}; give a Task or a known id")
            parents.append(found)
        return list(dict.fromkeys(parents))

    def _refuse(self, task_id: str, needed: Task[Any]) -> NoReturn:
        if needed._scheduler is not self:
            raise DependencyError(f"{needed!r} belongs to another manager; submit both to the same one")
        raise DependencyError(
            f"{task_id} -> {needed.id}: its result was released (keep_result=False); submit this before it ends"
        )

    def _take_back(self, job: Job, effects: Effects) -> None:
        # Something came in between, as an interrupt of the main thread does, while a task was entered: its
        # caller does not get it, so it is not to run; and what was done by half is done wholly or not at all.
        with self.lock:
            entered = self.ledger.jobs.get(job.task_id) is job
            if not entered:
                self._settled(1)
            self._restore(effects)
            if entered and job.code < FIRST_TERMINAL:
                self._cancel(job, "interrupted while it was submitted", effects)
            if self._unsettled:
                self.quiet.clear()
                _output.begin_routing(self)
            else:
                self._all_quiet()
            self._dispatch(effects)
        perform(effects, raises=False)

    def _put_off(
        self,
        task: Task[Any],
        call: tuple[Any, tuple[Any, ...], dict[str, Any]],
        kind: str,
        name: str,
        options: TaskOptions,
        needed: list[Task[Any]],
        variables: contextvars.Context,
        retry_of: str,
    ) -> Task[Any]:
        # A finaliser submits in the midst of a change: it has its task, which is entered after that.
        if self.closed:
            raise PoolClosedError(self.refusal)
        parents = self._parents(f"{self._prefix}{self._numbers + 1}", needed, options.dependencies)
        self._numbers = number = self._numbers + 1
        task_id = f"{self._prefix}{number}"
        task._job = job = Job(number, task_id, name, kind, options, call, task, variables, self._time())
        job.retry_of = retry_of
        self.later.add(functools.partial(self._enter_later, job, parents))
        return task

    def _enter_later(self, job: Job, parents: list[Job]) -> None:
        effects: Effects = []
        with self.lock:
            if not self._unsettled:
                self.quiet.clear()
                _output.begin_routing(self)
            self._unsettled += 1
            if not self._enter_behind(job, parents, effects):
                job.ready_at = self._monotonic()
                job.ready_seconds = self._time()
                self.ledger.born(job)
                self.slots.push(job)
            if job.options.deadline is not None and job.code < FIRST_TERMINAL:
                due = self._monotonic() + job.options.deadline
                job.deadline = self.timers.at(due, functools.partial(self.deadline_due, job))
            if self.closed:
                self._cancel(job, "shutdown", effects)
            self._dispatch(effects)
        perform(effects)
