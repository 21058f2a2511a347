"""Changes that are asked for on the main thread: an interrupt may cut one off at any step.

It comes where a function begins, or where one of the interpreter's own has returned, and nowhere else.
Whatever it left half done is made whole from what the tasks tell, the change is carried out to its end,
and only then the interrupt is raised. As in ``_lives``: functions whose name begins with an underscore
expect the lock to be held, and append to ``effects`` what must happen after it is released.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

from wiseflow_nb.futures import settle
from wiseflow_nb.tasks._job import Effects, Job
from wiseflow_nb.tasks._lives import Lives, Settling, perform
from wiseflow_nb.tasks._machine import COMPLETED, FIRST_TERMINAL, WAITING

T = TypeVar("T")


class Mending(Lives):
    """Changes that are whole, wherever an interrupt comes."""

    def change(self, step: Callable[[Effects], T]) -> T:
        """Make a change, start what can be started now, and do what follows.

        ``step`` has the lock; it may be called again when an interrupt came in the midst of it.
        """
        effects: Effects = []
        again: Callable[[Effects], object] | None = step
        try:
            with self.lock:
                value = step(effects)
                again = None
                self._dispatch(effects)
            perform(effects)
        except BaseException:
            self.mend(effects, again)
            raise
        return value

    def soon(self, step: Callable[[Effects], object]) -> None:
        """As ``change``, but put off in a finaliser that comes in the midst of another change."""
        if self.inside():
            self.later.add(functools.partial(self.change, step))
        else:
            self.change(step)

    def mend(self, effects: Effects, step: Callable[[Effects], object] | None = None) -> None:
        """After an interrupt: make whole what it left half done, make the change if it was not, and do what follows."""
        with self.lock:
            self._restore(effects)
            if step is not None:
                step(effects)
            self._dispatch(effects)
        perform(effects, raises=False)

    def set_limit(self, limit: int) -> None:
        """Set how many tasks may run at once."""

        def step(_: Effects) -> None:
            self.slots.limit = limit

        self.soon(step)

    def set_paused(self, paused: bool) -> None:
        """Set whether no further task starts."""

        def step(_: Effects) -> None:
            self.slots.paused = paused

        self.soon(step)

    def _restore(self, effects: Effects) -> None:
        self.ledger.catch_up()
        jobs = list(self.ledger.jobs.values())
        self._end_the_ended(jobs, effects)
        self._pass_on(jobs, effects)
        self._link(jobs)
        for grant in self.slots.restore(jobs):
            effects.append(functools.partial(settle, grant))

    def _end_the_ended(self, jobs: list[Job], effects: Effects) -> None:
        # Nobody else leaves a task with its future behind that has ended.
        settling = {effect.args[0] for effect in effects if type(effect) is Settling}
        for job in jobs:
            task = job.task
            if job.code < FIRST_TERMINAL or task is None:
                continue
            if job in settling:
                job.task = None
            else:
                value = task._result if job.code == COMPLETED else None
                self._end_job(job, job.state, value, job.root_cause, effects)

    def _pass_on(self, jobs: list[Job], effects: Effects) -> None:
        # What the end of a task means for those behind it; a skipped one has others behind it in turn.
        waiting = [job for job in jobs if job.code == WAITING]
        changed = True
        while changed:
            changed = False
            for child in waiting:
                if child.code != WAITING:
                    continue
                ended = [parent for parent in child.dependencies if parent.code >= FIRST_TERMINAL]
                failed = None
                if child.options.trigger != "all_done":
                    failed = next((parent for parent in ended if parent.code != COMPLETED), None)
                if failed is not None:
                    self._skip(child, failed, effects)
                    changed = True
                    continue
                child.takes += tuple(
                    [parent for parent in ended if not parent.options.keep_result and parent not in child.takes]
                )
                child.remaining = len(child.dependencies) - len(ended)
                if not child.remaining:
                    self._make_ready(child)

    def _link(self, jobs: list[Job]) -> None:
        # Who waits for whom, and who lends whom a class, told by those that wait.
        taken = [job for job in jobs if job.takers]
        for job in jobs:
            job.takers = 0
            if job.dependents is not None:
                job.dependents = None
        alive = [job for job in jobs if job.code < FIRST_TERMINAL]
        for job in alive:
            job.level = job.options.priority
        for job in alive:
            for parent in job.takes:
                parent.takers += 1
            for parent in job.dependencies if job.code == WAITING else ():
                if parent.code < FIRST_TERMINAL:
                    parent.dependents = [*(parent.dependents or ()), job]
        stack = list(alive)
        while stack:
            job = stack.pop()
            for parent in (*job.dependencies, *job.waiting_on):
                if parent.code < FIRST_TERMINAL and parent.level < job.level:
                    parent.level = job.level
                    stack.append(parent)
        for job in taken:
            task = job.task_ref()
            if not job.takers and task is not None and task.done():
                task._release()
