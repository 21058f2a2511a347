"""The ready queue of one kind of task: four classes, in order of creation within a class, with ageing.

Tasks become ready nearly in order of creation, and then they also climb in that order: a class is a
deque that is appended to, whose head is the first to run and the first to climb. Whatever comes late,
or comes again, or changes its class, goes to a heap by number, and to another by when it climbs. A task
that is taken out, or moves, stays behind as an entry that no longer counts and is passed over when it
comes up: an entry is true only where the task's own ``place`` names it. A heap's entry of a task that
has come back there is true again, and stands where the task belongs: the order is by number, and a
number is for life. A deque takes each task at most once.
"""

from __future__ import annotations

import heapq
import math
from collections import deque

from wiseflow_nb.pool._queue import AGEING_CEILING, AGEING_SECONDS, aged
from wiseflow_nb.records import Priority
from wiseflow_nb.tasks._job import Job

_CEILING = int(AGEING_CEILING)
#: A task's ``place`` is its class in the class's deque, and so much more in its heap.
_IN_HEAP = len(Priority)
#: Fewer remains than this are never worth a sweep.
SWEEP_ABOVE = 64


class ReadyQueue:
    """Jobs by effective class, highest first, then by number, lowest first. No lock, no clock."""

    def __init__(self) -> None:
        self.count = 0
        self._live = [0] * len(Priority)
        self._orderly: tuple[deque[Job], ...] = tuple(deque() for _ in Priority)
        self._late: tuple[list[tuple[int, Job]], ...] = tuple([] for _ in Priority)
        # When those that are not in a deque climb to the next class.
        self._late_climbs: list[tuple[float, int, int, Job]] = []
        self._sweep_at = SWEEP_ABOVE
        #: No task climbs before this moment.
        self._next_climb = math.inf

    def items(self) -> list[Job]:
        """Every queued job, once."""
        found = {}
        for level in Priority:
            found.update({job.number: job for job in self._orderly[level] if job.place == level})
            found.update({number: job for number, job in self._late[level] if job.place == level + _IN_HEAP})
        return list(found.values())

    def in_class(self, level: int) -> int:
        """How many queued jobs are in a class now."""
        return self._live[level]

    def push(self, job: Job) -> None:
        """Queue a job that is ready since ``job.ready_at``, in its own class."""
        # Plain numbers throughout: comparing members of an enumeration costs several times as much.
        level = 1 if job.level is Priority.NORMAL else int(job.level)
        if job.attempts:
            self._enter_late(job, level)
            return
        orderly = self._orderly[level]
        while orderly:
            last = orderly[-1]
            if last.place == level:
                if last.number < job.number and last.ready_at <= job.ready_at:
                    break
                self._enter_late(job, level)
                return
            # What no longer counts at the end would make everything after it late.
            orderly.pop()
        else:
            if level < _CEILING and (due := job.ready_at + AGEING_SECONDS) < self._next_climb:
                self._next_climb = due
        orderly.append(job)
        job.place = level
        self._live[level] += 1
        self.count += 1

    def discard(self, job: Job) -> None:
        """Take a queued job out; one that is not queued stays so."""
        if job.place >= 0:
            self._leave(job)

    def reprioritise(self, job: Job, now: float) -> None:
        """Put a queued job where its class belongs, keeping its age."""
        if job.place >= 0:
            self._leave(job)
            self._enter_late(job, int(aged(job.level, job.ready_at, now)))

    def pop(self, now: float) -> Job | None:
        """Take the job whose turn it is, or None when the queue is empty."""
        if now < self._next_climb and self._live[1] == self.count:
            # Nearly always: all of one class.
            orderly, late = self._orderly[1], self._late[1]
            if late and (not orderly or late[0][0] < orderly[0].number):
                job, place = heapq.heappop(late)[1], 1 + _IN_HEAP
            elif orderly:
                job, place = orderly.popleft(), 1
            else:
                return None
            if job.place == place:
                self._live[1] -= 1
                self.count -= 1
                job.place = -1
                return job
        head = self.head(now)
        if head is None:
            return None
        job = head[2]
        if job.place < _IN_HEAP:
            self._orderly[job.place].popleft()
        else:
            heapq.heappop(self._late[job.place - _IN_HEAP])
        self._leave(job)
        return job

    def head(self, now: float) -> tuple[int, int, Job] | None:
        """What ``(-class, number)`` and job are first, or None."""
        if not self.count:
            return None
        if now >= self._next_climb:
            self._age(now)
        live = self._live
        level = 3 if live[3] else 2 if live[2] else 1 if live[1] else 0
        orderly, late = self._orderly[level], self._late[level]
        while orderly and orderly[0].place != level:
            orderly.popleft()
        while late and late[0][1].place != level + _IN_HEAP:
            heapq.heappop(late)
        if late and (not orderly or late[0][0] < orderly[0].number):
            return -level, late[0][0], late[0][1]
        job = orderly[0]
        return -level, job.number, job

    def _leave(self, job: Job) -> None:
        self._live[job.place % _IN_HEAP] -= 1
        job.place = -1
        self.count -= 1

    def _enter_late(self, job: Job, level: int) -> None:
        job.place = level + _IN_HEAP
        self._live[level] += 1
        self.count += 1
        heapq.heappush(self._late[level], (job.number, job))
        if level < _CEILING:
            due = job.ready_at + AGEING_SECONDS * (level - job.level + 1)
            if due < self._next_climb:
                self._next_climb = due
            climbs = self._late_climbs
            heapq.heappush(climbs, (due, job.number, level, job))
            if len(climbs) > self._sweep_at:
                # Most have run before they would have climbed: they are not kept until then.
                climbs[:] = [entry for entry in climbs if entry[3].place == entry[2] + _IN_HEAP]
                heapq.heapify(climbs)
                self._sweep_at = SWEEP_ABOVE + 2 * len(climbs)

    def _age(self, now: float) -> None:
        for level in range(_CEILING):
            orderly = self._orderly[level]
            while orderly and (orderly[0].place != level or orderly[0].ready_at + AGEING_SECONDS <= now):
                job = orderly.popleft()
                if job.place == level:
                    self._climb(job, now)
        late = self._late_climbs
        while late and (late[0][0] <= now or late[0][3].place != late[0][2] + _IN_HEAP):
            _, _, level, job = heapq.heappop(late)
            # The class is worked out anew: an entry of an earlier stay in this class may come up early.
            if job.place == level + _IN_HEAP and aged(job.level, job.ready_at, now) > level:
                self._climb(job, now)
        heads = [orderly[0].ready_at + AGEING_SECONDS for orderly in self._orderly[:_CEILING] if orderly]
        heads += [item[0] for item in late[:1]]
        self._next_climb = min(heads, default=math.inf)

    def _climb(self, job: Job, now: float) -> None:
        self._leave(job)
        self._enter_late(job, int(aged(job.level, job.ready_at, now)))
