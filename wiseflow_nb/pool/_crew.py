"""The worker threads of a pool: hired when there is work for them, released when they are too many.

Everything here happens behind one lock, held for a few steps at a time and never while code of the
user's runs. It is re-entrant, because the garbage collector may run a finaliser anywhere: one that
submits or cancels finds the lock its own, not a deadlock.

An idle worker sleeps on a lock of its own, its bell, and is listed last in, first out, so that the
same few stay warm. A submit rings at most one bell, and none while a worker that was called has not
looked yet; whoever takes work and leaves some calls the next. So a burst does not wake everybody,
and no work is left lying while a worker sleeps.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, RUNNING
from concurrent.futures.thread import BrokenThreadPool
from typing import Any

from wiseflow_nb.clock import Clock, SystemClock
from wiseflow_nb.context import _current
from wiseflow_nb.errors import PoolClosedError, TaskCancelledError
from wiseflow_nb.pool._ahead import Ahead, begun
from wiseflow_nb.pool._book import Book, RemoteRow, Row, ended_record, measured_there, record
from wiseflow_nb.pool._deques import DequeQueue
from wiseflow_nb.pool._exit import join_at_exit
from wiseflow_nb.pool._future import PoolFuture
from wiseflow_nb.pool._gauge import CpuGauge
from wiseflow_nb.pool._work import PoolRecord, PoolStats, logger, run_cleanups, told

#: After so many yields to the holder of the lock, queue for it: it may be off the processor.
YIELDS = 1_000


def take(lock: threading.RLock) -> None:
    """Acquire a lock that is held for a few steps at a time, without queueing for it.

    Whoever queues for a lock owns it from its release on, but cannot run before it has the
    interpreter as well; the other finds the lock taken, queues in turn, and from then on each step
    costs a change of threads. Giving the interpreter to the holder instead ends that at once.
    """
    for _ in range(YIELDS):
        time.sleep(0)
        if lock.acquire(False):
            return
    lock.acquire()


class Worker:
    """One thread of a crew, and what it is at."""

    __slots__ = (
        "ahead",
        "ahead_since",
        "bell",
        "chained",
        "dismissed",
        "fresh",
        "gauge",
        "started",
        "thread",
        "work",
    )

    def __init__(self) -> None:
        self.thread: threading.Thread
        self.work: PoolFuture[Any] | None = None
        self.started = 0.0
        #: What it has handed ahead; what of it has begun (its state tells) is what this worker runs next.
        self.ahead: list[PoolFuture[Any]] = []
        #: When the first of it began; 0 if it has not.
        self.ahead_since = 0.0
        #: Whether it has not looked for work yet.
        self.fresh = True
        #: Made by its own thread.
        self.gauge: CpuGauge | None = None
        #: Whether nothing but the pool's own steps has run since the gauge's last step.
        self.chained = False
        #: Whether it is to end as soon as nothing is left to do.
        self.dismissed = False
        self.bell = threading.Lock()
        self.bell.acquire()


class Crew:
    """The threads, their queue and their book."""

    def __init__(
        self,
        low: int,
        high: int,
        clock: Clock,
        prefix: str,
        initializer: Callable[..., object] | None,
        initargs: tuple[Any, ...],
    ) -> None:
        # A call saved on each of three readings a task.
        self._machine_time = system = type(clock) is SystemClock
        self.monotonic = time.monotonic if system else clock.monotonic
        self._epoch = time.time if system else clock.time
        self._prefix = prefix
        self._initializer, self._initargs = initializer, initargs
        self.lock = threading.RLock()
        self.queue: DequeQueue[PoolFuture[Any]] = DequeQueue()
        self._ahead = Ahead(self.queue)
        self.min_workers = low
        self.max_workers = high
        self.target = high
        self.reason = "as many as the bounds allow"
        self._limit = high
        self._blocked: dict[threading.Thread, int] = {}
        self._workers: dict[threading.Thread, Worker] = {}
        self._leaving: list[threading.Thread] = []
        self._idle: list[Worker] = []
        #: The worker whose bell was rung last, until it has looked.
        self._called: Worker | None = None
        self._starting = 0
        self._hired = 0
        self._closed = False
        self._broken = ""
        self._owner: weakref.ref[Any] | None = None
        self._numbers = 0
        self._book = Book()

    def owned_by(self, pool: Any) -> None:
        """Close when ``pool`` is collected."""
        self._owner = weakref.ref(pool, self._abandon)

    # -- queueing -----------------------------------------------------------------------------

    def put(self, work: PoolFuture[Any]) -> None:
        """Queue work, and see to it that a worker takes it."""
        lock = self.lock
        try:
            if not lock.acquire(False):
                take(lock)
        except BaseException:  # an interrupt, which may come when the lock is ours already
            if lock._is_owned():  # type: ignore[attr-defined]
                lock.release()
            raise
        try:
            if self._broken:
                raise BrokenThreadPool(self._broken)
            if self._closed:
                raise PoolClosedError("the pool has been shut down; make a new ThreadPoolManager")
            self._numbers = work._number = self._numbers + 1
            work._submitted_seconds = self._epoch()
            work._queued_at = self.monotonic()
            self._book.submitted += 1
            try:
                self.queue.push(work)
                if self._ahead.held:
                    self._ahead.take_back_all(below=work._priority)
                if self._idle or len(self._workers) < self._limit:
                    self._summon()
            except BaseException:  # not one thread is to be had, or an interrupt: nobody gets the future
                if hasattr(work, "_stamp"):
                    self.queue.discard(work)
                self._book.submitted -= 1
                raise
        finally:
            lock.release()

    def drop_queued(self, work: PoolFuture[Any]) -> bool:
        """Mark queued work cancelled, the lock being held; return whether it was queued."""
        if (self._ahead.held and not self._ahead.take_back(work)) or not self.queue.discard(work):
            return False
        work._state = CANCELLED_AND_NOTIFIED
        self._book.never_ran(work)
        return True

    def _summon(self) -> None:
        # The lock is held. Work that a called or starting worker will take needs no other.
        if self._idle:
            if self._called is None:
                with contextlib.suppress(IndexError):  # an abandoned pool takes from the list unlocked
                    # No call in between, after which an interrupt could come: nobody would ring this one again.
                    self._called = worker = self._idle[-1]
                    del self._idle[-1]
                    worker.bell.release()
        elif len(self._workers) < self._limit:
            expected = self._starting + (self._called is not None)
            if self.queue.size > expected:
                self._hire()

    def _hire(self) -> None:
        self._leaving = [thread for thread in self._leaving if thread.is_alive()]
        worker = Worker()
        name = f"{self._prefix}-{self._hired}"
        worker.thread = threading.Thread(target=self._work_loop, args=(worker,), name=name, daemon=True)
        self._workers[worker.thread] = worker
        self._starting += 1
        self._hired += 1
        try:
            join_at_exit(self)
            worker.thread.start()
        except RuntimeError:
            self._starting -= 1
            del self._workers[worker.thread]
            if not self._workers:
                raise
            logger.warning("no further thread could be started; the pool goes on with %d", len(self._workers))
        except BaseException:  # an interrupt: it may come all the same, and is to end then
            self._starting -= 1
            del self._workers[worker.thread]
            self._leaving.append(worker.thread)
            raise

    # -- working ------------------------------------------------------------------------------

    def _work_loop(self, me: Worker) -> None:
        if self._initializer is not None and not self._initialise():
            return
        work: PoolFuture[Any] | None = None
        while True:
            # While it waits for the next, nothing here holds the last.
            if work is None:
                work = self._next(me)
                if work is None:
                    return
            work = self._run(me, work)

    def _next(self, me: Worker) -> PoolFuture[Any] | None:
        """Return what is to run next, or None when this worker is to end."""
        lock = self.lock
        if not lock.acquire(False):
            take(lock)
        try:
            if me.fresh:
                me.fresh = False
                if me.thread not in self._workers:
                    return None  # an interrupt came while it was started: nobody counts on it
                self._starting -= 1
            me.chained = False
            while (work := self._claim(me)) is None:
                surplus = me.dismissed or len(self._workers) > self._limit
                if surplus or self._closed or self._broken or not self._wait(me):
                    self._leave()
                    break
            return work
        finally:
            lock.release()

    def _claim(self, me: Worker) -> PoolFuture[Any] | None:
        # The lock is held.
        if me.ahead:  # the first has begun, or was promised to
            me.work = me.ahead.pop(0)
            me.started, me.ahead_since = me.ahead_since or self.monotonic(), 0.0
            return me.work
        if len(self._workers) > self._limit:
            return None
        now = self.monotonic()
        work = self.queue.pop(now)
        while work is not None and self._ahead.held and not self._ahead.take_back(work):
            work = self.queue.pop(now)
        if work is not None:
            work._state = RUNNING
            me.work, me.started = work, now
            if self.queue.size and (self._idle or len(self._workers) < self._limit):
                self._summon_more()
        return work

    def _wait(self, me: Worker) -> bool:
        # The lock is held, and given up while asleep. False if there is nothing to wait for.
        self._idle.append(me)
        # Listed, then a second look: an abandoned pool closes and rings without the lock.
        if self._closed:
            try:
                self._idle.remove(me)
            except ValueError:
                pass  # the bell rings
            else:
                return False
        self.lock.release()
        try:
            me.bell.acquire()
        finally:
            self.lock.acquire()
        if self._called is me:
            self._called = None
        return True

    def _summon_more(self) -> None:
        # For a worker, which goes on with its own work if there is no thread to be had.
        with contextlib.suppress(RuntimeError):
            self._summon()

    def _leave(self) -> None:
        thread = threading.current_thread()
        del self._workers[thread]
        self._leaving.append(thread)
        if self.queue.size:
            self._summon_more()

    def _initialise(self) -> bool:
        assert self._initializer is not None
        try:
            self._initializer(*self._initargs)
        except BaseException:  # noqa: BLE001  user code: logged here, and every future says so
            logger.exception("the initializer of a worker failed; the pool is broken")
        else:
            return True
        with self.lock:
            if threading.current_thread() not in self._workers:
                return False  # an interrupt came while it was started
            self._starting -= 1
            self._broken = "the initializer of a worker raised an exception; mend it and make a new pool"
            self._ahead.take_back_all()
            failed = self.queue.items()
            for work in failed:
                self.queue.discard(work)
                work._state = RUNNING
                self._book.never_ran(work, f"BrokenThreadPool: {self._broken}")
            self._leave()
            self._ring_all()
        for work in failed:
            work._release()
            work._finish(None, BrokenThreadPool(self._broken))
        return False

    def _run(self, me: Worker, work: PoolFuture[Any]) -> PoolFuture[Any] | None:
        """Run claimed work; return the next, already claimed, if nothing has to be done in between."""
        fn, args, kwargs = work._fn, work._args, work._kwargs
        assert fn is not None
        value: Any = None
        error: BaseException | None = None
        gauge = me.gauge
        if gauge is None:
            gauge = me.gauge = CpuGauge()
        elif not me.chained:
            gauge.start()
        _current.set(work)
        try:
            value = fn(*args) if kwargs is None else fn(*args, **kwargs)
        except BaseException as caught:  # noqa: BLE001  user code: handed to the future and counted
            # Without the entry of this frame, through which the error would hold the pool's workings.
            error = caught
            if error.__traceback__ is not None:
                error.__traceback__ = error.__traceback__.tb_next
        # Freeing its own arguments is the task's own cost.
        del fn, args, kwargs
        work._fn, work._args, work._kwargs = None, (), None
        cpu = gauge.step()
        queued = me.started - work._queued_at
        if self._machine_time:
            wall = gauge.wall - me.started
            if cpu > wall:
                cpu = wall  # without what the pool did in between
        else:
            wall = self.monotonic() - me.started
        figures = (work._number, work._name, work._priority, work._submitted_seconds, queued, wall, cpu)
        row: Row | PoolRecord = figures
        entry: Row | RemoteRow | PoolRecord
        if error is not None:
            failures = run_cleanups(work.task_context(), work._cleanup, work._name)
            state = "cancelled" if isinstance(error, TaskCancelledError) else "failed"
            row = ended_record(figures, state, told(error), failures)
        work._cleanup = None
        context = work._context
        if context is not None and (remote := context.remote) is not None:
            entry = measured_there(row, remote)
            cpu = remote.cpu_seconds if remote.cpu_seconds == remote.cpu_seconds else 0.0
        else:
            entry = row
        following = None
        lock = self.lock
        if not lock.acquire(False):
            take(lock)
        try:
            # First the figures, then the result: who has the result finds the figures.
            me.work = None
            self._book.ended(entry, queued, wall, cpu)
            quiet = work._condition_made is None and not work._done_callbacks
            if quiet:
                work._result, work._exception = value, error
                work._state = FINISHED
                if value is None and error is None:
                    # Nothing of the user's runs in between, not even the end of a dropped result.
                    me.chained = True
                    following = self._claim(me)
        finally:
            lock.release()
        if following is not None:
            return following
        _current.set(None)
        if not quiet:
            try:
                work._finish(value, error)
            except BaseException:  # noqa: BLE001  user code: a callback must not take the worker along
                logger.exception("a callback of %r failed", work)
        # An error's traceback leads to the caller's frame, which is this one.
        del work, value, error
        return None

    # -- handing ahead ------------------------------------------------------------------------

    def driver(self, work: PoolFuture[Any]) -> Worker | None:
        """The worker that runs this work and is the caller's own."""
        me = self._workers.get(threading.current_thread())
        return me if me is not None and me.work is work else None

    def reserve_ahead(self, me: Worker, most: int, fits: Callable[[PoolFuture[Any]], bool]) -> list[PoolFuture[Any]]:
        """The work to hand ahead now, noted as handed; nothing if none fits, or others are free for it."""
        lock = self.lock
        if not lock.acquire(False):
            take(lock)
        try:
            count = len(self._workers)
            if self._idle or self._called is not None or self._starting or count > self._limit:
                return []
            # Each takes its share, or the last calls of many would be taken to and fro.
            most = min(most, self._ahead.unheld // count)
            return self._ahead.reserve(me, most, fits) if most else []
        finally:
            lock.release()

    def give_up(self, me: Worker, works: list[PoolFuture[Any]]) -> None:
        """Let go of work that was reserved and not handed ahead after all."""
        with self.lock:
            self._ahead.give_up(me, works)

    def take_back(self, me: Worker) -> bool:
        """Take back what ``me`` has handed ahead; return whether that has not begun."""
        with self.lock:
            return self._ahead.take_back_from(me)

    def go_on(self, me: Worker, *, well: bool) -> bool:
        """Tell what ``me`` has handed ahead that the work before has ended; return whether it has begun."""
        with self.lock:
            return bool(me.ahead) and self._ahead.go_on(me, self.monotonic(), well=well)

    # -- size ---------------------------------------------------------------------------------

    def set_size(self, low: int, high: int, target: int, reason: str) -> None:
        """Set bounds and target, the lock being held."""
        self.min_workers, self.max_workers, self.target, self.reason = low, high, target, reason
        self._apply_limit()

    def _apply_limit(self) -> None:
        before, self._limit = self._limit, self.target + len(self._blocked)
        if self._limit < before:
            # Those who are too many and idle are to see it.
            for _ in range(len(self._workers) - self._limit):
                self._ring_one()
            self._ahead.take_back_all()
        for _ in range(min(self.queue.size, self._limit - before)):
            self._summon_more()

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        """Let one more worker run while this one waits; on any other thread, do nothing."""
        me = threading.current_thread()
        with self.lock:
            mine = me in self._workers
            if mine:
                self._blocked[me] = self._blocked.get(me, 0) + 1
                self._apply_limit()
        try:
            yield
        finally:
            if mine:
                with self.lock:
                    self._blocked[me] -= 1
                    if not self._blocked[me]:
                        del self._blocked[me]
                    self._apply_limit()

    def dismiss_idle(self) -> None:
        """End the workers that have nothing to do; others are hired when there is work."""
        with self.lock:
            while self._ring_one(dismiss=True):
                pass

    def _ring_one(self, *, dismiss: bool = False) -> bool:
        try:
            worker = self._idle.pop()
        except IndexError:
            return False
        worker.dismissed = worker.dismissed or dismiss
        worker.bell.release()
        return True

    def _ring_all(self) -> None:
        while self._ring_one():
            pass

    # -- looking ------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """How many threads there are."""
        return len(self._workers)

    @property
    def room(self) -> int:
        """How many further threads may run work now."""
        return max(0, self._limit - self.busy)

    @property
    def busy(self) -> int:
        """How much work runs."""
        running = sum(worker.work is not None for worker in self._workers.values())
        return running + begun(self._workers.values())

    def stop_running(self, work: PoolFuture[Any], reason: str) -> bool:
        """Ask running work to stop; return whether it was running."""
        with self.lock:
            if all(work is not worker.work and work not in worker.ahead for worker in self._workers.values()):
                return False
            if work._state != RUNNING and self._ahead.take_back(work):
                return False
            return work.task_context().token.cancel(reason) or True

    def stats(self) -> PoolStats:
        """The totals at this moment."""
        with self.lock:
            contexts = [worker.work._context for worker in self._workers.values() if worker.work is not None]
            return self._book.stats(
                cancelling=sum(context is not None and context.cancelled for context in contexts),
                # One that has begun while the answer to the one before is under way waits for its worker.
                queued=self.queue.size + begun(self._workers.values()),
                running=len(contexts),
            )

    def records(self) -> list[PoolRecord]:
        """The newest records, oldest first."""
        with self.lock:
            rows = self._book.rows()
        return [record(row) for row in rows]

    # -- ending -------------------------------------------------------------------------------

    def close(self, *, cancel_queued: bool) -> None:
        """Take no more work; let what is queued run, or cancel it."""
        with self.lock:
            self._closed = True
            queued = self.queue.items() if cancel_queued else []
            self._ring_all()
        for work in queued:
            work.cancel()

    def join(self, deadline: float | None) -> bool:
        """Wait for the workers, until ``deadline`` (``time.monotonic()`` seconds) if any; return whether they ended."""
        me = threading.current_thread()
        while True:
            with self.lock:
                threads = [thread for thread in (*self._workers, *self._leaving) if thread is not me]
                self._leaving = [thread for thread in self._leaving if thread.is_alive()]
            if not any(thread.is_alive() for thread in threads):
                return True
            for thread in filter(threading.Thread.is_alive, threads):  # or an interrupt came before it began
                thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if deadline is not None and time.monotonic() >= deadline:
                return not any(thread.is_alive() for thread in threads)

    def _abandon(self, _: object) -> None:
        # The collector calls this, in any thread and at any step: so without the lock.
        self._closed = True
        self._ring_all()

    def forget_threads(self) -> None:
        """In a forked child: the threads stayed with the parent, and so did the work."""
        self.lock = threading.RLock()
        self.queue = DequeQueue()
        self._ahead = Ahead(self.queue)
        self._workers, self._leaving, self._idle, self._blocked = {}, [], [], {}
        self._called, self._starting = None, 0
        self._limit = self.target
