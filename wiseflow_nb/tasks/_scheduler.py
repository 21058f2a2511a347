"""The shell around the machine: what comes from outside, one function per happening.

Functions whose name begins with an underscore expect the lock to be held, and append to ``effects``
what must happen after it is released: settling futures (their callbacks are user code), starting
code, handing work to the pool.
"""

from __future__ import annotations

import contextvars
import functools
import threading
import types
from collections.abc import Coroutine
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from inspect import CO_COROUTINE
from typing import Any

from wiseflow_nb.clock import Clock
from wiseflow_nb.errors import (
    PoolClosedError,
)
from wiseflow_nb.futures import settle
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.pool._process import ProcessWorkers
from wiseflow_nb.records import NAN, Priority, TaskState
from wiseflow_nb.tasks import _lost, _output, _waiting
from wiseflow_nb.tasks._admission import RECHECK_SECONDS, Admission
from wiseflow_nb.tasks._entering import Entering
from wiseflow_nb.tasks._graph import referenced
from wiseflow_nb.tasks._job import Attempt, Effects, Job
from wiseflow_nb.tasks._kept import try_ahead
from wiseflow_nb.tasks._ledger import OnMove
from wiseflow_nb.tasks._lives import Calling, give_way, perform
from wiseflow_nb.tasks._loop import TaskLoop
from wiseflow_nb.tasks._machine import FIRST_TERMINAL, RUNNING
from wiseflow_nb.tasks._options import TaskOptions, kind_of
from wiseflow_nb.tasks._runner import Runner
from wiseflow_nb.tasks._slots import Ticket
from wiseflow_nb.tasks._texts import text_of_error
from wiseflow_nb.tasks._timer import TimerHandle
from wiseflow_nb.tasks.task import Task

#: One for all calls without.
NOTHING: list[Task[Any]] = []
NO_KWARGS: dict[str, Any] = {}
#: A pool of unknown size is taken to be as large as asked for.
UNBOUNDED = 1 << 30


