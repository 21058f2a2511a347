"""Who may run now: the ready queues and the slots. No lock of its own; the manager's is held.

A coroutine needs a slot and a runner on the loop, which takes the task whose turn it is when it comes.
A plain call also needs a worker of the pool, so the pool is handed an anonymous *ticket* that reserves
a slot, and only when a worker takes the ticket up is it decided which task runs: the one whose turn it
is then. A task is RUNNING when its code is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from wiseflow_nb.pool._queue import aged
from wiseflow_nb.tasks._admission import Admission
from wiseflow_nb.tasks._job import Job
from wiseflow_nb.tasks._ready import ReadyQueue

#: ``(-class, number)`` and the job: the smaller, the sooner.
Head = tuple[int, int, Job]


class Slots:
    """At most ``limit`` tasks hold a slot; of them at most ``thread_room()`` are plain calls."""

    def __init__(self, limit: int, thread_room: Callable[[], int], admission: Admission) -> None:
        self.limit = limit
        self.paused = False
        self.admission = admission
        self._gauged = not admission.idle
        #: Why a ready task was not started though there was a slot; empty if none is held back.
        self.hold_reason = ""
        self.tickets = 0
        self.held = 0
        self.threads_held = 0
        #: Runners that were called for and have not come yet.
        self.coming = 0
        #: Calls that the pool was handed for the tickets and that it has not made yet.
        self.sent = 0
        self._thread_room = thread_room
        # Tasks that ask for memory have lanes of their own: one that is held back holds back those
        # behind it that ask as well (else a large one would never get in), and nobody else.
        self._coroutines, self._big_coroutines = ReadyQueue(), ReadyQueue()
        self._threads, self._big_threads = ReadyQueue(), ReadyQueue()
        self._assigned: dict[int, Job] = {}
        #: Tasks that gave up their slot and want it again.
        self.returning: deque[Job] = deque()
        self._reserve: Job | None = None

    @property
    def used(self) -> int:
        """Slots that are held or reserved."""
        return self.held + self.tickets

    @property
    def ready_threads(self) -> int:
        """Plain calls that are ready and not yet handed to the pool."""
        return self._threads.count + self._big_threads.count

    @property
    def ready_count(self) -> int:
        """Tasks that are ready and have not been handed on."""
        return self._coroutines.count + self._big_coroutines.count + self._threads.count + self._big_threads.count

    @property
    def mixed(self) -> bool:
        """Whether there is more to weigh than the order of coroutines that ask for nothing."""
        return bool(self._threads.count or self._big_threads.count or self._big_coroutines.count or self._gauged)

    def ready(self) -> list[Job]:
        """Every task that is ready to run, in no particular order."""
        lanes = (self._coroutines, self._big_coroutines, self._threads, self._big_threads)
        return [*(job for lane in lanes for job in lane.items()), *self._assigned.values()]

    def push(self, job: Job) -> None:
        """Queue a task that has become ready."""
        self._queue(job).push(job)

    def discard(self, job: Job) -> None:
        """Forget a ready task."""
        if self._assigned.pop(job.number, None) is None:
            self._queue(job).discard(job)
        else:
            self.admission.withdraw(job.number)

    def reprioritise(self, job: Job, now: float) -> None:
        """Put a ready task in the place that its class gives it now."""
        self._queue(job).reprioritise(job, now)

    def next_ticket(self, now: float) -> Job | None:
        """Take the next plain call if the slot is its to have; the caller sends a ticket for it."""
        self.hold_reason = ""
        if self.paused:
            return None
        if self._threads.count or self._big_threads.count:
            while self.tickets > len(self._assigned) and (spare := self._first_thread(now)) is not None:
                self._assign(spare[2])  # a ticket whose task was cancelled serves another
            free = self.limit - self.held - self.tickets
            if free > 0 and self._room():
                best = self._first_thread(now)
                if best is not None:
                    rival = self._first_coroutine(now)
                    if (
                        rival is None
                        or best[:2] < rival[:2]
                        or free > self._coroutines.count + self._big_coroutines.count
                    ):
                        self._assign(best[2])
                        self.tickets += 1
                        return best[2]
        return None

    def runners_wanted(self, now: float) -> int:
        """How many further runners the ready coroutines can use."""
        free = self.limit - self.held - self.tickets
        if self.paused or free <= self.coming:
            return 0
        able = self._coroutines.count + self._big_coroutines.count
        if able and not self.admission.idle and self._first_coroutine(now) is None:
            return 0
        return max(0, min(free, able) - self.coming)

    def take_coroutine(self, now: float) -> Job | None:
        """A runner has come: return the coroutine whose turn it is, holding a slot."""
        if self.paused or self.held + self.tickets >= self.limit:
            return None
        if not self.mixed:
            job = self._coroutines.pop(now)
            if job is not None:
                job.holds = True
                self.held += 1
            return job
        best = self._first_coroutine(now)
        if best is None:
            return None
        job = best[2]
        if self._threads.count or self._big_threads.count:
            rival = self._first_thread(now)
            if rival is not None and self._room() and rival[:2] < best[:2]:
                return None  # the slot is a plain call's: the dispatch that follows sends its ticket
        self._queue(job).discard(job)
        self._start(job)
        return job

    def redeem(self, now: float) -> Job | None:
        """A worker has taken up a ticket: return the plain call whose turn it is, holding a slot."""
        if not self.tickets:
            return None  # a worker that had just run a task took this one up too
        self.tickets -= 1
        # Not counting the tickets still out: when the limit was lowered below their number, the first
        # that is taken up runs, and the others find the slots held.
        if self.paused or self.held >= self.limit:
            self._give_back(now)
            return None
        if not self.admission.idle:
            for held_back in [job for job in self._assigned.values() if not self._admitted(job)]:
                self._unassign(held_back)
        head = self._first_thread(now)
        mine = min(self._assigned.values(), key=lambda job: self._rank(job, now), default=None)
        if head is not None and (mine is None or head[:2] < self._rank(mine, now)):
            job = head[2]
            self._queue(job).discard(job)
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
            self.threads_held -= job.kind != "async"

    def want_back(self, job: Job) -> Future[None]:
        """Queue a task that gave up its slot and wants it again; the future is settled when it has it."""
        job.grant = Future()
        self.returning.append(job)
        return job.grant

    def let_through(self, job: Job) -> Future[None] | None:
        """A task that wants its slot again goes on without: it is to unwind. Return what to settle."""
        grant = job.grant
        if grant is not None:
            job.grant = None
            self.returning.remove(job)
        return grant

    def grants(self) -> list[Future[None]]:
        """Give free slots to those who gave theirs up, before anything new starts; return what to settle."""
        given = []
        while self.returning and self.used < self.limit:
            job = self.returning.popleft()
            self._hold(job)
            if job.grant is not None:
                given.append(job.grant)
                job.grant = None
        return given

    def _room(self) -> bool:
        return self.threads_held + self.tickets < self._thread_room()

    def _queue(self, job: Job) -> ReadyQueue:
        if job.kind == "async":
            return self._coroutines if job.options.memory is None else self._big_coroutines
        return self._threads if job.options.memory is None else self._big_threads

    def _first_coroutine(self, now: float) -> Head | None:
        other = self._big_threads if self._room() else None
        return self._first(self._coroutines, self._big_coroutines, other, now)

    def _first_thread(self, now: float) -> Head | None:
        return self._first(self._threads, self._big_threads, self._big_coroutines, now)

    def _first(self, lane: ReadyQueue, big: ReadyQueue, other_big: ReadyQueue | None, now: float) -> Head | None:
        best = lane.head(now)
        if self.admission.idle and not big.count:
            return best
        if best is not None and not self._admitted(best[2]):
            best = None
        head = big.head(now)
        other = None if other_big is None else other_big.head(now)
        # Of those that ask for memory only the very first may have it.
        if (
            head is not None
            and (other is None or head[:2] < other[:2])
            and (best is None or head[:2] < best[:2])
            and self._admitted(head[2])
        ):
            return head
        return best

    def _admitted(self, job: Job) -> bool:
        if self.admission.idle:
            return True
        taken = self._reserve is not None and self._reserve.holds and self._reserve is not job
        reason = self.admission.reason(job.number, job.label, job.level, job.options.memory, reserve_taken=taken)
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
        self.threads_held += job.kind != "async"

    def _rank(self, job: Job, now: float) -> tuple[int, int]:
        return -aged(job.level, job.ready_at, now), job.number

    def _give_back(self, now: float) -> None:
        while len(self._assigned) > self.tickets:
            self._unassign(max(self._assigned.values(), key=lambda job: self._rank(job, now)))

    def _assign(self, job: Job) -> None:
        self._queue(job).discard(job)
        self._assigned[job.number] = job
        self.admission.promise(job.number, job.options.memory)

    def _unassign(self, job: Job) -> None:
        del self._assigned[job.number]
        self.admission.withdraw(job.number)
        self.push(job)
