"""What the standard library demands of its executors, demanded of both pools."""

from __future__ import annotations

import gc
import itertools
import operator
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    CancelledError,
    Executor,
    Future,
    InvalidStateError,
    as_completed,
    wait,
)
from concurrent.futures.thread import BrokenThreadPool
from typing import Any

import pytest

from tests.oracles.pools import POOLS, SOON, Blocker, check_closed, eventually, hold
from wiseflow_nb.errors import PoolClosedError
from wiseflow_nb.pool import ThreadPoolManager


@pytest.fixture(params=POOLS)
def make(request: pytest.FixtureRequest) -> type[Any]:
    return POOLS[request.param]


@pytest.fixture
def pool(make: type[Any]) -> Iterator[Any]:
    with make(2, 4) as made:
        yield made
    check_closed(made)


@pytest.fixture
def one(make: type[Any]) -> Iterator[Any]:
    with make(1, 1) as made:
        yield made
    check_closed(made)


class ThingError(Exception):
    """An error that can be weakly referenced."""


class Thing:
    def ident(self, *_: object) -> None:
        return None

    def fails(self) -> None:
        raise ThingError


def identity(*args: object, **kwargs: object) -> tuple[Any, Any]:
    return args, kwargs


# -- submit and map ---------------------------------------------------------------------------


def test_it_is_an_executor_of_futures(pool: Any) -> None:
    assert isinstance(pool, Executor)
    future = pool.submit(pow, 2, 8)
    assert isinstance(future, Future)
    assert future.result(SOON) == 256
    assert future.exception(0) is None
    assert (future.done(), future.running(), future.cancelled(), future.cancel()) == (True, False, False, False)


def test_every_keyword_reaches_the_call(pool: Any) -> None:
    assert pool.submit(identity, 1, fn=2, self=3).result(SOON) == ((1,), {"fn": 2, "self": 3})
    assert pool.options(name="x").submit(identity, priority=1).result(SOON) == ((), {"priority": 1})
    with pytest.raises(TypeError):
        pool.submit()
    with pytest.raises(TypeError):
        pool.submit(fn=pow)


def test_map_keeps_the_order_and_raises_in_its_place(pool: Any) -> None:
    assert list(pool.map(pow, range(10), range(10))) == list(map(pow, range(10), range(10)))
    assert list(pool.map(pow, range(40), range(40), chunksize=3)) == list(map(pow, range(40), range(40)))
    results = pool.map(divmod, [1, 1, 1, 1], [2, 3, 0, 5])
    assert [next(results), next(results)] == [(0, 1), (0, 1)]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_submits_before_it_is_iterated(one: Any) -> None:
    finished: list[int] = []
    one.map(finished.append, range(10))
    one.shutdown(wait=True)
    assert finished == list(range(10))


def test_map_with_a_timeout_gives_what_there_is_and_cancels_the_rest(one: Any) -> None:
    blocker = Blocker()
    results = one.map(lambda call: call(), [lambda: "first", blocker, lambda: "third"], timeout=0.5)
    assert next(results) == "first"
    assert blocker.entered.wait(SOON)
    with pytest.raises(TimeoutError):
        next(results)
    assert one.stats().cancelled == 1
    blocker.go.set()


def test_a_map_over_its_time_says_so_in_its_own_words() -> None:
    def own() -> None:
        raise TimeoutError("its own")

    with ThreadPoolManager(1, 1) as pool:
        for executor in (pool, pool.options(name="view")):
            blocker = Blocker()
            results = executor.map(lambda call: call(), [str, blocker, str], timeout=0.05)
            assert next(results) == ""
            with pytest.raises(TimeoutError, match=r"map of .*lambda.* timeout of 0.05 s with 1 of 3 results"):
                next(results)
            blocker.go.set()
            with pytest.raises(TimeoutError, match=r"^its own$"):
                list(executor.map(lambda call: call(), [own], timeout=SOON))


def test_an_unread_map_leaves_nothing_queued(one: Any) -> None:
    blocker = hold(one)
    results = one.map(abs, range(10))
    assert one.status().queued == 10
    with pytest.raises(TimeoutError):
        next(one.map(abs, [1], timeout=0))
    del results
    blocker.go.set()


# -- shutdown ---------------------------------------------------------------------------------


def test_nothing_is_taken_after_shutdown(pool: Any) -> None:
    pool.shutdown()
    pool.shutdown(wait=False)
    with pytest.raises(PoolClosedError):
        pool.submit(int)
    with pytest.raises(RuntimeError, match="shut down"):
        pool.map(abs, [1])
    with pytest.raises(PoolClosedError):
        pool.options(priority="low").submit(int)


