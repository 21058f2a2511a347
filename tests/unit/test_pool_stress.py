"""The pool under all its operations at once, at many switch intervals: nothing lost, run twice or out of order."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, as_completed, wait
from typing import Any

import pytest

from tests.oracles.pools import POOLS, SOON, check, check_closed, eventually
from wiseflow_nb.context import current_task
from wiseflow_nb.pool import ThreadPoolManager

INTERVALS = [1e-6, 1e-5, 1e-4, 5e-3]


@pytest.fixture(params=INTERVALS)
def interval(request: pytest.FixtureRequest) -> Iterator[float]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(request.param)
    yield request.param
    sys.setswitchinterval(before)


@pytest.fixture(params=POOLS)
def make(request: pytest.FixtureRequest) -> type[Any]:
    return POOLS[request.param]


def together(*calls: Any) -> None:
    """Run the calls at once, each on a thread of its own; raise what one raised."""
    problems: list[BaseException] = []
    start = threading.Barrier(len(calls))

    def run(call: Any) -> None:
        try:
            start.wait(SOON)
            call()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * SOON)
        assert not thread.is_alive(), "a thread hangs"
    for problem in problems:
        raise problem


@pytest.mark.parametrize("seed", range(3))
def test_everything_at_once(make: type[Any], interval: float, seed: int) -> None:
    pool = make(1, 6)
    runs: dict[int, int] = {}
    futures: dict[int, Future[int]] = {}
    over = threading.Event()

    def work(number: int) -> int:
        runs[number] = runs.get(number, 0) + 1
        if number % 11 == 0:
            assert current_task() is not None
        if number % 13 == 0:
            raise LookupError(number)
        return number

    def submit(which: int) -> None:
        choose = random.Random(seed * 10 + which)
        for i in range(150):
            number = which * 1000 + i
            future = pool.options(priority=choose.randrange(4)).submit(work, number)
            futures[number] = future
            if choose.random() < 0.2:
                future.cancel()
            elif choose.random() < 0.2:
                pool.reprioritise(future, choose.randrange(4))
            elif choose.random() < 0.1:
                pool.cancel_running(future)
            elif choose.random() < 0.1:
                wait([future], SOON)

    def resize() -> None:
        choose = random.Random(seed)
        while not over.is_set():
            pool.resize(choose.randrange(1, 7))
            if choose.random() < 0.3:
                pool.set_bounds(1, choose.randrange(1, 7))
            over.wait(0.001)
        pool.set_bounds(1, 6)

    def look() -> None:
        while not over.is_set():
            check_consistent(pool)
            for future in list(futures.values())[-5:]:
                assert not (future.running() and future.cancelled())
            over.wait(0.001)

    def submit_all() -> None:
        try:
            together(*(lambda which=which: submit(which) for which in range(3)))
        finally:
            over.set()

    together(submit_all, resize, look)
    pool.shutdown()
    check_closed(pool)
    assert len(futures) == 450
    for number, future in futures.items():
        assert future.done()
        assert runs.get(number, 0) == (0 if future.cancelled() else 1)
        if not future.cancelled():
            assert (future.exception(0) is not None) == (number % 13 == 0)
    stats = pool.stats()
    assert stats.submitted == 450
    assert stats.cancelled == sum(future.cancelled() for future in futures.values())
    assert len(pool.records()) == 450


def check_consistent(pool: Any) -> None:
    stats = pool.stats()
    assert stats.submitted == stats.completed + stats.failed + stats.cancelled + stats.queued + stats.running


def test_one_worker_keeps_the_order_of_each_submitter(make: type[Any], interval: float) -> None:
    ran: list[tuple[int, int]] = []
    with make(1, 1) as pool:
        together(
            *(lambda which=which: [pool.submit(ran.append, (which, i)) for i in range(200)] for which in range(3)),
            lambda: [pool.resize(1) for _ in range(50)],
        )
    for which in range(3):
        assert [i for who, i in ran if who == which] == list(range(200))


def test_no_wake_up_is_lost(make: type[Any], interval: float) -> None:
    # One call at a time, so that the workers fall asleep between any two.
    with make(1, 3) as pool:

        def chain() -> None:
            for i in range(200):
                assert pool.submit(abs, -i).result(SOON) == i

        together(chain, chain, chain)


def test_as_many_run_at_once_as_there_is_room_for(interval: float) -> None:
    with ThreadPoolManager(1, 4) as pool:
        for _ in range(25):
            barrier = threading.Barrier(4)
            futures = [pool.submit(barrier.wait, SOON) for _ in range(4)]
            assert sorted(future.result(SOON) for future in futures) == [0, 1, 2, 3]
            check(pool)


def test_cancel_and_start_race(interval: float) -> None:
    with ThreadPoolManager(1, 2) as pool:
        for _ in range(150):
            ran: list[int] = []
            future = pool.submit(ran.append, 1)
            won: list[bool] = []
            together(lambda: won.append(future.cancel()), lambda: won.append(future.cancel()))  # noqa: B023
            wait([future], SOON)
            assert won[0] == won[1] == future.cancelled()
            eventually(lambda: len(ran) == (0 if won[0] else 1))  # noqa: B023


def test_waiting_begins_while_work_ends(interval: float) -> None:
    with ThreadPoolManager(2, 2) as pool:
        for turn in range(60):
            futures = [pool.submit(abs, number) for number in range(12)]
            if turn % 3 == 0:
                futures[6].cancel()
            called: list[Any] = []

            def by_result() -> None:
                for future in futures:  # noqa: B023
                    try:
                        future.result(SOON)
                    except CancelledError:
                        assert future is futures[6]  # noqa: B023

            def by_callback() -> None:
                for future in futures:  # noqa: B023
                    future.add_done_callback(called.append)  # noqa: B023

            together(
                lambda: wait(futures, SOON).not_done and pytest.fail("wait"),  # noqa: B023
                lambda: list(as_completed(futures, SOON)),  # noqa: B023
                by_result,
                by_callback,
            )
            eventually(lambda: len(called) == 12)  # noqa: B023


def test_nested_waits_with_blocked_never_stand_still(interval: float) -> None:
    with ThreadPoolManager(1, 1) as pool:

        def outer(depth: int) -> int:
            if not depth:
                return 0
            with pool.blocked():
                return 1 + pool.submit(outer, depth - 1).result(SOON)

        for _ in range(10):
            assert [future.result(SOON) for future in [pool.submit(outer, 4) for _ in range(4)]] == [4] * 4
        eventually(lambda: pool.status().workers <= 1)
