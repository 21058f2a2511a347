"""Who may run now: the ready queue and the slots. No lock of its own; the manager's is held.

A coroutine starts as soon as it has a slot. A plain call also needs a worker of the pool, so the
pool is handed an anonymous *ticket* that reserves a slot, and only when a worker takes the ticket up
is it decided which task runs: the one whose turn it is then. A task is RUNNING when its code is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from tests.oracles.plain_tasks._job import Job
from wiseflow_nb.pool._queue import ClassQueue, aged
from wiseflow_nb.records import Priority
from wiseflow_nb.tasks._admission import Admission

Head = tuple[Priority, int, Job]


class Slots:
    """At most ``limit`` tasks hold a slot; of them at most ``thread_room()`` are plain calls."""

    def __init__(self, limit: int, thread_room: Callable[[], int], admission: Admission) -> None:
        self.limit = limit
        self.paused = False
        self.admission = admission
        #: Why a ready task was not started though there was a slot; empty if none is held back.
        self.hold_reason = ""
        self.tickets = 0
        self.held = 0
        self.threads_held = 0
        self._thread_room = thread_room
        # Tasks that ask for memory have lanes of their own: one that is held back holds back those
        # behind it that ask as well (else a large one would never get in), and nobody else.
        self._coroutine_lanes: tuple[ClassQueue[Job], ...] = (ClassQueue(), ClassQueue())
        self._thread_lanes: tuple[ClassQueue[Job], ...] = (ClassQueue(), ClassQueue())
        self._assigned: dict[int, Job] = {}
        self._returning: deque[Job] = deque()
        self._reserve: Job | None = None

    @property
    def used(self) -> int:
        """Slots that are held or reserved."""
        return self.held + self.tickets

    @property
    def ready_threads(self) -> int:
        """Plain calls that are ready and not yet handed to the pool."""
        return sum(len(lane) for lane in self._thread_lanes)

    def ready(self) -> list[Job]:
        """Every task that is ready to run, in no particular order."""
        lanes = (*self._thread_lanes, *self._coroutine_lanes)
        return [*(job for lane in lanes for job in lane.items()), *self._assigned.values()]

    def push(self, job: Job) -> None:
        """Queue a task that has become ready."""
        self._queue(job).push(job, job.number, job.level, job.ready_at)

    def discard(self, job: Job) -> None:
        """Forget a ready task."""
        if self._assigned.pop(job.number, None) is None:
            self._queue(job).discard(job.number)
        else:
            self.admission.withdraw(job.number)

    def reprioritise(self, job: Job, now: float) -> None:
        """Put a ready task in the place that its class gives it now."""
        self._queue(job).reprioritise(job.number, job.level, now)

    def start_next(self, now: float) -> Job | None:
        """Take the next task if there is a slot: a coroutine to start, or a plain call to send a ticket for."""
        self.hold_reason = ""
        if self.paused:
            return None
        while self.tickets > len(self._assigned) and (spare := self._first(self._thread_lanes, now)) is not None:
            self._queue(spare[2]).discard(spare[1])
            self._assign(spare[2])  # a ticket whose task was cancelled serves another
        if self.used >= self.limit:
            return None
        lanes = self._coroutine_lanes
        if self.threads_held + self.tickets < self._thread_room():
            lanes = (*lanes, *self._thread_lanes)
        best = self._first(lanes, now)
        if best is None:
            return None
        job = best[2]
        self._queue(job).discard(job.number)
        if job.record.kind == "async":
            self._start(job)
        else:
            self._assign(job)
            self.tickets += 1
        return job

    def redeem(self, now: float) -> Job | None:
        """A worker has taken up a ticket: return the plain call whose turn it is, holding a slot."""
        self.tickets -= 1
        # Not counting the tickets still out: when the limit was lowered below their number, the first
        # that is taken up runs, and the others find the slots held.
        if self.paused or self.held >= self.limit:
            self._give_back(now)
            return None
        for held_back in [job for job in self._assigned.values() if not self._admitted(job)]:
            self._unassign(held_back)
        head = self._first(self._thread_lanes, now)
        mine = min(self._assigned.values(), key=lambda job: self._rank(job, now), default=None)
        if head is not None and (mine is None or (-head[0], head[1]) < self._rank(mine, now)):
            job = head[2]
            self._queue(job).discard(job.number)
            self._give_back(now)
        elif mine is not None:
            job = mine
            del self._assigned[job.number]
        else:
            return None
        self._start(job)
        return job

    def release(self, job: Job) -> None:
        """Free the slot of a task, if it holds one."""
        if job.holds:
            job.holds = False
            self.held -= 1
            self.threads_held -= job.record.kind != "async"

    def want_back(self, job: Job) -> Future[None] | None:
        """Queue a task that gave up its slot and wants it again; the future is settled when it has it.

        None if it has one: what an earlier attempt left behind may wait as well.
        """
        if not job.holds and job.grant is None:
            job.grant = Future()
            self._returning.append(job)
        return job.grant

    def let_through(self, job: Job) -> Future[None] | None:
        """A task that wants its slot again goes on without: it is to unwind. Return what to settle."""
        grant, job.grant = job.grant, None
        if grant is not None:
            self._returning.remove(job)
        return grant

    def grants(self) -> list[Future[None]]:
        """Give free slots to those who gave theirs up, before anything new starts; return what to settle."""
        given = []
        while self._returning and self.used < self.limit:
            job = self._returning.popleft()
            self._hold(job)
            if job.grant is not None:
                given.append(job.grant)
                job.grant = None
        return given

    def _queue(self, job: Job) -> ClassQueue[Job]:
        lanes = self._coroutine_lanes if job.record.kind == "async" else self._thread_lanes
        return lanes[job.options.memory is not None]

    def _first(self, lanes: Sequence[ClassQueue[Job]], now: float) -> Head | None:
        found = []
        for asks in (False, True):
            heads = [head for lane in lanes[asks::2] if (head := lane.peek(now)) is not None]
            best = min(heads, key=_turn, default=None)
            if best is not None and self._admitted(best[2]):
                found.append(best)
        return min(found, key=_turn, default=None)

    def _admitted(self, job: Job) -> bool:
        if self.admission.idle:
            return True
        taken = self._reserve is not None and self._reserve.holds
        reason = self.admission.reason(
            job.number,
            job.label,
            job.level,
            job.options.memory,
            reserve_taken=taken and self._reserve is not job,
        )
        if reason:
            self.hold_reason = reason
        return not reason

    def _start(self, job: Job) -> None:
        self._hold(job)
        if not self.admission.idle:
            self.admission.promise(job.number, job.options.memory)
            if self.admission.pressure() == "critical":
                self._reserve = job

    def _hold(self, job: Job) -> None:
        job.holds = True
        self.held += 1
        self.threads_held += job.record.kind != "async"

    def _rank(self, job: Job, now: float) -> tuple[int, int]:
        return -aged(job.level, job.ready_at, now), job.number

    def _give_back(self, now: float) -> None:
        while len(self._assigned) > self.tickets:
            self._unassign(max(self._assigned.values(), key=lambda job: self._rank(job, now)))

    def _assign(self, job: Job) -> None:
        self._assigned[job.number] = job
        self.admission.promise(job.number, job.options.memory)

    def _unassign(self, job: Job) -> None:
        del self._assigned[job.number]
        self.admission.withdraw(job.number)
        self.push(job)


def _turn(head: Head) -> tuple[int, int]:
    return -head[0], head[1]
