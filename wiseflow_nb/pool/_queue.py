"""A queue of four classes with ageing: the order in which work is taken, and nothing else.

It has no lock and no clock: the caller holds its own lock and passes the time in.
"""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

from wiseflow_nb.records import Priority

#: A queued item climbs one class each time it has waited this long.
AGEING_SECONDS = 30.0
#: Ageing never lifts an item above this class: CRITICAL has to be asked for.
AGEING_CEILING = Priority.HIGH

ItemT = TypeVar("ItemT")


def aged(priority: Priority, since_seconds: float, now_seconds: float) -> Priority:
    """Return the class that an item counts as now, after waiting since ``since_seconds``.

    Examples
    --------
    >>> aged(Priority.LOW, 0.0, 61.0), aged(Priority.LOW, 0.0, 1e6)
    (<Priority.HIGH: 2>, <Priority.HIGH: 2>)
    """
    if priority >= AGEING_CEILING:
        return priority
    steps = int(max(0.0, now_seconds - since_seconds) // AGEING_SECONDS)
    return Priority(min(AGEING_CEILING, priority + steps))


class _Entry(Generic[ItemT]):
    __slots__ = ("item", "key", "level", "priority", "since", "stamp")

    def __init__(self, item: ItemT, key: int, priority: Priority, since: float) -> None:
        self.item = item
        self.key = key
        self.priority = priority
        self.since = since
        self.level = priority
        self.stamp = 0


class ClassQueue(Generic[ItemT]):
    """Items by effective class, highest first, then by key, lowest first.

    Keys are unique integers; with keys that grow, a class is first in, first out. Removal and
    change of class are O(1) up to the heap's push: an entry that is overtaken stays behind with an
    old stamp and is passed over when it comes up.

    Examples
    --------
    >>> queue = ClassQueue()
    >>> queue.push("a", 1, Priority.LOW, 0.0); queue.push("b", 2, Priority.HIGH, 0.0)
    >>> queue.pop(0.0), queue.pop(0.0), queue.pop(0.0)
    ('b', 'a', None)
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry[ItemT]] = {}
        self._classes: list[list[tuple[int, int, _Entry[ItemT]]]] = [[] for _ in Priority]
        self._due: list[tuple[float, int, int, _Entry[ItemT]]] = []
        # One count for all entries: a key may come back while its old entries are still in a heap.
        self._stamps = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: int) -> bool:
        return key in self._entries

    def items(self) -> list[ItemT]:
        """Every queued item, in no particular order."""
        return [entry.item for entry in self._entries.values()]

    def push(self, item: ItemT, key: int, priority: Priority, since: float) -> None:
        """Queue an item that has been waiting since ``since`` (seconds of the caller's clock)."""
        entry = _Entry(item, key, priority, since)
        self._entries[key] = entry
        self._place(entry, priority)

    def discard(self, key: int) -> bool:
        """Take an item out of the queue; return whether it was there."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        entry.stamp = -1
        return True

    def reprioritise(self, key: int, priority: Priority, now: float) -> bool:
        """Change an item's own class, keeping its age; return whether it was there."""
        entry = self._entries.get(key)
        if entry is None:
            return False
        entry.priority = priority
        self._place(entry, aged(priority, entry.since, now))
        return True

    def peek(self, now: float) -> tuple[Priority, int, ItemT] | None:
        """Return the effective class, the key and the item that ``pop`` would give, or None."""
        while self._due and self._due[0][0] <= now:
            _, _, stamp, entry = heapq.heappop(self._due)
            if entry.stamp == stamp:
                self._place(entry, aged(entry.priority, entry.since, now))
        for level in reversed(Priority):
            heap = self._classes[level]
            while heap and heap[0][1] != heap[0][2].stamp:
                heapq.heappop(heap)
            if heap:
                entry = heap[0][2]
                return level, entry.key, entry.item
        return None

    def pop(self, now: float) -> ItemT | None:
        """Take the item whose turn it is, or None when the queue is empty."""
        head = self.peek(now)
        if head is None:
            return None
        level, key, item = head
        heapq.heappop(self._classes[level])
        self._entries.pop(key).stamp = -1
        return item

    def _place(self, entry: _Entry[ItemT], level: Priority) -> None:
        entry.level = level
        self._stamps += 1
        entry.stamp = self._stamps
        heapq.heappush(self._classes[level], (entry.key, entry.stamp, entry))
        if level < AGEING_CEILING:
            climbed = level - entry.priority
            due = entry.since + AGEING_SECONDS * (climbed + 1)
            heapq.heappush(self._due, (due, entry.key, entry.stamp, entry))
