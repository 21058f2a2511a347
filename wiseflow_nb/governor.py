"""The governor of a session: sizes the pool, says whether work runs, looks for leaks, watches for idleness.

One thread. What it decides with are pure functions elsewhere; here is when they are asked.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from wiseflow_nb.clock import Clock
from wiseflow_nb.config import Settings
from wiseflow_nb.quantities import duration
from wiseflow_nb.records import NAN, PoolStatus, TaskRecord, TaskState
from wiseflow_nb.resources import _orphans
from wiseflow_nb.resources._audit import AuditFacts, AuditFinding, Series, find_leaks
from wiseflow_nb.sizing import SizingDecision

GOVERN_SECONDS = 0.5
#: A look every so often while nothing runs.
IDLE_GOVERN_SECONDS = 2.0
#: A burst of transitions is one look.
COALESCE_SECONDS = 0.1
#: How far back trends are looked for.
TREND_SECONDS = 3600.0


class GovernedPool(Protocol):
    """What it needs of the pool."""

    @property
    def pending(self) -> int: ...

    def status(self) -> PoolStatus: ...

    def resize(self, workers: int, reason: str = "") -> int: ...

    def release(self) -> None: ...


class GovernedTasks(Protocol):
    """What it needs of the task manager."""

    @property
    def pending_thread_tasks(self) -> int: ...

    @property
    def cleanup_failures(self) -> int: ...

    @property
    def callback_failures(self) -> int: ...

    @property
    def hold_reason(self) -> str: ...

    def counts(self) -> Mapping[str, int]: ...

    def records(self, since_rev: int = 0) -> Iterable[TaskRecord]: ...


class GovernedMonitor(Protocol):
    """What it needs of the monitor."""

    def rows(self, since_seconds: float = ...) -> Any: ...

    def calculate_optimal_thread_count(
        self, pending: int | None = None, workers: int | None = None
    ) -> SizingDecision: ...


class Governor:
    """Run beside a session.

    Parameters
    ----------
    settings
        The settings in force, asked for at each look.
    cells_running
        Whether a notebook cell runs.
    tell_busy, tell_pool
        Called with whether work runs, and with the pool's status when it changed.
    tell_hold
        Called with why no task starts although some are ready (empty: no such reason), when it changed.
    tell_shutdown
        Called with when the idle workers are going to be stopped (seconds since the epoch), and with
        NaN when that is called off or done.
    look_at_recorder
        Called at each look with whether work runs: a recorder that hangs cannot tell so itself.
    event
        ``event(kind, message, **data)`` records and publishes.
    """

    def __init__(
        self,
        *,
        monitor: GovernedMonitor,
        pool: GovernedPool,
        tasks: GovernedTasks,
        clock: Clock,
        settings: Callable[[], Settings],
        cells_running: Callable[[], bool],
        tell_busy: Callable[[bool], None],
        tell_pool: Callable[[PoolStatus], None],
        tell_hold: Callable[[str], None],
        tell_shutdown: Callable[[float], None],
        event: Callable[..., None],
        look_at_recorder: Callable[[bool], None] = lambda busy: None,
    ) -> None:
        self._monitor, self._pool, self._tasks, self._clock = monitor, pool, tasks, clock
        self._settings, self._cells_running = settings, cells_running
        self._tell_busy, self._tell_pool, self._event = tell_busy, tell_pool, event
        self._tell_hold, self._tell_shutdown = tell_hold, tell_shutdown
        self._look_at_recorder = look_at_recorder
        self._last_hold = ""
        #: What stops the kernel, where there is one and it is asked for; set by whoever knows the kernel.
        self.stop_kernel: Callable[[], None] | None = None
        self.shutdown_at = NAN
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._last_pool: PoolStatus | None = None
        self._pool_lock = threading.Lock()
        self._idle_since = clock.monotonic()
        self._rests = False
        self._next_audit = clock.monotonic() + settings().audit_interval
        self._audit_lock = threading.Lock()
        self._first_seen: dict[tuple[str, Any], float] = {}
        self._told: set[tuple[str, str]] = set()

    def start(self) -> None:
        """Start the thread."""
        self._ended.clear()
        self._thread = threading.Thread(target=self._run, name="wiseflow-govern", daemon=True)
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Stop the thread, waiting ``timeout`` seconds at most."""
        self._ended.set()
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def after_fork(self) -> None:
        """In a forked child nothing is governed; a thread that is not there may have held any lock."""
        self._wake, self._ended, self._thread = threading.Event(), threading.Event(), None
        self._pool_lock, self._audit_lock = threading.Lock(), threading.Lock()

    def wake(self) -> None:
        """Something changed: look soon."""
        if not self._wake.is_set():
            self._wake.set()

    def not_idle(self) -> None:
        """Somebody was here: idleness begins anew, and what was announced is called off."""
        self._idle_since, self._rests = self._clock.monotonic(), False
        self.wake()

    def busy(self) -> bool:
        """Whether a cell, a task or pool work is alive."""
        return self._cells_running() or self._pool.pending > 0 or self._unfinished() > 0

    def look(self) -> None:
        """One look at everything; what the thread does again and again."""
        busy = self.busy()
        self._tell_busy(busy)
        self._look_at_recorder(busy)
        self.size_pool()
        self.tell_pool()
        if (hold := self._tasks.hold_reason) != self._last_hold:
            self._last_hold = hold
            self._tell_hold(hold)
        self._look_idle()
        interval, now = self._settings().audit_interval, self._clock.monotonic()
        if interval > 0 and now >= self._next_audit:
            self._next_audit = now + interval
            self.audit()

    def size_pool(self) -> None:
        """Give the pool the size that the resources allow."""
        decision = self._monitor.calculate_optimal_thread_count(
            pending=self._tasks.pending_thread_tasks + self._pool.pending, workers=self._pool.status().target
        )
        self._pool.resize(decision.target, decision.reason)

    def tell_pool(self) -> None:
        """Tell how the pool stands, if that changed. May be called from any thread."""
        # Read and told in one: else what another thread read later could be told earlier, and the older
        # figures would be the last word on a pool that rests.
        with self._pool_lock:
            status = self._pool.status()
            if status != self._last_pool:
                self._last_pool = status
                self._tell_pool(status)

    def audit(self) -> tuple[AuditFinding, ...]:
        """Look for what leaks; each finding that is new is an event. May be called from any thread."""
        with self._audit_lock:
            findings = find_leaks(self._facts())
            keys = {(finding.kind, finding.subject) for finding in findings}
            fresh = [finding for finding in findings if (finding.kind, finding.subject) not in self._told]
            self._told = keys
        for finding in fresh:
            self._event("audit", finding.message, finding=finding.kind, subject=finding.subject)
        return findings

    def _facts(self) -> AuditFacts:
        records = list(self._tasks.records())
        stuck = [(record.task_id, record.name) for record in records if record.state is TaskState.CANCELLING]
        lone, dead = _orphans.orphans(os.getpid()), _orphans.zombies(os.getpid())
        seen = self._ages(
            [("task", task_id) for task_id, _ in stuck] + [("process", (pid, born)) for pid, _, born in (*lone, *dead)]
        )
        rows = self._monitor.rows(self._clock.time() - TREND_SECONDS)
        status = self._pool.status()
        return AuditFacts(
            cleanup_failures=self._tasks.cleanup_failures,
            callback_failures=self._tasks.callback_failures,
            abandoned_tasks=tuple((item.task_id, item.name) for item in records if item.state is TaskState.ABANDONED),
            stuck_tasks=tuple((task_id, name, seen["task", task_id]) for task_id, name in stuck),
            workers=status.workers,
            # A worker whose task waits for another is made up for, and a shrink lets running work end.
            most_workers=max(status.max_workers, status.target) + status.busy,
            orphans=tuple((pid, name, seen["process", (pid, born)]) for pid, name, born in lone),
            zombies=tuple((pid, name, seen["process", (pid, born)]) for pid, name, born in dead),
            descriptors=_series(rows, "process_open_fds"),
            memory=_series(rows, "process_memory_rss_bytes"),
        )

    def _ages(self, keys: Iterable[tuple[str, Any]]) -> dict[tuple[str, Any], float]:
        """For how long each has been seen, from one look to the next."""
        now = self._clock.monotonic()
        self._first_seen = {key: self._first_seen.get(key, now) for key in keys}
        return {key: now - first for key, first in self._first_seen.items()}

    def _run(self) -> None:
        while not self._ended.is_set():
            self._clock.wait(self._wake, GOVERN_SECONDS if self.busy() else IDLE_GOVERN_SECONDS)
            self._wake.clear()
            if self._ended.is_set():
                return
            self.look()
            self._clock.wait(threading.Event(), COALESCE_SECONDS)

    def _unfinished(self) -> int:
        return sum(count for name, count in self._tasks.counts().items() if not TaskState(name).terminal)

    def _look_idle(self) -> None:
        settings, now = self._settings(), self._clock.monotonic()
        busy = self.busy()
        if busy:
            self._idle_since, self._rests = now, False
        left = self._idle_since + settings.auto_shutdown_idle_time - now
        announced = self.shutdown_at == self.shutdown_at
        # Never without a word a check before it, however late this look is.
        wanted = settings.auto_shutdown_enabled and not busy and not self._rests
        due = wanted and left <= settings.auto_shutdown_check_interval
        if announced and not due:
            self._announce(NAN)
            self._event("idle_shutdown_off", "somebody is here again: nothing is stopped")
        elif due and not announced:
            left = max(left, min(settings.auto_shutdown_check_interval, settings.auto_shutdown_idle_time))
            self._idle_since = now + left - settings.auto_shutdown_idle_time
            self._announce(self._clock.time() + left)
            what = "kernel is" if self._stops_kernel(settings) else "workers are"
            self._event("idle_shutdown_soon", f"idle: the {what} stopped in {duration(left)} unless work comes")
        elif due and left <= 0:
            self._announce(NAN)
            self._rests = True
            self._pool.release()
            kernel = self._stops_kernel(settings)
            self._event("idle_shutdown", f"idle: the {'kernel is' if kernel else 'workers were'} stopped")
            if kernel and self.stop_kernel is not None:
                self.stop_kernel()

    def _stops_kernel(self, settings: Settings) -> bool:
        return settings.auto_shutdown_kernel and self.stop_kernel is not None

    def _announce(self, at: float) -> None:
        self.shutdown_at = at
        self._tell_shutdown(at)


def _series(rows: Any, column: str) -> Series:
    from wiseflow_nb.records import SAMPLE_COLUMNS

    return Series(rows[:, 0].tolist(), rows[:, SAMPLE_COLUMNS.index(column)].tolist())
