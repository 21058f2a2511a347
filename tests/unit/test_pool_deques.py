"""The queue of deques against the queue of heaps, which stays as its oracle."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from wiseflow_nb.pool._deques import SWEEP_ABOVE, DequeQueue
from wiseflow_nb.pool._queue import ClassQueue
from wiseflow_nb.records import Priority


class Item:
    def __init__(self, number: int, priority: Priority, since: float) -> None:
        self._number, self._priority, self._queued_at, self._stamp = number, priority, since, -1


indices = st.integers(0, 10_000)
step = st.one_of(
    st.tuples(st.just("push"), st.sampled_from(Priority)),
    st.tuples(st.just("pop"), st.none()),
    st.tuples(st.just("advance"), st.sampled_from([1.0, 10.0, 30.0, 45.0])),
    st.tuples(st.just("discard"), indices),
    st.tuples(st.just("move"), st.tuples(indices, st.sampled_from(Priority))),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(step, max_size=80), st.booleans())
def test_it_gives_what_the_heaps_give(steps: list[tuple[str, object]], one_class: bool) -> None:
    ours: DequeQueue[Item] = DequeQueue()
    oracle: ClassQueue[Item] = ClassQueue()
    items: list[Item] = []
    now = 0.0
    for what, value in steps:
        if what == "push":
            priority = Priority.NORMAL if one_class else Priority(value)
            items.append(Item(len(items), priority, now))
            ours.push(items[-1])
            oracle.push(items[-1], len(items) - 1, priority, now)
        elif what == "advance":
            now += float(str(value))
        elif what == "pop":
            assert ours.pop(now) is oracle.pop(now)
        elif items and what == "discard":
            item = items[int(str(value)) % len(items)]
            assert ours.discard(item) == oracle.discard(item._number)
        elif items and what == "move":
            index, priority = value  # type: ignore[misc]
            item = items[index % len(items)]
            assert ours.reprioritise(item, priority) == oracle.reprioritise(item._number, priority, now)
        assert len(ours) == len(oracle)
        assert set(ours.items()) == set(oracle.items())
    while (item := ours.pop(now)) is not None:
        assert item is oracle.pop(now)
    assert oracle.pop(now) is None


def test_what_is_cancelled_or_moved_is_not_kept() -> None:
    queue: DequeQueue[Item] = DequeQueue()
    items = [Item(number, Priority(number % 4), 0.0) for number in range(10_000)]
    for item in items:
        queue.push(item)
    for item in items[10:]:
        queue.discard(item)
        assert queue._held <= SWEEP_ABOVE + 2 * len(queue) + 1
    for turn in range(1_000):
        assert queue.reprioritise(items[turn % 10], Priority(turn % 4))
        assert queue._held <= SWEEP_ABOVE + 2 * len(queue) + 1
    held = sum(map(len, queue._lanes)) + sum(map(len, queue._heaps))
    assert held == queue._held
    assert set(queue.items()) == set(items[:10])
