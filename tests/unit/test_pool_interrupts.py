"""An interrupt of the main thread in the midst of a call of the pool: the work is queued or it is not, and all else goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.oracles.pools import SOON, hold
from tests.unit.test_pool_deques import Item
from tests.unit.test_task_interrupts import Interrupt
from tests.unit.test_task_invariants import check_closed_pool
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.pool._deques import SWEEP_ABOVE, DequeQueue
from wiseflow_nb.records import Priority


def refused(self: threading.Thread) -> None:
    raise KeyboardInterrupt


def begun_all_the_same(self: threading.Thread, start: Any = threading.Thread.start) -> None:
    start(self)
    raise KeyboardInterrupt


@pytest.mark.parametrize("start", [refused, begun_all_the_same])
@pytest.mark.parametrize("initialised", [False, True])
def test_a_worker_whose_start_was_interrupted_is_not_counted_on(
    start: Callable[..., None], initialised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = ThreadPoolManager(1, 1, initializer=int if initialised else None)
    ran: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(KeyboardInterrupt):
            pool.submit(ran.append, 1)
    assert pool.stats().submitted == pool.stats().queued == pool.status().workers == 0
    assert pool.submit(pow, 2, 3).result(SOON) == 8
    pool.shutdown()
    assert ran == []
    check_closed_pool(pool)


def test_one_that_was_never_started_does_not_keep_the_pool_from_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ThreadPoolManager(1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(KeyboardInterrupt):
            pool.submit(int)
    pool.shutdown()
    check_closed_pool(pool)


def interrupted_at(number: int, *, busy: bool) -> bool:
    pool = ThreadPoolManager(2, 2)
    ran: list[int] = []
    blockers = [hold(pool)] if busy else []
    interrupt = Interrupt(number)
    future = interrupt.during(lambda: pool.submit(ran.append, 1))
    others = [pool.submit(int) for _ in range(3)]
    assert [other.result(SOON) for other in others] == [0, 0, 0]
    for blocker in blockers:
        blocker.go.set()
    pool.shutdown()
    assert future is None or ran == [1]
    check_closed_pool(pool)
    return interrupt.struck


@pytest.mark.parametrize("busy", [False, True])
def test_a_submit_to_the_pool_is_whole_or_nothing_wherever_an_interrupt_comes(busy: bool) -> None:
    moments = 0
    while interrupted_at(moments + 1, busy=busy):
        moments += 1
    assert moments > 20


def swept_at(number: int) -> bool:
    queue: DequeQueue[Item] = DequeQueue()
    items = [Item(index, Priority(index % 4), float(index)) for index in range(2 * SWEEP_ABOVE + 40)]
    for item in items:
        queue.push(item)
    for item in items[::3]:
        queue.reprioritise(item, Priority.HIGH)
    interrupt = Interrupt(number)

    def discard() -> None:
        for item in items[20:]:
            queue.discard(item)

    interrupt.during(discard)
    for item in items[20:]:
        queue.discard(item)
    assert {item._number for item in queue.items()} == set(range(20))
    assert len(queue) == 20
    taken = [queue.pop(1e9) for _ in range(20)]
    assert None not in taken
    assert queue.pop(1e9) is None
    return interrupt.struck


def test_a_queue_that_is_swept_loses_nothing_wherever_an_interrupt_comes() -> None:
    moments = 0
    while swept_at(moments + 1):
        moments += 1
    assert moments > 20