class Scheduler(Entering):
    """Everything a manager does, without its public face."""

    def __init__(
        self,
        pool: Executor,
        *,
        clock: Clock,
        loop: TaskLoop,
        limit: int,
        admission: Admission,
        on_move: OnMove | None,
        id_prefix: str,
    ) -> None:
        super().__init__(
            clock=clock,
            limit=limit,
            room=_room(pool),
            admission=admission,
            on_move=on_move,
            id_prefix=id_prefix,
        )
        self.pool = pool
        self.processes = pool.processes if isinstance(pool, ThreadPoolManager) else ProcessWorkers()
        self.loop = loop
        self._recheck: TimerHandle | None = None
        self.runner = Runner(self)
        try_ahead(loop)
        self._unlisten = pool._add_listener(self._pool_changed) if isinstance(pool, ThreadPoolManager) else None

    # -- submit ------------------------------------------------------------------------------

    def submit(
        self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: TaskOptions, retry_of: str = ""
    ) -> Task[Any]:
        """Enter a call as a task; see ``TaskManager.submit``."""
        if type(fn) is types.FunctionType and options.kind == "auto":
            kind = "async" if fn.__code__.co_flags & CO_COROUTINE else "thread"
            name = options.name or fn.__qualname__
        else:
            kind = kind_of(fn, args, kwargs, options)
            name = options.name or getattr(fn, "__qualname__", None) or type(fn).__name__
        needed = referenced(args, kwargs) if args or kwargs else NOTHING
        if not kwargs:
            kwargs = NO_KWARGS
        task: Task[Any] = Task(self)
        variables = contextvars.copy_context()
        effects: Effects = []
        if self.inside():
            return self._put_off(task, (fn, args, kwargs), kind, name, options, needed, variables, retry_of)
        if self.busy:
            give_way(self)
        job: Job | None = None
        try:
            with self.lock:
                self.busy = True
                if self.closed:
                    raise PoolClosedError(self.refusal)
                parents = None
                if needed or options.dependencies:
                    parents = self._parents(f"{self._prefix}{self._numbers + 1}", needed, options.dependencies)
                self._numbers = number = self._numbers + 1
                task_id = f"{self._prefix}{number}"
                now = self._time()
                task._job = job = Job(number, task_id, name, kind, options, (fn, args, kwargs), task, variables, now)
                if retry_of:
                    job.retry_of = retry_of
                self._unsettled += 1
                if self._unsettled == 1:
                    self.quiet.clear()
                    _output.begin_routing(self)
                slots = self.slots
                if parents is None or not self._enter_behind(job, parents, effects):
                    job.ready_at = self._monotonic()
                    job.ready_seconds = now
                    self.ledger.born(job)
                    slots.push(job)
                    # As ``workers_wanted`` and ``runners_wanted`` would find: enough have been called for.
                    if slots.held + (slots.coming if kind == "async" else slots.tickets) < slots.limit or (
                        kind != "async" and job.level > slots.lowest_ticket
                    ):
                        self._dispatch(effects)
                elif job.level is not Priority.NORMAL or slots.lowest_ticket < Priority.NORMAL:
                    self._dispatch(effects)  # it may have lent its class to one that is held back
                if options.deadline is not None and job.code < FIRST_TERMINAL:
                    due = self._monotonic() + options.deadline
                    job.deadline = self.timers.at(due, functools.partial(self.deadline_due, job))
                self.busy = False
            if effects:
                perform(effects)
        except BaseException:
            if job is not None:
                self._take_back(job, effects)
            raise
        return task

    def stop_listening(self) -> None:
        """Let the pool forget this scheduler; calling again does no harm."""
        unlisten, self._unlisten = self._unlisten, None
        if unlisten is not None:
            unlisten()

    # -- starting ----------------------------------------------------------------------------

    def wake(self) -> None:
        """Start what can be started now."""
        self.soon(_nothing)

    def _pool_changed(self) -> None:
        def resized(_: Effects) -> None:
            self.slots.room = _room(self.pool)

        self.soon(resized)

    def _dispatch(self, effects: Effects) -> None:
        slots = self.slots
        for bell in slots.bells:
            bell.event.set()
        if slots.returning:
            while (job := slots.next_grant()) is not None:
                if job.grant is not None:
                    effect = functools.partial(settle, job.grant)
                    job.grant = None
                    effects.append(effect)
        slots.hold_reason = ""
        if slots.held >= slots.limit or not slots.ready_count:
            return
        now = self._monotonic()
        for _ in range(slots.workers_wanted(now)):
            effects.append(functools.partial(self._send_ticket, slots.new_ticket(), effects))
        if slots.lowest_ticket < Priority.CRITICAL:
            for ticket in slots.raise_tickets():
                effects.append(functools.partial(self._raise_ticket, ticket))
        wanted = slots.runners_wanted(now)
        if wanted:
            start = functools.partial(_lost.call_runners, self, [wanted])
            slots.coming += wanted
            effects.append(start)
        if slots.hold_reason and self._recheck is None:
            again = functools.partial(self._look_again, slots.taken_up)
            self._recheck = self.timers.at(now + RECHECK_SECONDS, again)

    def _look_again(self, taken_up: int) -> None:
        with self.lock:
            self._recheck = None
            slots = self.slots
            slots.overdue = slots.overdue or (slots.tickets > 0 and slots.taken_up == taken_up)
        self.wake()

    def _begin(self, job: Job, now: float, wall: float) -> Attempt:
        # The one place where an attempt comes to be. ``now`` is monotonic, ``wall`` since the epoch.
        number = job.attempts + 1
        job.attempt = attempt = Attempt(job, number, now)
        job.attempts = number
        job.started_seconds = wall
        job.queue_seconds = now - job.ready_at
        if number > 1:
            job.finished_seconds = job.progress = NAN
            job.progress_text = ""
        self.ledger.move(job, RUNNING)
        if job.options.timeout is not None:
            due = now + job.options.timeout
            attempt.timer = self.timers.at(due, functools.partial(self.timeout_due, attempt))
        return attempt

    # -- coroutines: called by a runner, on the loop -------------------------------------------

    def first_coroutine(self) -> Attempt | None:
        """A runner that was called for has come: return what it is to run."""
        effects: Effects = []
        if self.busy:
            give_way(self)
        with self.lock:
            self.slots.coming -= 1
            attempt = self._next_coroutine(self._monotonic(), self._time(), effects)
        perform(effects, raises=False)
        return attempt

    def runner_lost(self) -> None:
        """A runner that was called for will not come."""
        with self.lock:
            self.slots.coming -= 1
        self.wake()

    def next_coroutine(
        self, ended: Attempt, owed: int, now: float, *, stay: bool, back: bool
    ) -> tuple[Attempt | None, bool]:
        """The code of a runner's attempt has ended.

        Parameters
        ----------
        now
            The machine's monotonic time.
        owed
            How many tasks this runner has settled whose end is not counted yet.
        stay
            Whether the runner takes another task at once.
        back
            Whether it will come back for one (``first_coroutine``) after others had their turn.

        Returns
        -------
        tuple
            What it is to run next, and whether ``ended`` still has to be cleaned up and concluded.
        """
        effects: Effects = []
        attempt = None
        if self.busy:
            give_way(self)
        with self.lock:
            self.busy = True
            if not self.machine_time:
                now = self._monotonic()
            wall = self._time()
            task = self._code_ended(ended, now, wall, effects)
            if owed:
                if self._unsettled > owed:
                    self._unsettled -= owed
                else:
                    self._settled(owed)
            slots = self.slots
            # Callbacks come first: they may wait for the next task, and their time is not that task's.
            later = task is not None and not task._end and not task._closing
            if stay and not later and not slots.returning:
                job = slots.take_coroutine(now)
                if job is not None:
                    attempt = self._begin(job, now, wall)
                # An end can make several ready at once: those that this runner does not take need others.
                if (
                    job is None
                    or slots.held + slots.coming < slots.limit
                    or slots.threads.count
                    or slots.big_threads.count
                ):
                    self._dispatch(effects)
            elif stay and not later:
                attempt = self._next_coroutine(now, wall, effects)
            else:
                if back or stay:
                    slots.coming += 1
                self._dispatch(effects)
            self.busy = False
        if task is not None and not later and (not task._end or not ended.job.options.keep_result):
            self._announce(ended, task)
        if effects:
            perform(effects, raises=False)
        if later and task is not None:
            self._announce(ended, task)
            if stay:
                attempt = self.first_coroutine()
        return attempt, task is None

    def _announce(self, ended: Attempt, task: Task[Any]) -> None:
        # Without the lock: done-callbacks are user code.
        callbacks = None if task._end else task._finish(ended.value, None)
        if callbacks:
            perform([Calling(task._call_back, callbacks)], raises=False)
        if not ended.job.options.keep_result:
            if self.busy:
                give_way(self)
            with self.lock:
                self._after_settling(ended.job, task)

    def _next_coroutine(self, now: float, wall: float, effects: Effects) -> Attempt | None:
        slots = self.slots
        if slots.returning:
            self._dispatch(effects)
        job = slots.take_coroutine(now)
        # An end can make several ready at once: those that this runner does not take need others.
        if job is None or slots.held + slots.coming < slots.limit or slots.threads.count or slots.big_threads.count:
            self._dispatch(effects)
        return None if job is None else self._begin(job, now, wall)

    # -- plain calls: a ticket, taken up on a worker of the pool ---------------------------------

    def _send_ticket(self, ticket: Ticket, effects: Effects) -> None:
        # Called without the lock.
        take, level = functools.partial(self._take_ticket, ticket), ticket.level
        try:
            if isinstance(self.pool, ThreadPoolManager):
                future = self.pool.options(priority=level, name="task").submit(take)
            else:
                self.timers.step_aside()  # it may have to wait before it takes a call
                future = self.pool.submit(take)
        except Exception as error:  # noqa: BLE001  any pool's: closed, broken, or no further thread to be had
            self._ticket_lost(ticket, error, effects)
        else:
            ticket.future = future
            if ticket.level is not level:  # raised while it was on the way
                self._raise_ticket(ticket)
            future.add_done_callback(functools.partial(self._ticket_done, ticket))

    def _raise_ticket(self, ticket: Ticket) -> None:
        # Called without the lock. Another executor takes up its calls in its own order, whatever they are for.
        if ticket.future is not None and isinstance(self.pool, ThreadPoolManager):
            self.pool.reprioritise(ticket.future, ticket.level)

    def _ticket_done(self, ticket: Ticket, future: Future[None]) -> None:
        if not ticket.open:
            return
        error: BaseException = PoolClosedError("the pool was shut down before the task began")
        if not future.cancelled() and (failed := future.exception()) is not None:
            # Broken, as by an initializer that fails, or not able to make the call at all.
            error = failed
        if isinstance(self.pool, ThreadPoolManager):
            self._give_up(ticket, error)
        else:
            # The standard library's pools tell of it with their lock held, which a submit would wait for.
            threading.Thread(target=self._give_up, args=(ticket, error), name="wiseflow-lost", daemon=True).start()

    def _give_up(self, ticket: Ticket, error: BaseException) -> None:
        if self.inside():  # a pool's finaliser
            self.later.add(functools.partial(self._give_up, ticket, error))
            return
        effects: Effects = []
        self._ticket_lost(ticket, error, effects)
        perform(effects)

    def _ticket_lost(self, ticket: Ticket, error: BaseException, effects: Effects) -> None:
        told = text_of_error(error)
        with self.lock:
            if not ticket.open:
                return
            now = self._monotonic()
            self.slots.ticket_taken(ticket)
            job = self.slots.take_call(now, called=True)
            if job is not None:
                attempt = self._begin(job, now, self._time())
                attempt.error, attempt.told, attempt.ended = error, told, True
                self._conclude(attempt, TaskState.FAILED, [], effects)
            self._dispatch(effects)

    def _take_ticket(self, ticket: Ticket) -> None:
        # Called without the lock, on a worker of the pool.
        effects: Effects = []
        if self.busy:
            give_way(self)
        with self.lock:
            if ticket.open:
                self.slots.ticket_taken(ticket)
            attempt = self._next_call(self._monotonic(), self._time(), effects, called=True)
        perform(effects)
        if attempt is not None:
            self.runner.run_calls(attempt)

    def next_call(self, ended: Attempt, owed: int, now: float, *, stay: bool) -> tuple[Attempt | None, bool]:
        """The code of a worker's attempt has ended; as ``next_coroutine``, for plain calls."""
        effects: Effects = []
        attempt = None
        if self.busy:
            give_way(self)
        with self.lock:
            self.busy = True
            if not self.machine_time:
                now = self._monotonic()
            wall = self._time()
            task = self._code_ended(ended, now, wall, effects)
            if owed:
                if self._unsettled > owed:
                    self._unsettled -= owed
                else:
                    self._settled(owed)
            later = task is not None and not task._end and not task._closing
            if stay and task is not None and not later:
                attempt = self._next_call(now, wall, effects, called=False)
            else:
                self._dispatch(effects)
            self.busy = False
        if task is not None and not later and (not task._end or not ended.job.options.keep_result):
            self._announce(ended, task)
        if effects:
            perform(effects)
        if later and task is not None:
            self._announce(ended, task)
            if stay:
                attempt = self._late_call()
        return attempt, task is None

    def _late_call(self) -> Attempt | None:
        # For a worker whose task has ended for everybody.
        effects: Effects = []
        if self.busy:
            give_way(self)
        with self.lock:
            attempt = self._next_call(self._monotonic(), self._time(), effects, called=False)
        if effects:
            perform(effects)
        return attempt

    def _next_call(self, now: float, wall: float, effects: Effects, *, called: bool) -> Attempt | None:
        slots = self.slots
        if slots.returning:
            self._dispatch(effects)
        job = slots.take_call(now, called=called)
        attempt = None if job is None else self._begin(job, now, wall)
        if (
            job is None
            or slots.held + slots.tickets < slots.limit
            or slots.coroutines.count
            or slots.big_coroutines.count
        ):
            self._dispatch(effects)
        return attempt

    # -- waiting (see _waiting) --------------------------------------------------------------

    def waiting(self, task: Task[Any], timeout: float | None) -> AbstractContextManager[None]:
        """What a blocking wait for ``task`` has to be wrapped in."""
        return _waiting.blocking(self, task, timeout)

    def awaited(self, task: Task[Any]) -> Coroutine[Any, Any, Any]:
        """The coroutine behind ``await task``."""
        return _waiting.awaiting(self, task)


def _nothing(_: Effects) -> None:
    pass


def _room(pool: Executor) -> int:
    return pool.target if isinstance(pool, ThreadPoolManager) else UNBOUNDED
