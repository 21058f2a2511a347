"""Runs one attempt: a plain call on this worker thread, a coroutine on the loop; then its cleanup."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from typing import TYPE_CHECKING, Any

from tests.oracles.plain_tasks import _cleanup
from tests.oracles.plain_tasks._graph import swapped
from tests.oracles.plain_tasks._job import Attempt, Job
from tests.oracles.plain_tasks._steps import StepTimer
from tests.oracles.plain_tasks.task import Task
from wiseflow_nb.context import enter_task
from wiseflow_nb.errors import UsageError
from wiseflow_nb.records import TaskState

if TYPE_CHECKING:
    from tests.oracles.plain_tasks._scheduler import Scheduler


class Runner:
    """The edge where user code is called."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        # The loop itself holds its tasks weakly.
        self._drivers: set[asyncio.Task[None]] = set()

    def run_call(self, job: Job, attempt: Attempt) -> None:
        """Run a plain call on this thread, to its end."""
        job.variables.copy().run(self._run_call, job, attempt)

    def _run_call(self, job: Job, attempt: Attempt) -> None:
        scheduler = self._scheduler
        enter_task(attempt.context)
        started = scheduler.clock.monotonic()
        cpu_started = time.thread_time_ns()
        try:
            args, kwargs = _with_results(job)
            attempt.value = job.fn(*args, **kwargs)
            del args, kwargs
            if inspect.iscoroutine(attempt.value):
                attempt.value.close()
                attempt.value = None
                raise UsageError(f"task {job.record.name!r} returned a coroutine; submit it with kind='async'")
        except BaseException as caught:
            attempt.error = caught
        attempt.asked = attempt.context.cancelled
        attempt.cpu_seconds = (time.thread_time_ns() - cpu_started) / 1e9
        attempt.cpu_source = "thread_time"
        attempt.wall_seconds = scheduler.clock.monotonic() - started
        if scheduler.code_ended(job, attempt):
            watch = functools.partial(scheduler.watch_cleanup, job, attempt)
            handlers = scheduler.cleanup_of(job, attempt)
            scheduler.attempt_ended(job, attempt, _cleanup.run_in_thread(handlers, scheduler.loop, watch))

    def start_coroutine(self, job: Job, attempt: Attempt) -> None:
        """Begin a coroutine; called on the loop."""
        loop = asyncio.get_running_loop()
        driver = loop.create_task(self._drive(job, attempt), name=job.record.name, context=job.variables.copy())
        self._drivers.add(driver)
        driver.add_done_callback(self._drivers.discard)

    def stop_coroutine(self, attempt: Attempt) -> None:
        """Cancel a coroutine that still runs; called on the loop, between its steps."""
        if attempt.driver is not None:
            attempt.driver.cancel()

    async def _drive(self, job: Job, attempt: Attempt) -> None:
        scheduler = self._scheduler
        enter_task(attempt.context)
        started = scheduler.clock.monotonic()
        steps: StepTimer | None = None
        # From here to where it is None again a cancel goes into the user's code, never into ours.
        attempt.driver = asyncio.current_task()
        try:
            if attempt.context.cancelled:
                if inspect.iscoroutine(job.fn):
                    job.fn.close()
                raise asyncio.CancelledError(attempt.context.token.reason)
            steps = StepTimer(_awaitable(job))
            attempt.value = await steps
        except BaseException as caught:
            attempt.error = caught
        attempt.driver = None
        attempt.asked = attempt.context.cancelled
        attempt.cpu_seconds = 0.0 if steps is None else steps.cpu_ns / 1e9
        attempt.cpu_source = "coroutine_steps"
        attempt.wall_seconds = scheduler.clock.monotonic() - started
        if scheduler.code_ended(job, attempt):
            handlers = scheduler.cleanup_of(job, attempt)
            scheduler.attempt_ended(job, attempt, await _cleanup.run_on_loop(handlers))


def _awaitable(job: Job) -> Any:
    if inspect.iscoroutine(job.fn):
        return job.fn
    args, kwargs = _with_results(job)
    made = job.fn(*args, **kwargs)
    if not inspect.isawaitable(made):
        raise UsageError(f"task {job.record.name!r} has kind='async' but returned {type(made).__name__}, no awaitable")
    return made


def _with_results(job: Job) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return swapped(job.args, job.kwargs, _result_of)


def _result_of(task: Task[Any]) -> Any:
    # With trigger="all_done" a dependency may have ended otherwise: then the task itself is handed
    # over. Not Task.result: on the loop that refuses to wait, and here there is at most a moment to
    # wait, between the transition that made this task ready and the settling that follows it.
    if task.state is not TaskState.COMPLETED:
        return task
    return super(Task, task).result()