def test_shutdown_waits_for_queued_work_and_threads(make: type[Any]) -> None:
    pool = make(3, 3)
    before = set(threading.enumerate())
    gate = threading.Event()
    futures = [pool.submit(gate.wait, SOON) for _ in range(9)]
    eventually(lambda: pool.status().workers == 3)
    threads = set(threading.enumerate()) - before
    gate.set()
    pool.shutdown()
    assert all(future.done() and future.result() for future in futures)
    assert not any(thread.is_alive() for thread in threads)
    check_closed(pool)


def test_shutdown_can_cancel_what_is_queued(make: type[Any]) -> None:
    pool = make(2, 2)
    gate = threading.Event()
    futures = [pool.submit(gate.wait, SOON) for _ in range(50)]
    eventually(lambda: pool.status().busy == 2)
    pool.shutdown(wait=False, cancel_futures=True)
    gate.set()
    pool.shutdown()
    assert sum(future.cancelled() for future in futures) == 48
    assert sum(not future.cancelled() and future.result(0) is True for future in futures) == 2
    check_closed(pool)


def test_shutdown_from_a_worker_and_without_waiting(make: type[Any]) -> None:
    pool = make(1, 1)
    future = pool.submit(pool.shutdown)
    later = []
    assert future.result(SOON) is None
    with pytest.raises(PoolClosedError):
        later.append(pool.submit(int))
    pool.shutdown()
    check_closed(pool)


def test_a_shutdown_in_the_midst_of_submits_loses_none(make: type[Any]) -> None:
    for _ in range(30):
        pool = make(2, 2)
        ran: list[int] = []
        taken: list[list[Future[None]]] = [[], [], []]
        refused = [0, 0, 0]
        start = threading.Barrier(4)

        def submit(which: int) -> None:
            start.wait(SOON)  # noqa: B023
            for i in range(60):
                try:
                    taken[which].append(pool.submit(ran.append, i))  # noqa: B023
                except PoolClosedError:
                    refused[which] += 1  # noqa: B023

        threads = [threading.Thread(target=submit, args=(which,)) for which in range(3)]
        for thread in threads:
            thread.start()
        start.wait(SOON)
        pool.shutdown(wait=True)
        for thread in threads:
            thread.join(SOON)
        pool.shutdown(wait=True)
        futures = list(itertools.chain(*taken))
        assert len(futures) + sum(refused) == 180
        assert all(future.done() for future in futures)
        assert len(ran) == len(futures)
        check_closed(pool)


def test_names_of_threads(make: type[Any]) -> None:
    with make(2, 2, thread_name_prefix="named") as pool:
        names = {pool.submit(lambda: threading.current_thread().name).result(SOON) for _ in range(5)}
    assert all(name.startswith("named-") for name in names)


# -- references -------------------------------------------------------------------------------


def test_no_reference_outlives_the_end(pool: Any) -> None:
    thing = Thing()
    gone = threading.Event()
    dead = weakref.ref(thing, lambda _: gone.set())
    future = pool.submit(thing.ident, thing)
    del thing
    assert gone.wait(SOON)
    assert dead() is None
    assert future.result(SOON) is None


def test_a_result_and_an_error_die_with_their_future(one: Any) -> None:
    future = one.submit(Thing)
    dead = weakref.ref(future.result(SOON))
    del future
    eventually(lambda: dead() is None)

    future = one.submit(Thing().fails)
    error = future.exception(SOON)
    assert error is not None
    dead_error = weakref.ref(error)
    with pytest.raises(ThingError):
        future.result()
    gc.disable()
    try:
        del future, error
        # Not even the collector was needed: nothing holds a frame that holds the error.
        if isinstance(one, ThreadPoolManager):
            eventually(lambda: dead_error() is None)
    finally:
        gc.enable()
    gc.collect()
    eventually(lambda: dead_error() is None)


def test_map_and_as_completed_keep_no_yielded_result(pool: Any) -> None:
    for thing in pool.map(lambda _: Thing(), range(6)):
        dead = weakref.ref(thing)
        del thing
        eventually(lambda: dead() is None)  # noqa: B023
    futures = [pool.submit(Thing) for _ in range(4)]
    for future in as_completed(futures, SOON):
        futures.remove(future)
        dead = weakref.ref(future)
        del future
        eventually(lambda: dead() is None)  # noqa: B023


