"""Runs attempts: plain calls on a worker thread, coroutines on the loop; then their cleanup.

A coroutine gets no asyncio task of its own. A *runner* is an asyncio task that takes one ready task
after the other and drives its coroutine by hand, inside the context of its own, passing on whatever
it waits for: so ``asyncio.current_task()``, time-outs and task groups work inside, and a coroutine
that never waits costs neither a task nor a turn of the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from wiseflow_nb.context import _current, enter_task
from wiseflow_nb.errors import UsageError
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.pool._gauge import CpuGauge
from wiseflow_nb.tasks import _cleanup
from wiseflow_nb.tasks._graph import PLAIN, swapped, swapped_value
from wiseflow_nb.tasks._job import Attempt, Job
from wiseflow_nb.tasks._kept import counts_tell, try_counts
from wiseflow_nb.tasks._machine import COMPLETED
from wiseflow_nb.tasks._options import NO_RETRY
from wiseflow_nb.tasks.task import Task

if TYPE_CHECKING:
    from wiseflow_nb.tasks._scheduler import Scheduler

#: After so long a runner lets the loop's other work have its turn, and a worker the pool's.
SLICE_SECONDS = 0.002


class Runner:
    """The edge where user code is called."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        # The loop itself holds its tasks weakly.
        self._drivers: set[asyncio.Task[None]] = set()
        #: Runners that have not had their first step.
        self._fresh: set[asyncio.Task[None]] = set()
        # A pool of ours has its own queue to serve in between; of others a call is a task.
        self._stays = isinstance(scheduler.pool, ThreadPoolManager)

    # -- plain calls -----------------------------------------------------------------------------

    def run_calls(self, attempt: Attempt | None) -> None:
        """Run a plain call on this thread, to its end, and further ones for a while."""
        scheduler = self._scheduler
        gauge = CpuGauge()
        until = gauge.wall + SLICE_SECONDS
        owed = 0
        while attempt is not None:
            ended = attempt
            job = ended.job
            variables = job.variables
            assert variables is not None
            if job.options.retry is not NO_RETRY or job.options.idempotent:
                variables = variables.copy()
            variables.run(_call, ended)
            ended.asked = ended._token is not None and ended.cancelled
            ended.cpu_seconds = gauge.step()
            ended.cpu_source = "thread_time"
            if ended.lent_seconds:
                ended.cpu_seconds = max(0.0, ended.cpu_seconds - ended.lent_seconds)
            if ended.remote is not None:
                ended.take_remote(ended.remote)
            now = gauge.wall
            attempt, unfinished = scheduler.next_call(ended, owed, now, stay=self._stays and now < until)
            owed = not unfinished
            if unfinished:
                variables.run(self._clean, ended)
        if owed:
            scheduler.settled(owed)

    def _clean(self, attempt: Attempt) -> None:
        scheduler = self._scheduler
        watch = functools.partial(scheduler.watch_cleanup, attempt)
        handlers = scheduler.cleanup_of(attempt)
        pool = scheduler.pool
        # A handler that is over its budget frees the slot, not this thread: another one stands in.
        with pool.blocked() if isinstance(pool, ThreadPoolManager) and handlers else contextlib.nullcontext():
            failures = _cleanup.run_in_thread(handlers, scheduler.loop, watch)
        scheduler.attempt_ended(attempt, [*attempt.failures, *failures])

    # -- coroutines; called on the loop ------------------------------------------------------------

    def start(self, called: list[int]) -> None:
        """Begin so many runners; the number is taken, so that a call that comes twice counts once."""
        count = called.pop() if called else 0
        loop = asyncio.get_running_loop()
        try_counts(loop)
        for _ in range(count):
            # Not the loop's own factory, which may begin it at once or make what is no such task.
            driver = asyncio.Task(self._run(), loop=loop, name="wiseflow-runner")
            self._fresh.add(driver)
            driver.add_done_callback(self._gone)
            self._keep(driver)

    def stop_coroutine(self, asked: list[Attempt]) -> None:
        """Cancel a coroutine that still runs, between its steps; it is taken, so that a call that comes twice counts once."""
        attempt = asked.pop() if asked else None
        if attempt is not None and attempt.driver is not None:
            attempt.driver.cancel()

    def _keep(self, driver: asyncio.Task[None]) -> None:
        self._drivers.add(driver)
        driver.add_done_callback(self._drivers.discard)

    def _gone(self, driver: asyncio.Task[None]) -> None:
        if driver in self._fresh:  # cancelled before it could begin, as by one who cancels all there are
            self._fresh.discard(driver)
            self._scheduler.runner_lost()

    def forget(self) -> None:
        """Let go of runners whose loop is gone."""
        for driver in self._drivers:
            driver._log_destroy_pending = False  # type: ignore[attr-defined]
        self._drivers.clear()
        self._fresh.clear()

    async def _run(self) -> None:
        me = asyncio.current_task()
        assert me is not None
        self._fresh.discard(me)
        await self._drive(me)

    @types.coroutine
    def _drive(self, me: asyncio.Task[None]) -> Generator[Any, Any, None]:
        scheduler = self._scheduler
        gauge = CpuGauge()
        until = gauge.wall + SLICE_SECONDS
        attempt = scheduler.first_coroutine()
        owed, fit = 0, True
        telling = counts_tell(asyncio.get_running_loop(), me)
        known = sys.getrefcount(me) if telling else 0
        while attempt is not None:
            ended = attempt
            job = ended.job
            variables = job.variables
            assert variables is not None
            # Each attempt begins with what there was at submit; the only one may have that itself.
            run = (variables if job.options.retry is NO_RETRY and not job.options.idempotent else variables.copy()).run
            try:
                waited = run(_open, ended)
                # From here to where it is None again a cancel goes into the user's code, never into ours.
                ended.driver = me
                while True:
                    ended.cpu_seconds += gauge.step()
                    try:
                        value = yield waited
                    except GeneratorExit:
                        # The loop is gone, and the task with it; nothing may be awaited any more.
                        ended.coroutine.close()
                        return
                    except BaseException as caught:  # noqa: BLE001  belongs to the awaited code: thrown into it
                        fit = fit and not isinstance(caught, asyncio.CancelledError)
                        until = gauge.start() + SLICE_SECONDS
                        waited = run(ended.coroutine.throw, caught)
                    else:
                        until = gauge.start() + SLICE_SECONDS
                        waited = run(ended.coroutine.send, value)
            except StopIteration as stop:
                ended.value = stop.value
            except BaseException as caught:  # noqa: BLE001  user code: recorded, and raised by the task's result
                # Without this frame, which goes on and would keep alive whatever it holds by then.
                ended.error = caught.with_traceback(caught.__traceback__ and caught.__traceback__.tb_next)
            ended.driver = None
            if ended._token is not None:
                ended.asked = ended.cancelled
            ended.cpu_seconds += gauge.step()
            ended.cpu_source = "coroutine_steps"
            now = gauge.wall
            # A runner that was ever cancelled retires, and one that somebody still refers to, who got it
            # as the current task: a late cancel would hit the next task.
            if not telling or sys.getrefcount(me) > known or me._must_cancel or me.cancelling():  # type: ignore[attr-defined]
                fit = False
            late = now > until
            attempt, unfinished = scheduler.next_coroutine(ended, owed, now, stay=fit and not late, back=fit and late)
            owed = not unfinished
            if unfinished:
                self._keep(asyncio.ensure_future(self._clean_coroutine(ended)))
            if late and fit:
                if owed:
                    scheduler.settled(owed)
                    owed = 0
                try:
                    yield None
                except asyncio.CancelledError:
                    fit = False  # the loop is being stopped
                until = gauge.start() + SLICE_SECONDS
                attempt = scheduler.first_coroutine()
        if owed:
            scheduler.settled(owed)

    async def _clean_coroutine(self, attempt: Attempt) -> None:
        scheduler = self._scheduler
        enter_task(attempt)
        handlers = scheduler.cleanup_of(attempt)
        scheduler.attempt_ended(attempt, await _cleanup.run_on_loop(handlers))


