"""The pool's lean future, its way into asyncio, and what becomes of a pool that is dropped or forked."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import pytest

from tests.oracles.pools import SOON, check_closed, eventually, hold
from tests.oracles.scripts import run_script
from wiseflow_nb.context import current_task
from wiseflow_nb.futures import to_asyncio
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.pool._future import PoolFuture


@pytest.fixture
def one() -> Iterator[ThreadPoolManager]:
    with ThreadPoolManager(1, 1) as pool:
        yield pool
    check_closed(pool)


# -- lean -------------------------------------------------------------------------------------


def test_a_condition_is_made_only_for_those_who_wait(one: ThreadPoolManager) -> None:
    blocker = hold(one)
    futures = [one.submit(int) for _ in range(3)]
    wait(futures[2:], 0)
    blocker.go.set()
    assert futures[0].result(SOON) == 0
    one.submit(int).result(SOON)
    assert isinstance(futures[1], PoolFuture)
    assert futures[1].done()
    assert futures[1]._condition_made is None
    assert futures[1]._context is None
    assert "int" in repr(futures[1])
    assert "finished" in repr(futures[1])
    assert vars(futures[1]) == {}


def test_the_context_of_a_task_is_its_own_wherever_it_travels(one: ThreadPoolManager) -> None:
    def work() -> tuple[Any, contextvars.Context]:
        return current_task(), contextvars.copy_context()

    first, its_variables = one.options(name="first").submit(work).result(SOON)
    second, _ = one.options(name="second").submit(work).result(SOON)
    assert (first.name, second.name) == ("first", "second")
    assert its_variables.run(current_task) is first
    assert current_task() is None
    seen: list[Any] = []
    one.submit(int).add_done_callback(lambda _: seen.append(current_task()))
    eventually(lambda: len(seen) == 1)
    assert seen == [None]


def test_what_callbacks_and_freed_results_cost_is_no_tasks_cpu_time(one: ThreadPoolManager) -> None:
    def burn(_: object = None) -> None:
        end = time.thread_time_ns() + 40_000_000
        while time.thread_time_ns() < end:
            pass

    class Costly:
        def __del__(self) -> None:
            burn()

    blocker = hold(one)
    one.options(name="burns").submit(burn)
    one.options(name="after it").submit(lambda: None)
    one.submit(int).add_done_callback(burn)
    one.options(name="after a callback").submit(lambda: None)
    one.submit(Costly)
    one.options(name="after a result").submit(lambda: None)
    cleaned = one.options(cleanup=burn).submit(operator_fails)
    one.options(name="after a cleanup").submit(lambda: None).add_done_callback(lambda _: None)
    blocker.go.set()
    one.submit(int).result(SOON)
    assert isinstance(cleaned.exception(), ZeroDivisionError)
    frame = one.records().set_index("name")
    assert frame.loc["burns", "cpu_seconds"] >= 0.04
    for name in ("after it", "after a callback", "after a result", "after a cleanup"):
        assert frame.loc[name, "cpu_seconds"] < 0.02


def operator_fails() -> float:
    return 1 / 0


def test_figures_are_there_when_the_result_is() -> None:
    with ThreadPoolManager(4, 4) as pool:
        for count in range(1, 300):
            pool.submit(int).result(SOON)
            assert pool.stats().completed == count
            assert len(pool._crew.records()) == count


def test_a_finaliser_may_use_the_pool(one: ThreadPoolManager) -> None:
    submitted: list[Future[Any]] = []

    class Submits:
        def __init__(self) -> None:
            self.me = self  # only the collector finds it

        def __del__(self) -> None:
            submitted.append(one.submit(int))
            submitted[-1].cancel()

    threshold = gc.get_threshold()
    gc.set_threshold(10)
    try:
        futures = [one.submit(lambda: Submits() and None) for _ in range(300)]
        assert not wait(futures, SOON).not_done
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert len(submitted) >= 299
    assert not wait(submitted, SOON).not_done


# -- asyncio ----------------------------------------------------------------------------------


def test_await_gives_results_errors_and_cancels(one: ThreadPoolManager) -> None:
    async def main() -> None:
        assert await one.submit(pow, 2, 3) == 8  # type: ignore[misc]
        with pytest.raises(ZeroDivisionError):
            await one.submit(operator_fails)  # type: ignore[misc]
        blocker = hold(one)
        loop = asyncio.get_running_loop()
        waiting = loop.create_task(_await(one.submit(int)))
        queued = one.submit(int)
        other = loop.create_task(_await(queued))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert one.stats().cancelled == 1
        assert queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await other
        blocker.go.set()

        def stops() -> None:
            raise StopIteration(5)

        with pytest.raises(RuntimeError, match="StopIteration"):
            await one.submit(stops)  # type: ignore[misc]
        done = one.submit(int)
        done.result(SOON)
        assert await to_asyncio(done) == 0
        assert await asyncio.wrap_future(one.submit(abs, -1)) == 1
        assert await loop.run_in_executor(one, abs, -2) == 2

    asyncio.run(main())


async def _await(future: Any) -> Any:
    return await future


def test_results_in_quick_succession_wake_the_loop_once(one: ThreadPoolManager) -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        calls = 0
        inner = loop.call_soon_threadsafe

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return inner(*args, **kwargs)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        blocker = hold(one)
        targets = [to_asyncio(one.submit(abs, -number)) for number in range(500)]
        last = one.submit(int)
        blocker.go.set()
        # The loop stands still meanwhile, as it does under a busy cell.
        last.result(SOON)
        assert await asyncio.gather(*targets) == list(range(500))
        return calls

    assert asyncio.run(main()) == 1


def test_a_closed_loop_and_many_loops(one: ThreadPoolManager) -> None:
    blocker = hold(one)
    loop = asyncio.new_event_loop()
    future = one.submit(int)
    target = to_asyncio(future, loop)
    loop.close()
    blocker.go.set()
    assert future.result(SOON) == 0
    one.submit(int).result(SOON)
    assert not target.done()

    async def main() -> int:
        return sum(await asyncio.gather(*(to_asyncio(one.submit(abs, -1)) for _ in range(50))))

    sums: list[int] = []
    threads = [threading.Thread(target=lambda: sums.append(asyncio.run(main()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert sums == [50] * 4


def test_to_asyncio_of_a_future_that_never_starts() -> None:
    async def main() -> None:
        future: Future[int] = Future()
        target = to_asyncio(future)
        target.cancel()
        await asyncio.sleep(0)
        assert future.cancelled()
        with pytest.raises(CancelledError):
            future.result(0)

    asyncio.run(main())
    with pytest.raises(RuntimeError):
        to_asyncio(Future())


# -- dropped, forked --------------------------------------------------------------------------


def test_a_dropped_pool_ends_its_queued_work_and_then_its_workers() -> None:
    before = set(threading.enumerate())
    pool = ThreadPoolManager(3, 3)
    gate = threading.Event()
    ran: list[int] = []
    futures = [pool.submit(gate.wait, SOON) for _ in range(3)]
    futures += [pool.submit(ran.append, number) for number in range(20)]
    threads = [thread for thread in threading.enumerate() if thread not in before]
    dead = weakref.ref(pool)
    del pool
    gc.collect()
    assert dead() is None
    gate.set()
    assert not wait(futures, SOON).not_done
    assert sorted(ran) == list(range(20))
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()


def test_idle_workers_end_with_their_pool_in_whatever_thread_it_is_collected() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(60):
            before = set(threading.enumerate())
            pool = ThreadPoolManager(2, 2)
            pool.submit(int)
            pool.submit(int).result(SOON)
            threads = [thread for thread in threading.enumerate() if thread not in before]
            kept = [pool]
            del pool
            dropper = threading.Thread(target=kept.clear)
            dropper.start()
            dropper.join(SOON)
            for thread in threads:
                thread.join(SOON)
                assert not thread.is_alive()
    finally:
        sys.setswitchinterval(interval)


def test_a_pool_that_is_collected_while_a_worker_lies_down_is_noticed() -> None:
    pool = ThreadPoolManager(1, 1)
    crew = pool._crew

    class Listing(list[Any]):
        def append(self, worker: Any) -> None:
            crew._abandon(None)  # just before it is listed, so that no bell is rung for it
            super().append(worker)

    crew._idle = Listing()
    assert pool.submit(abs, -1).result(SOON) == 1
    crew.join(time.monotonic() + SOON)
    assert crew.workers == 0


def test_a_view_keeps_its_pool() -> None:
    view = ThreadPoolManager(1, 1).options(priority="high")
    gc.collect()
    assert view.submit(abs, -4).result(SOON) == 4
    crew = view._pool._crew
    del view
    gc.collect()
    crew.join(time.monotonic() + SOON)
    assert crew.workers == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_a_working_pool_and_ends() -> None:
    script = """
import os, threading
from wiseflow_nb.pool import ThreadPoolManager
pool = ThreadPoolManager(2, 2)
entered, go = threading.Event(), threading.Event()
def held():
    entered.set()
    go.wait(60)
futures = [pool.submit(held) for _ in range(2)]
entered.wait(60)
queued = pool.submit(print, "in the parent only", flush=True)
with pool._crew.lock:  # as another thread of the parent may hold it
    child = os.fork()
if child == 0:
    import sys
    assert pool.status().workers == 0
    assert pool.submit(pow, 2, 5).result(60) == 32
    print("child", flush=True)
    sys.exit(0)
_, status = os.waitpid(child, 0)
go.set()
pool.shutdown()
print("parent", os.waitstatus_to_exitcode(status), queued.done(), flush=True)
"""
    done = run_script(script)
    assert done.stdout.split("\n")[:-1] == ["child", "in the parent only", "parent 0 True"]
