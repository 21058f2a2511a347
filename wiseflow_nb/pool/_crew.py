"""The worker threads of a pool: hired when there is work for them, released when they are too many."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures.thread import BrokenThreadPool
from dataclasses import replace
from typing import Any

from wiseflow_nb.clock import Clock
from wiseflow_nb.futures import settle
from wiseflow_nb.pool._exit import join_at_exit
from wiseflow_nb.pool._queue import ClassQueue
from wiseflow_nb.pool._work import PoolFuture, PoolRecord, PoolStats, Work, logger, run_work

#: Records of finished work that are kept; the oldest are dropped.
RECORDS_KEPT = 10_000


class Crew:
    """The threads, their queue and the book of what they did, all behind one lock."""

    def __init__(
        self,
        low: int,
        high: int,
        clock: Clock,
        prefix: str,
        initializer: Callable[..., object] | None,
        initargs: tuple[Any, ...],
    ) -> None:
        self._clock = clock
        self._prefix = prefix
        self._initializer, self._initargs = initializer, initargs
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._queue: ClassQueue[Work] = ClassQueue()
        self._workers: set[threading.Thread] = set()
        self._running: dict[int, Work] = {}
        self._blocked: dict[int, int] = {}
        self._idle = 0
        self._numbers = 0
        self._spawned = 0
        self._min_workers = low
        # The name that dask looks for when it is handed an executor.
        self._max_workers = high
        self._target = high
        self._reason = "as many as the bounds allow"
        self._closed = False
        self._releases = 0
        self._broken = ""
        self._stats = PoolStats()
        self._records: deque[PoolRecord] = deque(maxlen=RECORDS_KEPT)

    def _close(self, *, cancel_queued: bool) -> None:
        with self._lock:
            self._closed = True
            queued = self._queue.items() if cancel_queued else []
            self._wake.notify_all()
        for work in queued:
            future = work.future
            if future is not None:
                future.cancel()

    def _join(self, deadline: float | None) -> None:
        with self._lock:
            workers = [item for item in self._workers if item is not threading.current_thread()]
        for worker in workers:
            worker.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    # -- workers (the lock is held where a name says so by its caller) -----------------------

    def _limit(self) -> int:
        return self._target + len(self._blocked)

    def _apply_size(self) -> None:
        # A refusal to start a thread must not undo the change of size: the next submit tries again.
        with contextlib.suppress(RuntimeError):
            self._staff()
        self._wake.notify_all()

    def _staff(self) -> None:
        # Idle workers that were woken and have not yet looked still count as idle, and each will
        # take one item: so compare with the whole queue, not with the item just pushed.
        self._wake.notify()
        while len(self._queue) > self._idle and len(self._workers) < self._limit():
            worker = threading.Thread(target=self._work_loop, name=f"{self._prefix}-{self._spawned}", daemon=True)
            self._spawned += 1
            self._idle += 1
            self._workers.add(worker)
            try:
                worker.start()
            except RuntimeError:
                self._idle -= 1
                self._workers.discard(worker)
                if not self._workers:
                    raise
                logger.warning("no further thread could be started; the pool goes on with %d", len(self._workers))
                return
            join_at_exit(self)

    def _work_loop(self) -> None:
        # Counted as idle by whoever started this thread, until it has looked at the queue.
        if self._initializer is not None and not self._initialise():
            return
        with self._lock:
            self._idle -= 1
        while (work := self._next()) is not None:
            self._execute(work)
            del work

    def _initialise(self) -> bool:
        assert self._initializer is not None
        try:
            self._initializer(*self._initargs)
        except BaseException:  # noqa: BLE001  user code: logged here, and every future says so
            logger.exception("the initializer of a worker failed; the pool is broken")
            with self._lock:
                self._idle -= 1
                self._workers.discard(threading.current_thread())
                self._broken = "the initializer of a worker raised an exception; mend it and make a new pool"
                failed = self._queue.items()
                for work in failed:
                    self._queue.discard(work.key)
                self._stats = replace(self._stats, failed=self._stats.failed + len(failed))
                self._wake.notify_all()
            for work in failed:
                future = work.future
                work.release()
                if future is not None and future.set_running_or_notify_cancel():
                    settle(future, error=BrokenThreadPool(self._broken))
            return False
        return True

    def _next(self) -> Work | None:
        with self._lock:
            while True:
                if len(self._workers) > self._limit():
                    break
                work = self._queue.pop(self._clock.monotonic())
                if work is not None:
                    self._running[work.key] = work
                    return work
                if self._closed or self._broken:
                    break
                self._idle += 1
                seen = self._releases
                self._wake.wait()
                self._idle -= 1
                if seen != self._releases and not len(self._queue):
                    break
            self._workers.discard(threading.current_thread())
            # Whoever waits may have to see that one worker fewer is there.
            self._wake.notify_all()
            return None

    def _execute(self, work: Work) -> None:
        future = work.future
        assert future is not None
        if not future.set_running_or_notify_cancel():
            # Cancelled after it left the queue: it never ran.
            self._account(work, work.cancelled_record())
            return
        value, error, record = run_work(work, self._clock.monotonic, self._clock.time())
        # First the figures, then the result: who has the result finds the figures.
        self._account(work, record)
        settle(future, value, error)

    def _account(self, work: Work, record: PoolRecord) -> None:
        with self._lock:
            self._running.pop(work.key, None)
            self._count(record)
        work.release()

    def _count(self, record: PoolRecord) -> None:
        self._records.append(record)
        total = self._stats
        ran = record.cpu_source != "unknown"
        self._stats = replace(
            total,
            completed=total.completed + (record.state == "completed"),
            failed=total.failed + (record.state == "failed"),
            cancelled=total.cancelled + (record.state == "cancelled"),
            queue_seconds=total.queue_seconds + (record.queue_seconds if ran else 0.0),
            wall_seconds=total.wall_seconds + (record.wall_seconds if ran else 0.0),
            cpu_seconds=total.cpu_seconds + (record.cpu_seconds if ran else 0.0),
            cleanup_failures=total.cleanup_failures + record.cleanup_failures,
        )

    def _forget_queued(self, future: PoolFuture[Any]) -> None:
        work = future._work
        if work is None:
            return
        with self._lock:
            if not self._queue.discard(work.key):
                return  # a worker has it, and will see that it was cancelled
            self._count(work.cancelled_record())
        work.release()
        future.set_running_or_notify_cancel()
