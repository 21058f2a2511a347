"""The book of a crew: what became of its work, and the totals.

The usual case is kept as a bare row, which is made into a record when somebody reads. Everything
here is called while the crew's lock is held, but for the functions, which keep nothing.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from wiseflow_nb.context import RemoteRun
from wiseflow_nb.pool._work import PoolRecord, PoolStats
from wiseflow_nb.records import Priority

if TYPE_CHECKING:
    from wiseflow_nb.pool._future import PoolFuture

#: Records of finished work that are kept; the oldest are dropped.
RECORDS_KEPT = 10_000

#: What is kept of work that completed, the usual case: number, name, class, when it was submitted (epoch),
#: queue, wall and CPU seconds.
Row = tuple[int, str, Priority, float, float, float, float]
#: The same of work whose code ran in another process: then how its CPU time was measured, its peak of
#: memory in bytes, and how that was.
RemoteRow = tuple[int, str, Priority, float, float, float, float, str, float, str]


class Book:
    """The newest records, and totals since the beginning."""

    __slots__ = (
        "_cancelled",
        "_cleanup_failures",
        "_completed",
        "_cpu_seconds",
        "_failed",
        "_queue_seconds",
        "_rows",
        "_wall_seconds",
        "submitted",
    )

    def __init__(self) -> None:
        self.submitted = 0
        self._completed = self._failed = self._cancelled = self._cleanup_failures = 0
        self._queue_seconds = self._wall_seconds = self._cpu_seconds = 0.0
        self._rows: deque[Row | RemoteRow | PoolRecord] = deque(maxlen=RECORDS_KEPT)

    def ended(self, row: Row | RemoteRow | PoolRecord, queued: float, wall: float, cpu: float) -> None:
        """Enter work that ran, and its seconds; what is still a bare row had completed."""
        self._rows.append(row)
        self._queue_seconds += queued
        self._wall_seconds += wall
        self._cpu_seconds += cpu
        if type(row) is tuple:
            self._completed += 1
            return
        assert isinstance(row, PoolRecord)
        self._cleanup_failures += row.cleanup_failures
        if row.state == "completed":
            self._completed += 1
        elif row.state == "failed":
            self._failed += 1
        else:
            self._cancelled += 1

    def never_ran(self, work: PoolFuture[Any], error: str = "") -> None:
        """Enter work that was cancelled while it was queued, or failed then with an error."""
        if error:
            self._failed += 1
        else:
            self._cancelled += 1
        state = "failed" if error else "cancelled"
        self._rows.append(
            PoolRecord(f"p{work._number}", work._name, work._priority, state, work._submitted_seconds, error=error)
        )

    def stats(self, *, queued: int, running: int, cancelling: int) -> PoolStats:
        """The totals, with what is there now."""
        return PoolStats(
            submitted=self.submitted,
            completed=self._completed,
            failed=self._failed,
            cancelled=self._cancelled,
            cancelling=cancelling,
            queue_seconds=self._queue_seconds,
            wall_seconds=self._wall_seconds,
            cpu_seconds=self._cpu_seconds,
            cleanup_failures=self._cleanup_failures,
            queued=queued,
            running=running,
        )

    def rows(self) -> list[Row | RemoteRow | PoolRecord]:
        """What is kept, oldest first; ``record`` makes a record of each."""
        return list(self._rows)


def record(row: Row | RemoteRow | PoolRecord) -> PoolRecord:
    """The record that a row stands for."""
    if isinstance(row, PoolRecord):
        return row
    if len(row) == 7:
        return ended_record(row)
    *figures, cpu_source, peak, memory_source = row
    return replace(
        ended_record(cast("Row", figures)),
        cpu_source=cpu_source,
        memory_peak_bytes=peak,
        memory_source=memory_source,
    )


def ended_record(row: Row, state: str = "completed", error: str = "", failures: int = 0) -> PoolRecord:
    """The record of work that ran in a thread."""
    number, name, priority, submitted, queued, wall, cpu = row
    started = submitted + queued
    return PoolRecord(
        f"p{number}", name, priority, state, submitted, started, queued, wall, cpu, "thread_time", error, failures
    )


def measured_there(row: Row | PoolRecord, remote: RemoteRun) -> RemoteRow | PoolRecord:
    """The row of work whose code ran in another process: what it cost there is what counts."""
    if type(row) is tuple and not remote.cleanup_failures:
        return (*row[:6], remote.cpu_seconds, remote.source, remote.memory_peak_bytes, remote.memory_source)
    made = record(row)
    return replace(
        made,
        cpu_seconds=remote.cpu_seconds,
        cpu_source=remote.source,
        cleanup_failures=made.cleanup_failures + len(remote.cleanup_failures),
        memory_peak_bytes=remote.memory_peak_bytes,
        memory_source=remote.memory_source,
    )
