"""What happens to a task from outside while it lives: a moment that comes due, a cancel, the end of the manager.

As in ``_lives``: functions whose name begins with an underscore expect the lock to be held, and append
to ``effects`` what must happen after it is released.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

from wiseflow_nb.errors import TaskAbandonedError, TaskCancelledError, TaskTimeoutError
from wiseflow_nb.records import Priority, TaskState
from wiseflow_nb.tasks._job import Attempt, Effects, Job
from wiseflow_nb.tasks._lives import lenders, perform
from wiseflow_nb.tasks._loop import TaskLoop
from wiseflow_nb.tasks._machine import CANCELLING, FIRST_TERMINAL, Stop
from wiseflow_nb.tasks._mending import Mending
from wiseflow_nb.tasks._texts import text_of_own

if TYPE_CHECKING:
    from wiseflow_nb.tasks._runner import Runner


class Steering(Mending):
    """Time-outs, deadlines, retries, progress and cancels."""

    loop: TaskLoop
    runner: Runner

    # -- time --------------------------------------------------------------------------------

    def retry_due(self, job: Job) -> None:
        """The wait before another attempt is over."""
        effects: Effects = []
        with self.lock:
            if job.state is TaskState.RETRY_WAIT:
                self._make_ready(job)
                self._dispatch(effects)
        perform(effects)

    def timeout_due(self, attempt: Attempt) -> None:
        """An attempt has run as long as it may."""
        effects: Effects = []
        job = attempt.job
        with self.lock:
            # Its code may have ended already, and only its cleanup still run.
            if job.attempt is attempt and job.state is TaskState.RUNNING and not attempt.ended:
                self._ask_to_stop(job, attempt, Stop.TIMEOUT, "timed out", effects)
        perform(effects)

    def deadline_due(self, job: Job) -> None:
        """A task should have ended by now."""
        effects: Effects = []
        with self.lock:
            if job.attempt is not None:
                if job.attempt.ended or job.attempt.stop is Stop.CANCEL:
                    return  # its end is settled, or was asked for by a person
                self._ask_to_stop(job, job.attempt, Stop.DEADLINE, "deadline passed", effects)
            elif not job.state.terminal:
                self.slots.discard(job)
                error = TaskTimeoutError(f"task {job.label} was not done by its deadline of {job.options.deadline:g} s")
                told = text_of_own(error)
                job.error, job.traceback = told.line(), told.traceback
                self._finish(job, TaskState.TIMED_OUT, effects, reason="deadline passed", error=error)
                self._dispatch(effects)
        perform(effects)

    def progressed(self, attempt: Attempt, fraction: float, text: str) -> None:
        """A running attempt tells how far it is."""
        job = attempt.job
        if self.inside():
            self.later.add(functools.partial(self.progressed, attempt, fraction, text))
            return
        with self.lock:
            if job.attempt is attempt:
                attempt.progress_at = self._time()
                job.progress, job.progress_text = fraction, text
                self.ledger.touch(job)

    # -- cancel ------------------------------------------------------------------------------

    def cancel(self, job: Job, reason: str) -> bool:
        """Ask a task to stop; return whether it was, or has been, cancelled."""
        if self.inside() or not job.been:  # not even entered: it was submitted in the midst of a change
            self.later.add(functools.partial(self.cancel, job, reason))
            return job.code < FIRST_TERMINAL or job.state is TaskState.CANCELLED
        return self.change(functools.partial(self._cancel, job, reason))

    def reprioritise(self, job: Job, priority: Priority) -> bool:
        """Change a task's own class; return False if it has ended."""
        if self.inside() or not job.been:
            self.later.add(functools.partial(self.reprioritise, job, priority))
            return job.code < FIRST_TERMINAL
        return self.change(functools.partial(self._reprioritise, job, priority))

    def _reprioritise(self, job: Job, priority: Priority, effects: Effects) -> bool:
        if job.code >= FIRST_TERMINAL:
            return False
        before = job.level
        job.options = replace(job.options, priority=priority)
        self.ledger.touch(job)
        job.level = max((priority, *lenders(job)))
        self.slots.reprioritise(job, self.clock.monotonic())
        for parent in (*job.dependencies, *job.waiting_on):
            if job.level > before:
                self._lend(parent, job.level)
            else:
                self._lower(parent, before)
        return True

    def _cancel(self, job: Job, reason: str, effects: Effects) -> bool:
        if job.code >= FIRST_TERMINAL or self.left_behind:
            return job.state is TaskState.CANCELLED
        if job.attempt is not None:
            # Asked once more, a coroutine would be stopped in the midst of what it does in order to stop.
            if job.attempt.stop is not Stop.CANCEL:
                self._ask_to_stop(job, job.attempt, Stop.CANCEL, reason, effects)
            return True
        self.slots.discard(job)
        error = TaskCancelledError(f"task {job.label} was cancelled: {reason}")
        self._finish(job, TaskState.CANCELLED, effects, reason=reason, error=error)
        return True

    def _ask_to_stop(self, job: Job, attempt: Attempt, stop: Stop, reason: str, effects: Effects) -> None:
        if attempt.asked_at != attempt.asked_at:
            attempt.asked_at = self.clock.time()
        if job.state is TaskState.RUNNING:
            self.ledger.move(job, CANCELLING, reason)
        else:
            job.reason = reason
            self.ledger.touch(job)
        if not attempt.ended:
            attempt.token.cancel(reason)
        self._drop_grant(job, effects)
        effect = functools.partial(self.loop.call, self.runner.stop_coroutine, [attempt])
        # Last: until then an interrupt leaves it to be asked anew, from then on it was asked.
        attempt.stop = stop
        if job.kind == "async":
            effects.append(effect)

    def _abandon(self, job: Job, effects: Effects) -> None:
        attempt = job.attempt
        if attempt is None:
            return
        if job.state is TaskState.RUNNING:
            self._ask_to_stop(job, attempt, Stop.CANCEL, "shutdown", effects)
        self._leave(attempt)
        error = TaskAbandonedError(
            f"task {job.label} was still running when its manager closed; let it check_cancelled()"
        )
        job.error = text_of_own(error).line()
        self._finish(job, TaskState.ABANDONED, effects, reason="shutdown", error=error)