def _call(attempt: Attempt) -> None:
    _current.set(attempt)
    job = attempt.job
    try:
        call, args, kwargs = job.call
        if job.parents:
            args, kwargs = _arguments(job)
        if job.kind == "process" and job.task is not None:
            call = job.task._scheduler.processes.call(call)
        value = call(*args, **kwargs)
        del args, kwargs
        if type(value) is types.CoroutineType:
            value.close()
            raise UsageError(f"task {job.name!r} returned a coroutine; submit it with kind='async'")
        attempt.value = value
    except BaseException as caught:  # noqa: BLE001  user code: recorded, and raised by the task's result
        attempt.error = caught


def _open(attempt: Attempt) -> Any:
    # Makes the coroutine and takes its first step, inside the task's own context.
    _current.set(attempt)
    job = attempt.job
    made, args, kwargs = job.call
    if attempt._token is not None and attempt.cancelled:
        if type(made) is types.CoroutineType:
            made.close()
        raise asyncio.CancelledError(attempt.token.reason)
    if type(made) is not types.CoroutineType:
        if job.parents:
            args, kwargs = _arguments(job)
        try:
            made = made(*args, **kwargs)
        except StopIteration as error:  # else it would look like the end of a coroutine
            raise RuntimeError(f"task {job.name!r} raised StopIteration") from error
        if type(made) is not types.CoroutineType:
            if not inspect.isawaitable(made):
                raise UsageError(f"task {job.name!r} has kind='async' but returned {type(made).__name__}, no awaitable")
            made = _awaited(made)
    attempt.coroutine = made
    return made.send(None)


async def _awaited(made: Any) -> Any:
    return await made


def _arguments(job: Job) -> tuple[tuple[Any, ...], dict[str, Any]]:
    _, args, kwargs = job.call
    if kwargs:
        return swapped(args, kwargs, _result_of)
    taken = [
        # The common case without a call: it has completed, and its value is there.
        (value._result if value._job.code == COMPLETED else value)
        if type(value) is Task
        else value
        if type(value) in PLAIN
        else swapped_value(value, _result_of)
        for value in args
    ]
    return tuple(taken), kwargs


def _result_of(task: Task[Any]) -> Any:
    # With trigger="all_done" a dependency may have ended otherwise: then the task itself is handed
    # over. Not Task.result: a value is there from the transition on that made this task ready, and the
    # settling follows it.
    return task._result if task._job.code == COMPLETED else task