def test_cancelled_work_lets_go_of_its_arguments_at_once(one: Any) -> None:
    blocker = hold(one)
    thing = Thing()
    dead = weakref.ref(thing)
    future = one.submit(identity, thing, key=thing)
    del thing
    assert dead() is not None
    assert future.cancel()
    assert dead() is None
    blocker.go.set()


# -- initializer ------------------------------------------------------------------------------


def test_the_initializer_runs_once_in_each_worker(make: type[Any]) -> None:
    local = threading.local()
    calls = []

    def initialise(value: str) -> None:
        calls.append(threading.get_ident())
        local.value = value

    with make(2, 2, initializer=initialise, initargs=("set",)) as pool:
        assert {pool.submit(lambda: local.value).result(SOON) for _ in range(10)} == {"set"}
    assert len(calls) == len(set(calls)) <= 2


def test_a_failing_initializer_fails_everything_queued(make: type[Any], caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()

    def fails() -> None:
        assert gate.wait(SOON)
        raise ValueError("no licence")

    pool = make(2, 2, initializer=fails)
    futures = [pool.submit(int) for _ in range(10)]
    told: list[bool] = []
    futures[3].add_done_callback(lambda future: told.append(future.done()))
    waiter = threading.Thread(target=wait, args=(futures, SOON))
    waiter.start()
    gate.set()
    for future in futures:
        with pytest.raises(BrokenThreadPool):
            future.result(SOON)
    waiter.join(SOON)
    with pytest.raises(BrokenThreadPool, match="make a new pool"):
        pool.submit(int)
    assert told == [True]
    assert "no licence" in caplog.text
    pool.shutdown()
    check_closed(pool)
    assert pool.stats().failed == 10


# -- waiting ----------------------------------------------------------------------------------


def test_wait_for_the_first_for_an_error_and_for_all(pool: Any) -> None:
    slow, fails = Blocker(), Blocker()
    never = Future[None]()
    first = pool.submit(int)
    running = pool.submit(slow)
    done, not_done = wait([first, running, never], SOON, FIRST_COMPLETED)
    assert (done, not_done) == ({first}, {running, never})

    def raises() -> None:
        fails()
        raise KeyError

    failing = pool.submit(raises)
    fails.go.set()
    done, not_done = wait([failing, running], SOON, FIRST_EXCEPTION)
    assert (done, not_done) == ({failing}, {running})
    assert wait([running], 0).not_done == {running}
    slow.go.set()
    assert wait([first, failing, running], SOON, ALL_COMPLETED).not_done == set()


def test_as_completed_gives_each_once_cancelled_ones_too(one: Any) -> None:
    blocker = hold(one)
    futures = [one.submit(int) for _ in range(3)]
    assert futures[1].cancel()
    completed = as_completed([*futures, *futures], SOON)
    assert next(completed) is futures[1]
    with pytest.raises(TimeoutError, match=r"2 \(of 2\) futures unfinished"):
        list(as_completed([futures[0], futures[2]], 0))
    blocker.go.set()
    assert set(completed) == {futures[0], futures[2]}


def test_many_threads_wait_in_every_way(pool: Any) -> None:
    gate = threading.Event()
    futures = [pool.submit(gate.wait, SOON) for _ in range(40)]
    cancelled = [future for future in futures[10::5] if future.cancel()]
    problems: list[str] = []

    def watch(which: int) -> None:
        mine = futures[which % 3 :]
        if which % 4 == 0:
            if wait(mine, SOON).not_done:
                problems.append("wait")
        elif which % 4 == 1:
            if set(as_completed(mine, SOON)) != set(mine):
                problems.append("as_completed")
        elif which % 4 == 2:
            seen: list[Any] = []
            for future in mine:
                future.add_done_callback(seen.append)
            wait(mine, SOON)
            eventually(lambda: len(seen) == len(mine))
        else:
            for future in mine:
                try:
                    if future.result(SOON) is not True:
                        problems.append("result")
                except CancelledError:
                    if future not in cancelled:
                        problems.append("cancelled")

    threads = [threading.Thread(target=watch, args=(which,)) for which in range(12)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    assert problems == []


def test_a_result_wanted_too_soon_and_one_cancelled_while_waited_for(one: Any) -> None:
    blocker = hold(one)
    future = one.submit(int)
    with pytest.raises(TimeoutError):
        future.result(0.01)
    with pytest.raises(TimeoutError):
        future.exception(0)
    caught: list[type[BaseException]] = []

    def waits() -> None:
        try:
            future.result()
        except CancelledError as error:
            caught.append(type(error))

    thread = threading.Thread(target=waits, daemon=True)
    thread.start()
    eventually(lambda: len(future._condition._waiters) == 1)
    assert future.cancel()
    thread.join(SOON)
    assert caught == [CancelledError]
    with pytest.raises(CancelledError):
        future.exception(0)
    blocker.go.set()


# -- callbacks --------------------------------------------------------------------------------


def test_callbacks_run_in_order_once_whatever_one_does(one: Any, caplog: pytest.LogCaptureFixture) -> None:
    blocker = hold(one)
    future = one.submit(lambda: "value")
    told: list[Any] = []

    def fails(_: object) -> None:
        told.append("fails")
        raise ValueError("a callback")

    def leaves(_: object) -> None:
        told.append("leaves")
        raise SystemExit

    future.add_done_callback(lambda item: told.append(item.result(0)))
    future.add_done_callback(fails)
    future.add_done_callback(lambda item: told.append("third"))
    future.add_done_callback(fails)
    last = one.submit(lambda: "last")
    if isinstance(one, ThreadPoolManager):
        last.add_done_callback(leaves)
    blocker.go.set()
    assert last.result(SOON) == "last"
    assert one.submit(lambda: "the worker lives").result(SOON) == "the worker lives"
    assert told[:4] == ["value", "fails", "third", "fails"]
    assert "a callback" in caplog.text
    future.add_done_callback(lambda item: told.append("at once"))
    assert told[-1] == "at once"


def test_a_callback_may_submit_cancel_and_shut_down(make: type[Any]) -> None:
    pool = make(1, 1)
    blocker = hold(pool)
    future, other = pool.submit(int), pool.submit(int)
    then: list[Any] = []

    def react(_: object) -> None:
        then.append(pool.submit(str))
        then.append(other.cancel())
        pool.shutdown(wait=False)

    future.add_done_callback(react)
    blocker.go.set()
    eventually(lambda: len(then) == 2)
    pool.shutdown()
    assert then[1] is True
    assert then[0].result(SOON) == ""
    pool.shutdown()
    check_closed(pool)


# -- what tasks may raise and return ----------------------------------------------------------


class FalsyError(Exception):
    def __bool__(self) -> bool:
        return False


class MuteError(Exception):
    def __str__(self) -> str:
        raise SystemExit("no text")


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit(), StopIteration(7), MuteError(), FalsyError()]
)
def test_any_error_is_handed_over_and_harms_no_worker(one: Any, error: BaseException) -> None:
    def fails() -> None:
        raise error

    future = one.submit(fails)
    assert future.exception(SOON) is error
    if isinstance(one, ThreadPoolManager) or error:  # the standard library swallows a falsy one before 3.14
        with pytest.raises(type(error)):
            future.result(0)
    assert one.submit(int).result(SOON) == 0
    row = one.records().iloc[0]
    assert row["state"] == "failed"
    assert row["error"].startswith(type(error).__name__)


