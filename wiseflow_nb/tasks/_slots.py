"""Who may run now: the ready queues and the slots. No lock of its own; the manager's is held.

A coroutine needs a slot and a runner on the loop, a plain call a slot and a worker of the pool. Both
are *called for* and take the task whose turn it is when they come: nothing is promised to anybody
before. So a pool that is busy with other work holds up plain calls only, and a task is RUNNING when
its code is. Whoever finds a task of the other kind first in line leaves it the last slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from wiseflow_nb.records import Priority
from wiseflow_nb.tasks._admission import Admission
from wiseflow_nb.tasks._job import Job
from wiseflow_nb.tasks._machine import PENDING
from wiseflow_nb.tasks._ready import ReadyQueue

if TYPE_CHECKING:
    from wiseflow_nb.tasks._helping import Bell

#: ``(-class, number)`` and the job: the smaller, the sooner.
Head = tuple[int, int, Job]
LEVELS = tuple(Priority)
#: Above every class.
NO_TICKET = max(LEVELS) + 1


class Ticket:
    """A worker that was called for: what the pool has queued, and with which class."""

    __slots__ = ("future", "level", "open")

    def __init__(self, level: Priority) -> None:
        self.level = level
        #: Until a worker has come, or never will. One may come all the same, where the call was interrupted.
        self.open = True
        self.future: Future[None] | None = None


class Slots:
    """At most ``limit`` tasks hold a slot; of them at most ``room`` are plain calls."""

    def __init__(self, limit: int, room: int, admission: Admission) -> None:
        self.limit = limit
        #: How many plain calls the pool can run at once.
        self.room = room
        self.paused = False
        self.admission = admission
        self._gauged = not admission.idle
        #: Why a ready task was not started though there was a slot; empty if none is held back.
        self.hold_reason = ""
        self.held = 0
        self.threads_held = 0
        #: Runners that were called for and have not come yet.
        self.coming = 0
        #: Workers that were called for and have not come yet: calls that the pool has not made.
        self.tickets = 0
        self._open_tickets: dict[Ticket, None] = {}
        self._tickets_in = [0] * len(LEVELS)
        #: The lowest class of a ticket that is out; above all of them if none is.
        self.lowest_ticket: int = NO_TICKET
        #: How many tickets were ever taken up.
        self.taken_up = 0
        #: Whether the pool has taken up no ticket for so long that nobody leaves a slot for its workers.
        self.overdue = False
        # Tasks that ask for memory have lanes of their own: one that is held back holds back those
        # behind it that ask as well (else a large one would never get in), and nobody else.
        self.coroutines, self.big_coroutines = ReadyQueue(), ReadyQueue()
        self.threads, self.big_threads = ReadyQueue(), ReadyQueue()
        #: Tasks that gave up their slot and want it again.
        self.returning: deque[Job] = deque()
        self._reserve: Job | None = None
        #: Waits that have to look again at each change.
        self.bells: list[Bell] = []

    @property
    def used(self) -> int:
        """Slots that are held, or left to plain calls if they come first."""
        return self.held + self._left_to_threads()

    @property
    def ready_threads(self) -> int:
        """Plain calls that are ready and have not begun."""
        return self.threads.count + self.big_threads.count

    @property
    def ready_coroutines(self) -> int:
        """Coroutines that are ready and have not begun."""
        return self.coroutines.count + self.big_coroutines.count

    @property
    def ready_count(self) -> int:
        """Tasks that are ready and have not begun."""
        return self.coroutines.count + self.big_coroutines.count + self.threads.count + self.big_threads.count

    @property
    def plain(self) -> bool:
        """Whether nothing but the order within one kind decides: none asks for memory, and there is enough."""
        return not (
            self.big_coroutines.count
            or self.big_threads.count
            or (self._gauged and self.admission.pressure() == "critical")
        )

    def ready(self) -> list[Job]:
        """Every task that is ready to run, in no particular order."""
        lanes = (self.coroutines, self.big_coroutines, self.threads, self.big_threads)
        return [job for lane in lanes for job in lane.items()]

    def push(self, job: Job) -> None:
        """Queue a task that has become ready."""
        self._queue(job).push(job)

    def discard(self, job: Job) -> None:
        """Forget a ready task."""
        self._queue(job).discard(job)

    def reprioritise(self, job: Job, now: float) -> None:
        """Put a ready task in the place that its class gives it now."""
        self._queue(job).reprioritise(job, now)

    # -- whom to call for ----------------------------------------------------------------------

    def workers_wanted(self, now: float) -> int:
        """How many further workers of the pool the ready plain calls can use."""
        ready = self.threads.count + self.big_threads.count
        if not ready or self.paused:
            return 0
        free = self.limit - self.held
        wanted = min(free, ready, self.room - self.threads_held) - self.tickets
        if wanted <= 0:
            return 0
        others = self.coroutines.count + self.big_coroutines.count
        if others or not self.plain:
            head = self._first_thread(now)
            if head is None:
                return 0
            if wanted > free - others - self.tickets:
                rival = self._first_coroutine(now) if others else None
                if rival is not None and rival[:2] < head[:2]:
                    return max(0, free - others - self.tickets)
        return wanted

    def runners_wanted(self, now: float) -> int:
        """How many further runners the ready coroutines can use."""
        ready = self.coroutines.count + self.big_coroutines.count
        if not ready or self.paused:
            return 0
        free = self.limit - self.held
        wanted = min(free, ready) - self.coming
        if wanted <= 0:
            return 0
        left = self._left_to_threads()
        if left or not self.plain:
            head = self._first_coroutine(now)
            if head is None:
                return 0
            if left and wanted > free - left - self.coming:
                rival = self._first_thread(now)
                if rival is not None and rival[:2] < head[:2]:
                    if free <= left:
                        self.hold_reason = f"{left} plain calls come first and wait for a worker of the pool"
                    return max(0, free - left - self.coming)
        return wanted

    def new_ticket(self) -> Ticket:
        """Call for a worker, with the class of the ready plain call which the tickets that are out leave."""
        ticket = Ticket(self._class_left() or LEVELS[0])
        self.tickets += 1
        self._open_tickets[ticket] = None
        self._count(ticket.level, 1)
        return ticket

    def restore(self, jobs: Iterable[Job]) -> list[Future[None]]:
        """Make anew what an interrupt may have left half done, from what the tasks tell; return what to settle.

        Calls for workers that have not been sent are forgotten: whoever interrupted one may have lost it.
        """
        held, threads_held, ready, owed = 0, 0, [], []
        for job in jobs:
            if job.grant is not None and job not in self.returning:
                if job.holds:
                    owed.append(job.grant)
                    job.grant = None
                else:
                    self.returning.appendleft(job)
            held += job.holds
            threads_held += job.holds and job.kind != "async"
            job.place = -1
            if job.code == PENDING:
                ready.append(job)
        self.held, self.threads_held = held, threads_held
        self.coroutines, self.big_coroutines = ReadyQueue(), ReadyQueue()
        self.threads, self.big_threads = ReadyQueue(), ReadyQueue()
        for job in ready:
            self.push(job)
        for ticket in list(self._open_tickets):
            if ticket.future is None:
                ticket.open = False
                del self._open_tickets[ticket]
        self.tickets = len(self._open_tickets)
        self._tickets_in = [sum(ticket.level == level for ticket in self._open_tickets) for level in LEVELS]
        self.lowest_ticket = min((ticket.level for ticket in self._open_tickets), default=NO_TICKET)
        return owed

    def raise_tickets(self) -> list[Ticket]:
        """Give tickets that are out the class of calls that came later and rank higher; return those raised.

        What is queued in a pool that others use as well would else wait behind work that is of less
        weight than what it is for.
        """
        raised = []
        while (level := self._class_left()) is not None and level > self.lowest_ticket:
            ticket = min(self._open_tickets, key=lambda item: item.level)
            self._count(ticket.level, -1)
            ticket.level = level
            self._count(level, 1)
            raised.append(ticket)
        return raised

    def _class_left(self) -> Priority | None:
        # The highest class of which more calls are ready than tickets of that class or above can take up.
        left = 0
        for level in reversed(LEVELS):
            left += self.threads.in_class(level) + self.big_threads.in_class(level) - self._tickets_in[level]
            if left > 0:
                return level
        return None

    def _count(self, level: Priority, change: int) -> None:
        counts = self._tickets_in
        counts[level] += change
        if change < 0:
            if level == self.lowest_ticket and not counts[level]:
                self.lowest_ticket = next((item for item in LEVELS if counts[item]), NO_TICKET)
        elif level < self.lowest_ticket:
            self.lowest_ticket = level

    # -- who takes what ------------------------------------------------------------------------

    def take_coroutine(self, now: float) -> Job | None:
        """A runner has come: return the coroutine whose turn it is, holding a slot."""
        free = self.limit - self.held
        if self.paused or free <= 0:
            return None
        if not (self.threads.count or self._gauged or self.big_coroutines.count or self.big_threads.count):
            job = self.coroutines.pop(now)
            if job is not None:
                job.holds = True
                self.held += 1
            return job
        left = self._left_to_threads()
        if not left and self.plain:
            job = self.coroutines.pop(now)
        else:
            head = self._first_coroutine(now)
            if head is None:
                return None
            if free <= left:
                rival = self._first_thread(now)
                if rival is not None and rival[:2] < head[:2]:
                    return None
            job = head[2]
            self._queue(job).discard(job)
        if job is not None:
            self._start(job)
        return job

    def ticket_taken(self, ticket: Ticket) -> None:
        """A worker has come, or never will."""
        ticket.open = False
        del self._open_tickets[ticket]
        self._count(ticket.level, -1)
        self.tickets -= 1
        self.taken_up += 1
        self.overdue = False

    def take_call(self, now: float, *, called: bool) -> Job | None:
        """Return the plain call whose turn it is, holding a slot.

        A worker that was ``called`` for has come for a call; one that stays leaves the slot to a
        coroutine that comes first.
        """
        free = self.limit - self.held
        if self.paused or free <= 0 or self.threads_held >= self.room:
            return None
        others = self.coroutines.count + self.big_coroutines.count
        if not ((others and not called) or self._gauged or self.big_threads.count):
            job = self.threads.pop(now)
            if job is not None:
                job.holds = True
                self.held += 1
                self.threads_held += 1
            return job
        if (called or not others) and self.plain:
            job = self.threads.pop(now)
        else:
            head = self._first_thread(now)
            if head is None:
                return None
            if not called and others >= free:
                rival = self._first_coroutine(now)
                if rival is not None and rival[:2] < head[:2]:
                    return None
            job = head[2]
            self._queue(job).discard(job)
        if job is not None:
            self._start(job)
        return job

    def take(self, job: Job) -> bool:
        """Have a ready task hold a slot, out of turn, if one is free and it may start."""
        if self.paused or self.held >= self.limit or not self._admitted(job):
            return False
        self._queue(job).discard(job)
        self._start(job)
        return True

    def release(self, job: Job) -> None:
        """Free the slot of a task, if it holds one."""
        if job.holds:
            job.holds = False
            self.held -= 1
            self.threads_held -= job.kind != "async"

    def want_back(self, job: Job) -> Future[None] | None:
        """Queue a task that gave up its slot and wants it again; the future is settled when it has it.

        None if it has one: what an earlier attempt left behind may wait as well.
        """
        if not job.holds and job.grant is None:
            job.grant = Future()
            self.returning.append(job)
        return job.grant

    def next_grant(self) -> Job | None:
        """Give a free slot to one who gave theirs up, before anything new starts; its grant is to be settled."""
        if not self.returning or self.held >= self.limit:
            return None
        job = self.returning.popleft()
        self._hold(job)
        return job

    def _left_to_threads(self) -> int:
        # How many slots a coroutine leaves to plain calls, if they come before it.
        ready = self.threads.count + self.big_threads.count
        return 0 if not ready or self.overdue else min(ready, self.room - self.threads_held)

    def _queue(self, job: Job) -> ReadyQueue:
        if job.kind == "async":
            return self.coroutines if job.options.memory is None else self.big_coroutines
        return self.threads if job.options.memory is None else self.big_threads

    def _first_coroutine(self, now: float) -> Head | None:
        other = self.big_threads if self.threads_held < self.room else None
        return self._first(self.coroutines, self.big_coroutines, other, now)

    def _first_thread(self, now: float) -> Head | None:
        return self._first(self.threads, self.big_threads, self.big_coroutines, now)

    def _first(self, lane: ReadyQueue, big: ReadyQueue, other_big: ReadyQueue | None, now: float) -> Head | None:
        best = lane.head(now)
        if not big.count and self.plain:
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
