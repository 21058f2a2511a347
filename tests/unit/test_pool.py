"""The pool with real threads; nothing sleeps, events say when."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, as_completed, wait
from concurrent.futures.thread import BrokenThreadPool
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles.pools import POOLS, SOON, Blocker, check, check_closed, eventually, hold
from wiseflow_nb.context import check_cancelled, current_task
from wiseflow_nb.errors import PoolClosedError, TaskCancelledError, UsageError
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.pool._queue import ClassQueue, aged
from wiseflow_nb.records import Priority
from wiseflow_nb.testing import FakeClock


@pytest.fixture(params=POOLS)
def make(request: pytest.FixtureRequest) -> type[Any]:
    return POOLS[request.param]


@pytest.fixture
def one(make: type[Any]) -> Iterator[Any]:
    pool = make(1, 1)
    yield pool
    check(pool)
    pool.shutdown()
    check_closed(pool)


def until(pool: Any, workers: int) -> None:
    eventually(lambda: pool.status().workers == workers)


def test_classes_and_order_within(one: Any) -> None:
    blocker, ran = hold(one), []
    names = ["low", "high", "critical", "normal"] * 2
    futures = [one.options(priority=name).submit(ran.append, (name, i)) for i, name in enumerate(names)]
    assert one.status().queued == 8
    assert one.pending == 9
    blocker.go.set()
    wait(futures, SOON)
    expected = [
        (name, i) for name in ("critical", "high", "normal", "low") for i, item in enumerate(names) if item == name
    ]
    assert ran == expected


def test_waiting_lifts_one_class_per_30_seconds_up_to_high(make: type[Any]) -> None:
    clock = FakeClock()
    with make(1, 1, clock=clock) as pool:
        blocker, ran = hold(pool), []
        pool.options(priority="low").submit(ran.append, "old low")
        clock.advance(61)
        for name in ("high", "critical", "low"):
            pool.options(priority=name).submit(ran.append, name)
        blocker.go.set()
    assert ran == ["critical", "old low", "high", "low"]
    frame = pool.records()
    assert frame.loc[frame["name"] == "list.append", "queue_seconds"].max() == 61


def test_reprioritise_moves_queued_work_only(one: Any) -> None:
    blocker, ran = hold(one), []
    first = one.submit(ran.append, 1)
    second = one.submit(ran.append, 2)
    assert one.reprioritise(second, "critical")
    blocker.go.set()
    wait([first, second], SOON)
    assert ran == [2, 1]
    assert not one.reprioritise(second, "low")
    assert not one.reprioritise(Future(), "low")
    with pytest.raises(UsageError, match="low, normal, high, critical"):
        one.reprioritise(second, "urgent")


def test_cancel_takes_queued_work_out_at_once(one: Any) -> None:
    blocker, told = hold(one), []
    future = one.submit(told.append, "ran")
    future.add_done_callback(lambda item: told.append(item.cancelled()))
    assert future.cancel()
    assert future.cancel()
    assert one.status().queued == 0
    assert list(as_completed([future], SOON)) == [future]
    with pytest.raises(CancelledError):
        future.result(0)
    blocker.go.set()
    assert told == [True]
    assert one.stats().cancelled == 1


def test_running_work_is_asked_to_stop_and_holds_its_worker(one: Any) -> None:
    entered = threading.Event()

    def work() -> None:
        entered.set()
        context = current_task()
        assert context is not None
        assert context.token.wait(SOON)
        check_cancelled()

    future = one.submit(work)
    assert entered.wait(SOON)
    assert not future.cancel()
    assert one.cancel_running(future, "no use")
    with pytest.raises(TaskCancelledError, match="no use"):
        future.result(SOON)
    assert not one.cancel_running(future)
    assert one.records()["state"].tolist() == ["cancelled"]


def test_growing_starts_workers_and_shrinking_lets_work_end(make: type[Any]) -> None:
    pool = make(1, 4)
    assert pool.resize(1, "small") == 1
    blockers = [Blocker() for _ in range(3)]
    futures = [pool.submit(blocker) for blocker in blockers]
    assert blockers[0].entered.wait(SOON)
    assert pool.status().workers == 1
    assert pool.resize(99, "all") == 4
    assert all(blocker.entered.wait(SOON) for blocker in blockers)
    assert (pool.status().workers, pool.status().reason) == (3, "all")
    ran: list[int] = []
    later = [pool.submit(ran.append, i) for i in range(20)]
    assert not wait(later[:1], SOON).not_done  # a fourth worker came with the work
    assert pool.resize(1) == 1
    until(pool, 3)
    assert all(future.running() for future in futures)
    for blocker in blockers:
        blocker.go.set()
    wait(later, SOON)
    until(pool, 1)
    assert ran == list(range(20))
    pool.set_bounds(2, 3)
    assert (pool.target, pool.status().min_workers, pool.status().max_workers) == (2, 2, 3)
    check(pool)
    pool.shutdown()
    check_closed(pool)


@pytest.mark.parametrize("bounds", [(0, 1), (3, 2)])
def test_bounds_that_do_not_fit_change_nothing(make: type[Any], one: Any, bounds: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="bounds"):
        one.set_bounds(*bounds)
    with pytest.raises(UsageError, match="bounds"):
        make(*bounds)
    with pytest.raises(UsageError, match="at least 1"):
        one.resize(0)
    assert one.target == 1


def test_a_waiting_worker_is_made_up_for(one: Any) -> None:
    def outer(depth: int) -> int:
        if not depth:
            return 0
        with one.blocked():
            return 1 + one.submit(outer, depth - 1).result(SOON)

    assert one.submit(outer, 5).result(SOON) == 5
    until(one, 1)
    with one.blocked():
        assert one.status().workers == 1


def test_shutdown_drains_or_cancels(make: type[Any]) -> None:
    pool = make(1, 1)
    blocker = hold(pool)
    futures = [pool.submit(int) for _ in range(3)]
    pool.shutdown(wait=False)
    with pytest.raises(PoolClosedError, match="shut down"):
        pool.submit(int)
    blocker.go.set()
    pool.shutdown()
    assert [future.result(0) for future in futures] == [0, 0, 0]
    check_closed(pool)
    pool = make(1, 1)
    blocker = hold(pool)
    futures = [pool.submit(int) for _ in range(3)]
    pool.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in futures)
    blocker.go.set()
    pool.shutdown()
    check_closed(pool)


def test_cpu_time_is_the_threads_own(one: Any) -> None:
    def burn() -> None:
        end = time.thread_time_ns() + 60_000_000
        while time.thread_time_ns() < end:
            pass

    one.options(name="burn").submit(burn).result(SOON)
    one.options(name="idle").submit(threading.Event().wait, 0.2).result(SOON)
    frame = one.records().set_index("name")
    assert frame.loc["burn", "cpu_seconds"] >= 0.06
    assert frame.loc["burn", "wall_seconds"] >= 0.06
    assert frame.loc["idle", "wall_seconds"] >= 0.19
    assert frame.loc["idle", "cpu_seconds"] < 0.1
    assert set(frame["cpu_source"]) == {"thread_time"}
    assert str(frame["started"].dt.tz) == "UTC"


def test_cleanup_runs_on_failure_only(one: Any, caplog: pytest.LogCaptureFixture) -> None:
    ran: list[str] = []

    def fails() -> None:
        context = current_task()
        assert context is not None
        context.push_cleanup(ran.append, "pushed")
        raise KeyError("x")

    async def asynchronous() -> None:
        ran.append("own")
        raise OSError("mask")

    assert isinstance(one.options(cleanup=asynchronous).submit(fails).exception(SOON), KeyError)
    assert one.options(cleanup=lambda: ran.append("never")).submit(int).result(SOON) == 0
    assert ran == ["pushed", "own"]
    assert one.stats().cleanup_failures == 1
    assert "cleanup handler" in caplog.text


def test_nothing_keeps_arguments_and_results_alive(one: Any) -> None:
    class Big:
        pass

    argument = Big()
    dead = weakref.ref(argument)
    future = one.submit(lambda item: type(item)(), argument)
    result = weakref.ref(future.result(SOON))
    del argument
    one.submit(int).result(SOON)
    gc.collect()
    assert dead() is None
    assert result() is not None
    del future
    gc.collect()
    assert result() is None


def test_a_failing_initializer_breaks_the_pool(make: type[Any], caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> None:
        raise OSError("no licence")

    pool = make(1, 1, initializer=fails)
    future = pool.submit(int)
    assert isinstance(future.exception(SOON), BrokenThreadPool)
    with pytest.raises(BrokenThreadPool):
        pool.submit(int)
    pool.shutdown()
    check_closed(pool)
    assert "no licence" in caplog.text


def test_whatever_takes_an_executor_takes_it(make: type[Any]) -> None:
    with make(2, 2, thread_name_prefix="mine", initializer=lambda x: None, initargs=(1,)) as pool:
        assert list(pool.map(pow, [2, 3], [3, 2])) == [8, 9]
        view = pool.options(priority="low")
        assert list(view.map(abs, [-1, -2])) == [1, 2]
        with view:
            pass

        async def main() -> int:
            return await asyncio.get_running_loop().run_in_executor(pool, abs, -3)

        assert asyncio.run(main()) == 3
        assert pool.submit(lambda: threading.current_thread().name).result(SOON).startswith("mine-")
        assert "busy=" in repr(pool)
        assert pool._max_workers == view._max_workers == 2
    check_closed(pool)


def test_nothing_is_lost_or_run_twice_under_stress(make: type[Any]) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        pool = make(1, 8)
        ran: list[int] = []
        futures: list[list[Future[None]]] = [[] for _ in range(4)]

        def submit(which: int) -> None:
            for i in range(200):
                futures[which].append(pool.options(priority=i % 4).submit(ran.append, which * 1000 + i))
                if i % 7 == 0:
                    pool.resize(1 + (i % 8))
                if i % 5 == 0:
                    futures[which][-1].cancel()

        threads = [threading.Thread(target=submit, args=(which,)) for which in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pool.shutdown()
    finally:
        sys.setswitchinterval(interval)
    expected = [w * 1000 + i for w in range(4) for i in range(200) if not futures[w][i].cancelled()]
    assert sorted(ran) == expected
    assert all(future.done() for several in futures for future in several)
    check_closed(pool)


def test_ageing() -> None:
    assert [aged(Priority.LOW, 0, t) for t in (0, 29.9, 30, 60, 1e9)] == [0, 0, 1, 2, 2]
    assert aged(Priority.CRITICAL, 0, 1e9) is Priority.CRITICAL
    assert aged(Priority.LOW, 100, 0) is Priority.LOW


operation = st.one_of(
    st.tuples(st.just("push"), st.sampled_from(Priority)),
    st.tuples(st.just("pop"), st.none()),
    st.tuples(st.just("again"), st.integers(0, 30)),
    st.tuples(st.just("advance"), st.sampled_from([1, 10, 30, 45])),
    st.tuples(st.just("discard"), st.integers(0, 30)),
    st.tuples(st.just("move"), st.tuples(st.integers(0, 30), st.sampled_from(Priority))),
)


@given(st.lists(operation, max_size=60))
def test_the_queue_agrees_with_a_sorted_list(operations: list[tuple[str, object]]) -> None:
    queue: ClassQueue[int] = ClassQueue()
    model: dict[int, tuple[Priority, float]] = {}
    now, key = 0.0, 0
    for what, value in operations:
        if what == "push":
            assert isinstance(value, Priority)
            key += 1
            queue.push(key, key, value, now)
            model[key] = (value, now)
        elif what == "again":
            if value not in model:
                queue.push(value, value, Priority.LOW, now)  # type: ignore[arg-type]
                model[value] = (Priority.LOW, now)  # type: ignore[index]
                key = max(key, value)  # type: ignore[call-overload]
        elif what == "advance":
            now += value  # type: ignore[operator]
        elif what == "discard":
            assert queue.discard(value) == (model.pop(value, None) is not None)  # type: ignore[arg-type, call-overload]
        elif what == "move":
            which, priority = value  # type: ignore[misc]
            assert queue.reprioritise(which, priority, now) == (which in model)
            if which in model:
                model[which] = (priority, model[which][1])
        else:
            expected = min(model, key=lambda k: (-aged(*model[k], now), k), default=None)
            assert queue.pop(now) == expected
            model.pop(expected, None)  # type: ignore[arg-type]
        assert len(queue) == len(model)


def test_released_workers_end_and_come_back_with_work() -> None:
    with ThreadPoolManager(max_workers=3) as pool:
        gate = threading.Event()
        running = [pool.submit(gate.wait, 30) for _ in range(2)]
        assert pool.submit(int).result(30) == 0
        eventually(lambda: pool.status().workers == 3 and pool.status().busy == 2)
        pool.release()
        eventually(lambda: pool.status().workers == 2)
        gate.set()
        assert all(future.result(30) for future in running)
        pool.release()
        eventually(lambda: pool.status().workers == 0)
        assert [future.result(30) for future in [pool.submit(abs, -number) for number in range(50)]] == list(range(50))