def test_the_traceback_shows_the_users_code(one: Any) -> None:
    def deeper() -> None:
        raise LookupError("here")

    def outer() -> None:
        deeper()

    try:
        one.submit(outer).result(SOON)
    except LookupError as caught:
        names = []
        trace = caught.__traceback__
        while trace is not None:
            names.append(trace.tb_frame.f_code.co_name)
            trace = trace.tb_next
        assert names[-2:] == ["outer", "deeper"]
    error = one.submit(operator.truediv, 1, 0).exception(SOON)
    assert isinstance(error, ZeroDivisionError)


# -- the pool's own future --------------------------------------------------------------------


def test_a_future_that_has_ended_cannot_end_again(one: Any) -> None:
    future = one.submit(int)
    assert future.result(SOON) == 0
    with pytest.raises(InvalidStateError):
        future.set_result(1)
    with pytest.raises(InvalidStateError):
        future.set_exception(ValueError())
    with pytest.raises(RuntimeError):
        future.set_running_or_notify_cancel()
    assert future.result(0) == 0


def test_threads_are_hired_for_need_only_and_used_again(make: type[Any]) -> None:
    with make(1, 8) as pool:
        for _ in range(30):
            pool.submit(int).result(SOON)
            eventually(lambda: pool.status().busy == 0)
        assert pool.status().workers <= 3
        gate = threading.Event()
        futures = [pool.submit(gate.wait, SOON) for _ in range(100)]
        eventually(lambda: pool.status().busy == 8)
        assert pool.status().workers == 8
        gate.set()
        wait(futures, SOON)
