"""What the kernel hands in: made into batches as the recorder takes them, counted and told where it does not keep up."""

from __future__ import annotations

import collections
import json
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

from wiseflow_nb.clock import Clock
from wiseflow_nb.recorder._backlog import OWED_LIMIT, Backlog
from wiseflow_nb.recorder._rows import batch_line
from wiseflow_nb.recorder._wire import Wire
from wiseflow_nb.records import EventRecord, TaskRecord, TaskTransition

#: Batches that wait for the recorder, in bytes; what comes then waits as it is (``Backlog``).
PENDING_LIMIT_BYTES = 8 * 1024 * 1024
#: So much is handed in before the thread that makes the batches has its turn, at most.
PENDING_LIMIT_ROWS = 200_000
#: A recorder that falls behind again and again is told of no more often.
BEHIND_AGAIN_SECONDS = 60.0


class Outbox:
    """Take records in one append; make batches of them; keep what does not fit, within bounds.

    Parameters
    ----------
    wire
        Where the batches go.
    publish
        Called with each event of its own, on a thread that holds no lock; the event is on its way to
        the file already.
    """

    def __init__(self, wire: Wire, clock: Clock, publish: Callable[[EventRecord], None]) -> None:
        self._wire, self._clock, self._publish = wire, clock, publish
        self.pending: collections.deque[tuple[str, Any]] = collections.deque()
        self._backlog = Backlog()
        #: Events for which there was no thread to publish them on.
        self._late: collections.deque[EventRecord] = collections.deque()
        #: Held while batches are made.
        self.lock = threading.Lock()
        self._bell = threading.Event()
        self._rung = False
        self._number = 0
        self.unwritable_rows = 0
        #: When batches were made last (monotonic seconds).
        self.made_seconds = -math.inf
        #: What people are told while the recorder does not keep up; empty when the file has all that was not dropped.
        self.trouble = ""
        # Whether rows were dropped and not all that waits is on its way; the batch with which it is.
        self._behind, self._whole_at = False, 0
        self._behind_told, self._to_tell_end = -math.inf, False
        self._caught_up: EventRecord | None = None
        # The count in the file, and in the last event.
        self._on_record = self._told = 0

    @property
    def dropped_rows(self) -> int:
        """How many rows were given up, as the recorder did not keep up."""
        return self._backlog.dropped_rows

    @property
    def crowded(self) -> bool:
        """Whether something waits that no batch has room for."""
        return bool(self._backlog)

    def put(self, table: str, record: Any) -> None:
        """Hand in a record (or a dict, or what gives a ``record`` when it is written) for a table; one append, never blocks."""
        self.pending.append((table, record))
        if not self._rung:
            self._rung = True
            self._bell.set()
        elif len(self.pending) > PENDING_LIMIT_ROWS:
            self.try_to_make()  # the thread that does it has no turn

    def ring(self) -> None:
        """Wake who makes the batches."""
        self._rung = True
        self._bell.set()

    def wait(self, timeout: float) -> bool:
        """Wait until something was handed in, ``timeout`` seconds at most; return whether it was."""
        self._bell.wait(timeout)
        if not self._bell.is_set():
            return False
        # In this order: what is handed in between the two is seen by who makes the batches next.
        self._bell.clear()
        self._rung = False
        return True

    def publish_late(self) -> None:
        """Publish what could not be at its time; on a thread that holds no lock."""
        while self._late:
            self._publish(self._late.popleft())

    def close(self) -> None:
        """Keep nothing any more."""
        self.pending = collections.deque(maxlen=0)

    def forget(self) -> None:
        """In a forked child: what waits is the parent's, and a thread that is not there may have held the lock."""
        self.close()
        self.lock, self._bell, self._rung = threading.Lock(), threading.Event(), False
        self._backlog, self._caught_up, self._whole_at, self._behind = Backlog(), None, 0, False
        self._late.clear()

    def make(self, *, everything: bool = False) -> bool:
        """Make batches of what waits, as far as there is room or of ``everything``; return whether nothing is left."""
        with self.lock:
            self._make(everything)
            return not self._backlog

    def try_to_make(self) -> bool:
        """Make batches and return True; where another thread is at it, leave it to that one and the next."""
        if not self.lock.acquire(blocking=False):
            self.ring()
            return False
        try:
            self._make(False)
        finally:
            self.lock.release()
        return True

    def acknowledged(self, number: int) -> None:
        """Batches up to this number are on record: there may be room again."""
        if self._backlog:
            self.ring()
        if not 0 < self._whole_at <= number:
            return
        with self.lock:
            if not 0 < self._whole_at <= number:  # more were dropped meanwhile
                return
            self._whole_at, self.trouble = 0, ""
            told, self._caught_up = self._caught_up, None
        if told is not None:
            self._publish(told)

    # The caller of what follows holds the lock.

    def _make(self, everything: bool) -> None:
        take, backlog, wire = self.pending.popleft, self._backlog, self._wire
        if self.pending:
            backlog.add([take() for _ in range(len(self.pending))])
        while backlog and (everything or wire.unacked_bytes <= PENDING_LIMIT_BYTES):
            if backlog.dropped_rows != self._on_record:
                backlog.add(self._counts())
            self._append(*backlog.portion())
        if backlog.shed():
            self._fall_behind()
        elif not backlog and (self._behind or (everything and backlog.dropped_rows != self._told)):
            self._catch_up(last=everything)
        self.made_seconds = self._clock.monotonic()

    def _append(
        self,
        rows: Sequence[tuple[str, Any]],
        tasks: Sequence[TaskRecord] = (),
        transitions: Sequence[TaskTransition] = (),
    ) -> None:
        self._number += 1
        line, unwritable = batch_line(self._number, rows, tasks, transitions)
        self._wire.batch(self._number, line)
        if unwritable:
            self._leave_out(unwritable)

    def _counts(self) -> list[tuple[str, Any]]:
        self._on_record = self._backlog.dropped_rows
        counts = {"dropped_rows": self._on_record, "dropped_tasks": self._backlog.dropped_tasks}
        return [("meta", {"key": key, "value": json.dumps(count)}) for key, count in counts.items()]

    def _fall_behind(self) -> None:
        """The first rows were dropped: said at once, and in the file by a batch that needs no room."""
        if self._behind:
            return
        self._behind, self._whole_at = True, 0
        self.trouble = (
            f"the recorder does not keep up (over {PENDING_LIMIT_BYTES >> 20} MB wait for it) and rows are dropped: "
            f"what tasks went through in between; their last states, of {OWED_LIMIT:,} tasks, follow when there is room"
        )
        rows = [*self._counts(), ("meta", {"key": "trouble", "value": json.dumps(self.trouble)})]
        now = self._clock.monotonic()
        if now - self._behind_told > BEHIND_AGAIN_SECONDS:
            self._behind_told, self._to_tell_end = now, True
            event = EventRecord(self._clock.time(), "rows_dropped", self.trouble)
            rows.append(("event", event))
            self._publish_aside(event)
        self._append(rows)

    def _catch_up(self, *, last: bool) -> None:
        """All that waited is on its way: with it the record is complete but for what was dropped."""
        self._behind = False
        rows = [*self._counts(), ("meta", {"key": "trouble", "value": '""'})]
        if self._to_tell_end or last:
            self._to_tell_end = False
            count = self._told = self._backlog.dropped_rows
            tasks = self._backlog.dropped_tasks
            text = f"the recorder keeps up again; rows dropped until then: {count:,}" + (
                f", the last states of {tasks:,} tasks among them" if tasks else ""
            )
            data = {"dropped_rows": count, "dropped_tasks": tasks}
            self._caught_up = EventRecord(self._clock.time(), "rows_caught_up", text, data)
            rows.append(("event", self._caught_up))
        self._append(rows)
        self._whole_at = self._number

    def _leave_out(self, count: int) -> None:
        first = self.unwritable_rows == 0
        self.unwritable_rows += count
        if first:
            text = "a row holds what cannot be recorded, and was left out; further ones are counted only"
            event = EventRecord(self._clock.time(), "rows_unwritable", text)
            self.put("event", event)
            self._publish_aside(event)

    def _publish_aside(self, event: EventRecord) -> None:
        # Not from here: a subscriber may hand in rows, and this thread holds the lock for that.
        try:
            threading.Thread(target=self._publish, args=(event,), name="wiseflow-notice", daemon=True).start()
        except RuntimeError:  # no more threads: the one that flushes does it, whatever it may wait for
            self._late.append(event)
            self.ring()
