"""The order in which queued work is taken: four deques; queue, take, cancel and reprioritise at a constant cost.

It has no lock and no clock: the caller holds its own lock and passes the time in.

Within a class the numbers grow and the ages shrink from the head to the tail, so the head is the
oldest, has climbed the most, and comes first: ageing needs no moving about, only a look at the
heads. Work whose class is changed goes to a heap beside the deque of its new class. What it leaves
behind, like cancelled work, is dropped when it comes up, or when such remains are most of what is
held.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Container, Iterator
from typing import Generic, Protocol, TypeVar

from wiseflow_nb.pool._queue import AGEING_CEILING, AGEING_SECONDS
from wiseflow_nb.records import Priority

#: Fewer remains than this are never worth a sweep.
SWEEP_ABOVE = 64

_CEILING = int(AGEING_CEILING)
_CRITICAL = int(Priority.CRITICAL)
_LEVELS = tuple(sorted(map(int, Priority), reverse=True))
_GONE = -1


class Queued(Protocol):
    """What the queue reads of its items, and where it notes their place.

    ``_stamp`` is 0 in the deque of ``_priority``, the stamp of the entry in its heap, or -1 in neither.
    """

    _number: int
    _priority: Priority
    _queued_at: float
    _stamp: int


ItemT = TypeVar("ItemT", bound=Queued)


class DequeQueue(Generic[ItemT]):
    """Items by effective class, highest first, then by number, lowest first.

    Items are pushed in the order of their numbers and of the times since which they wait.
    """

    __slots__ = ("_heaps", "_held", "_lanes", "_normal", "_stamps", "size")

    def __init__(self) -> None:
        self._lanes: tuple[deque[ItemT], ...] = tuple(deque() for _ in Priority)
        self._normal = self._lanes[Priority.NORMAL]
        self._heaps: tuple[list[tuple[int, int, ItemT]], ...] = tuple([] for _ in Priority)
        #: Entries in all deques and heaps, remains included.
        self._held = 0
        self._stamps = 0
        self.size = 0

    def __len__(self) -> int:
        return self.size

    def push(self, item: ItemT) -> None:
        """Queue an item that is younger than all before it."""
        # The last step is the only one after which an interrupt can come.
        self._held += 1
        self.size += 1
        item._stamp = 0
        self._lanes[item._priority].append(item)

    def discard(self, item: ItemT) -> bool:
        """Take an item out of the queue; return whether it was there."""
        if item._stamp == _GONE:
            return False
        item._stamp = _GONE
        self.size -= 1
        self._sweep()
        return True

    def reprioritise(self, item: ItemT, priority: Priority) -> bool:
        """Change an item's own class, keeping its age; return whether it was there."""
        if item._stamp == _GONE:
            return False
        if item._priority != priority:
            self._stamps += 1
            item._stamp, item._priority = self._stamps, priority
            self._held += 1
            heapq.heappush(self._heaps[priority], (item._number, item._stamp, item))
            self._sweep()
        return True

    def pop(self, now: float) -> ItemT | None:
        """Take the item whose turn it is, or None when the queue is empty."""
        lane = self._normal
        if len(lane) != self._held:
            return self._pop_best(now)
        # All there is has one class: its order needs no look at ages.
        while lane:
            item = lane.popleft()
            self._held -= 1
            if item._stamp == 0:
                item._stamp = _GONE
                self.size -= 1
                return item
        return None

    def coming(self, passed: Container[ItemT]) -> Iterator[ItemT]:
        """The items in the order of ``pop``, but for those passed over; none where several classes wait."""
        lane = next((lane for lane in self._lanes if len(lane) == self._held), ())
        return (item for item in lane if item._stamp == 0 and item not in passed)

    def items(self) -> list[ItemT]:
        """Every queued item, in no particular order."""
        waiting = [item for lane in self._lanes for item in lane if item._stamp == 0]
        moved = [item for heap in self._heaps for _, stamp, item in heap if stamp == item._stamp]
        return waiting + moved

    def _pop_best(self, now: float) -> ItemT | None:
        best: ItemT | None = None
        best_level = best_class = -1
        for level in _LEVELS:
            head = self._head(level)
            if head is None:
                continue
            climbed = level
            if level < _CEILING:
                climbed = min(_CEILING, level + int(max(0.0, now - head._queued_at) // AGEING_SECONDS))
            if best is None or climbed > best_class or (climbed == best_class and head._number < best._number):
                best, best_level, best_class = head, level, climbed
            if best_class == _CRITICAL:
                break
        if best is None:
            return None
        lane = self._lanes[best_level]
        if lane and lane[0] is best:
            lane.popleft()
        else:
            heapq.heappop(self._heaps[best_level])
        self._held -= 1
        self.size -= 1
        best._stamp = _GONE
        return best

    def _head(self, level: int) -> ItemT | None:
        lane, heap = self._lanes[level], self._heaps[level]
        while lane and lane[0]._stamp != 0:
            lane.popleft()
            self._held -= 1
        while heap and heap[0][1] != heap[0][2]._stamp:
            heapq.heappop(heap)
            self._held -= 1
        if not heap:
            return lane[0] if lane else None
        moved = heap[0][2]
        return moved if not lane or moved._number < lane[0]._number else lane[0]

    def _sweep(self) -> None:
        # Each sweep halves what is held at least, so that its cost is spread over what it drops.
        if self._held <= SWEEP_ABOVE + 2 * self.size:
            return
        lanes = tuple([deque([item for item in lane if item._stamp == 0]) for lane in self._lanes])
        # In order, which is a heap as well.
        heaps = tuple([sorted([entry for entry in heap if entry[1] == entry[2]._stamp]) for heap in self._heaps])
        # Made first and put in place in steps between which no interrupt comes: else some of it would be lost.
        self._lanes, self._normal, self._heaps, self._held = lanes, lanes[Priority.NORMAL], heaps, self.size
