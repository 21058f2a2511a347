"""The ready queue of one kind of task: four classes, in order of creation within a class, with ageing.

Tasks become ready nearly in order of creation, so a class is a deque that is appended to, and a heap
beside it for those that come late. A task that is taken out, or changes its class, stays behind as an
entry that no longer counts and is passed over when it comes up: what a task's entry says is true only
where the task's own ``place`` says the same. An old entry of a task that has come back to the same
class is true again, and stands where the task belongs: the order is by number, and a number is for life.
"""

from __future__ import annotations

import heapq
import math
from collections import deque

from wiseflow_nb.pool._queue import AGEING_CEILING, AGEING_SECONDS, aged
from wiseflow_nb.records import Priority
from wiseflow_nb.tasks._job import Job

_CEILING = int(AGEING_CEILING)


class ReadyQueue:
    """Jobs by effective class, highest first, then by number, lowest first. No lock, no clock."""

    def __init__(self) -> None:
        self.count = 0
        self._live = [0] * len(Priority)
        self._orderly: tuple[deque[Job], ...] = tuple(deque() for _ in Priority)
        self._late: tuple[list[tuple[int, Job]], ...] = tuple([] for _ in Priority)
        # When each task of a class climbs to the next, in order; those out of order in a heap. Two rows
        # side by side: a pair for each task would be one more object to make and to keep.
        self._climbs: tuple[deque[Job], ...] = tuple(deque() for _ in range(_CEILING))
        self._dues: tuple[deque[float], ...] = tuple(deque() for _ in range(_CEILING))
        self._late_climbs: list[tuple[float, int, int, Job]] = []
        self._next_climb = math.inf

    def items(self) -> list[Job]:
        """Every queued job, once."""
        found = {}
        for level in Priority:
            for job in (*self._orderly[level], *(late for _, late in self._late[level])):
                if job.place == level:
                    found[job.number] = job
        return list(found.values())

    def in_class(self, level: int) -> int:
        """How many queued jobs are in a class now."""
        return self._live[level]

    def push(self, job: Job) -> None:
        """Queue a job that is ready since ``job.ready_at``, in its own class."""
        self.count += 1
        level = job.level
        if level == 1:
            # Nearly always: of the usual class, and ready no earlier than what is queued.
            dues, due = self._dues[1], job.ready_at + AGEING_SECONDS
            orderly = self._orderly[1]
            if orderly and dues and dues[-1] <= due and (last := orderly[-1]).place == 1 and last is not job:
                job.place = 1
                self._live[1] += 1
                if last.number < job.number:
                    orderly.append(job)
                else:
                    heapq.heappush(self._late[1], (job.number, job))
                dues.append(due)
                self._climbs[1].append(job)
                return
        self._enter(job, int(level))

    def discard(self, job: Job) -> None:
        """Take a queued job out; one that is not queued stays so."""
        if job.place >= 0:
            self._live[job.place] -= 1
            job.place = -1
            self.count -= 1

    def reprioritise(self, job: Job, now: float) -> None:
        """Put a queued job where its class belongs, keeping its age."""
        if job.place >= 0:
            self._live[job.place] -= 1
            self._enter(job, int(aged(job.level, job.ready_at, now)))

    def pop(self, now: float) -> Job | None:
        """Take the job whose turn it is, or None when the queue is empty."""
        if now < self._next_climb and self._live[1] == self.count:
            # Nearly always: all of one class.
            orderly, late = self._orderly[1], self._late[1]
            job = orderly[0] if orderly else None
            if late and (job is None or late[0][0] < job.number):
                job = heapq.heappop(late)[1]
            elif job is not None:
                orderly.popleft()
            if job is not None and job.place == 1:
                self._live[1] -= 1
                self.count -= 1
                job.place = -1
                return job
        head = self.head(now)
        if head is None:
            return None
        self.discard(head[2])
        return head[2]

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
        while late and late[0][1].place != level:
            heapq.heappop(late)
        if late and (not orderly or late[0][0] < orderly[0].number):
            return -level, late[0][0], late[0][1]
        job = orderly[0]
        return -level, job.number, job

    def _enter(self, job: Job, level: int) -> None:
        job.place = level
        self._live[level] += 1
        orderly = self._orderly[level]
        # What no longer counts at the end would make everything after it late.
        while orderly and orderly[-1].place != level:
            orderly.pop()
        if not orderly or orderly[-1].number < job.number:
            orderly.append(job)
        elif orderly[-1] is not job:
            heapq.heappush(self._late[level], (job.number, job))
        if level < _CEILING:
            due = job.ready_at + AGEING_SECONDS * (level - job.level + 1)
            climbs, dues = self._climbs[level], self._dues[level]
            while climbs and climbs[0].place != level:
                climbs.popleft()
                dues.popleft()
            if due < self._next_climb:
                self._next_climb = due
            if not climbs or dues[-1] <= due:
                climbs.append(job)
                dues.append(due)
            else:
                heapq.heappush(self._late_climbs, (due, job.number, level, job))

    def _age(self, now: float) -> None:
        for level, (climbs, dues) in enumerate(zip(self._climbs, self._dues, strict=True)):
            while climbs and (dues[0] <= now or climbs[0].place != level):
                dues.popleft()
                self._climb(climbs.popleft(), level, now)
        late = self._late_climbs
        while late and (late[0][0] <= now or late[0][3].place != late[0][2]):
            _, _, level, job = heapq.heappop(late)
            self._climb(job, level, now)
        heads = [dues[0] for dues in self._dues if dues]
        heads += [item[0] for item in late[:1]]
        self._next_climb = min(heads, default=math.inf)

    def _climb(self, job: Job, level: int, now: float) -> None:
        # The class is worked out anew: an entry of an earlier stay in this class may come up early.
        if job.place == level and aged(job.level, job.ready_at, now) > level:
            self._live[level] -= 1
            self._enter(job, int(aged(job.level, job.ready_at, now)))
