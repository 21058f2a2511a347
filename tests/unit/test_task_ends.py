"""What waits for tasks from outside: told of an end once, in the moment from which it counts."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, as_completed, wait
from typing import Any

import pytest

from tests.oracles import plain_tasks
from tests.unit.test_task_invariants import check_manager
from wiseflow_nb.futures import to_asyncio
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.records import HasRecord, TaskState, TaskTransition
from wiseflow_nb.tasks import Retry, Task, TaskManager
from wiseflow_nb.tasks._lives import perform
from wiseflow_nb.tasks.task import may_wait
from wiseflow_nb.testing import Stage

SOON = 20.0
MANAGERS: dict[str, Any] = {"fast": TaskManager, "plain": plain_tasks.TaskManager}


@pytest.fixture
def hurried() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("kind", MANAGERS)
def test_the_standard_library_waits_for_all_of_them(hurried: None, kind: str) -> None:
    async def nothing() -> int:
        return 0

    with MANAGERS[kind](max_concurrent=4) as tasks:
        for turn in range(150):
            held = threading.Event()
            some = [tasks.submit(nothing if (turn + at) % 3 == 0 else int) for at in range(6)]
            last = tasks.submit(held.wait, SOON)
            first = wait([*some, last], SOON, return_when=FIRST_COMPLETED)
            assert first.done
            seen = []
            for task in as_completed([*some, last], SOON):
                seen.append(task)
                if len(seen) == len(some):
                    held.set()
            assert len(seen) == len(set(seen)) == 7
            again = [tasks.submit(int) for _ in range(6)]
            assert not wait([*again, tasks.submit(int, turn)], SOON).not_done


def test_an_end_counts_from_the_moment_in_which_the_watchers_are_told() -> None:
    # Between the transition and the settling, with a condition that somebody holds: not done, and nobody
    # who looks then is told twice.
    ended, seen = threading.Event(), threading.Event()

    def look(job: HasRecord, move: TaskTransition | None) -> None:
        if move is not None and move.to_state is TaskState.COMPLETED:
            ended.set()

    with TaskManager(max_concurrent=1, on_move=look) as tasks:
        held = threading.Event()
        task: Task[bool] = tasks.submit(held.wait, SOON)
        with task._condition:
            held.set()
            assert ended.wait(SOON)
            with tasks._scheduler.lock:
                assert task.state is TaskState.COMPLETED
                assert not task.done()
            task.add_done_callback(lambda _: seen.set())
        assert task.result(SOON)
        assert seen.wait(SOON)
        check_manager(tasks)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("coroutine", [False, True])
@pytest.mark.parametrize("kind", MANAGERS)
def test_a_callback_that_raises_anything_loses_no_task(kind: str, coroutine: bool, error: type[BaseException]) -> None:
    async def nothing() -> int:
        return 0

    def bad(_: Any) -> None:
        raise error("from a callback")

    called = []
    with MANAGERS[kind](max_concurrent=1) as tasks:
        tasks.pause()
        some = [tasks.submit(nothing if coroutine else int) for _ in range(4)]
        cancelled = tasks.submit(int)
        for task in (*some, cancelled):
            task.add_done_callback(bad)
            task.add_done_callback(called.append)
        if kind == "fast" and error is KeyboardInterrupt:
            # Here it is the main thread's own: raised when all that follows has been done.
            with pytest.raises(KeyboardInterrupt):
                cancelled.cancel()
            assert cancelled in called
        else:
            cancelled.cancel()
        tasks.resume()
        assert [task.result(SOON) for task in some] == [0] * 4
        assert tasks.drain(SOON)
    assert set(called) == {*some, cancelled}


def test_all_that_follows_a_change_is_done_whatever_a_part_of_it_raises() -> None:
    done = []

    def bad() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform([bad, lambda: done.append(1)])
    assert done == [1]


def test_what_an_interrupt_came_in_the_midst_of_is_done_again() -> None:
    done: list[int] = []

    def interrupted() -> None:
        done.append(len(done))
        if len(done) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform([interrupted])
    assert done == [0, 1]


def test_failing_callbacks_are_counted() -> None:
    with TaskManager(max_concurrent=1) as tasks:
        task = tasks.submit(int)
        task.result(SOON)
        task.add_done_callback(lambda _: 1 // 0)
        assert tasks.callback_failures == 1


def test_an_interrupt_in_a_callback_that_is_called_at_once_is_the_callers() -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    with TaskManager(max_concurrent=1) as tasks:
        task = tasks.submit(int)
        task.result(SOON)
        with pytest.raises(KeyboardInterrupt):
            task.add_done_callback(interrupted)
        other = threading.Thread(target=task.add_done_callback, args=(interrupted,))
        other.start()
        other.join(SOON)
        assert tasks.callback_failures == 2


def test_an_interrupt_on_the_kernels_loop_ends_no_runner() -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        async with TaskManager(loop="kernel", max_concurrent=1) as tasks:
            tasks.pause()
            some = [tasks.submit(_nothing) for _ in range(3)]
            for task in some:
                task.add_done_callback(interrupted)
            tasks.resume()
            assert await asyncio.wait_for(asyncio.gather(*map(asyncio.wrap_future, some)), SOON) == ["came"] * 3
            assert tasks.callback_failures == 3
            assert tasks._scheduler.slots.coming == 0

    asyncio.run(main())


@pytest.mark.parametrize("raised", [ValueError, SystemExit])
@pytest.mark.parametrize("kind", ["thread", "async"])
def test_an_error_whose_text_cannot_be_made_ends_its_task_all_the_same(kind: str, raised: type[BaseException]) -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise raised("no text")

    def fail() -> None:
        raise MuteError

    async def fail_async() -> None:
        raise MuteError

    with TaskManager(max_concurrent=1) as tasks:
        failed = tasks.options(cleanup=fail).submit(fail if kind == "thread" else fail_async)
        after = tasks.options(dependencies=[failed]).submit(int)
        assert isinstance(failed.exception(SOON), MuteError)
        assert tasks.submit(int).result(SOON) == 0
        record = tasks.get(failed.id)
        assert record is not None
        assert record.error == "MuteError: (its text could not be made)"
        assert after.state is TaskState.SKIPPED
        assert tasks.cleanup_failures == 1


def _told_when_it_may_go_on(tasks: Any, first: Any, second: Any) -> tuple[list[Any], Any]:
    """Submit two while nothing starts; a callback of the first waits for the second."""
    got: list[Any] = []

    def wait_for_it(_: Any) -> None:
        try:
            got.append(second_task.result(SOON))
        except BaseException as error:
            got.append(error)

    tasks.pause()
    first_task = first(tasks)
    second_task = second(tasks, first_task)
    first_task.add_done_callback(wait_for_it)
    tasks.resume()
    return got, second_task


async def _nothing(*_: object) -> str:
    return "came"


def _came(*_: object) -> str:
    return "came"


def _raise() -> None:
    raise ValueError("told to")


@pytest.mark.parametrize("limit", [1, 4])
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("depends", [False, True])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("second", [_came, _nothing])
@pytest.mark.parametrize("kind", MANAGERS)
def test_a_callback_may_wait_for_what_comes_after_its_task(
    kind: str, second: Any, fails: bool, depends: bool, workers: int, limit: int
) -> None:
    with ThreadPoolManager(1, workers) as pool, MANAGERS[kind](pool, max_concurrent=limit) as tasks:
        got, task = _told_when_it_may_go_on(
            tasks,
            lambda tasks: tasks.submit(_raise if fails else int),
            lambda tasks, first: tasks.options(trigger="all_done", dependencies=[first] if depends else []).submit(
                second
            ),
        )
        assert task.result(SOON) == "came"
        assert tasks.drain(SOON)
    assert got == ["came"]


def test_a_callback_of_a_process_task_may_wait_for_its_dependent() -> None:
    with TaskManager(max_concurrent=1) as tasks:
        got, task = _told_when_it_may_go_on(
            tasks,
            lambda tasks: tasks.options(kind="process").submit(int),
            lambda tasks, first: tasks.submit(_came, first),
        )
        assert task.result(SOON) == "came"
        assert tasks.drain(SOON)
    assert got == ["came"]


@pytest.mark.parametrize("kind", MANAGERS)
def test_a_plain_call_begins_while_a_callback_holds_the_loop(kind: str) -> None:
    begun = threading.Event()
    got: list[bool] = []
    with MANAGERS[kind](max_concurrent=1) as tasks:
        tasks.pause()
        first = tasks.submit(_nothing)
        tasks.submit(lambda _: begun.set(), first)
        first.add_done_callback(lambda _: got.append(begun.wait(SOON)))
        tasks.resume()
        assert tasks.drain(SOON)
    assert got == [True]


@pytest.mark.parametrize("ended", [_came, _nothing, _raise])
@pytest.mark.parametrize("following", [_came, _nothing])
def test_the_time_of_a_callback_is_no_tasks_time(ended: Any, following: Any) -> None:
    # On a stage one thread does everything: what were claimed before the callback would be RUNNING in it.
    stage = Stage()
    seen = []
    with TaskManager(**stage.parts, max_concurrent=1) as tasks:
        first = tasks.submit(ended)
        second = tasks.options(timeout=5).submit(following)

        def look(_: Any) -> None:
            seen.append(second.state)
            stage.clock.advance(10)

        first.add_done_callback(look)
        stage.run()
        assert seen == [TaskState.PENDING]
        assert second.state is TaskState.COMPLETED
        assert second.record().wall_seconds == 0


def test_a_callback_that_comes_when_the_next_task_was_claimed_is_the_callers() -> None:
    # It may wait for that very task. The condition, which the test holds, keeps the end from being told.
    claimed, called = threading.Event(), []
    with TaskManager(max_concurrent=1) as tasks:
        tasks.pause()
        held = threading.Event()
        first: Task[bool] = tasks.submit(held.wait, SOON)
        second = tasks.submit(claimed.set)
        tasks.resume()
        with first._condition:
            held.set()
            deadline = time.monotonic() + SOON
            while not first._closing and time.monotonic() < deadline:
                time.sleep(0.001)
            assert not first.done()
            first.add_done_callback(lambda _: called.append((threading.current_thread(), second.result(SOON))))
        assert claimed.is_set()
    assert called == [(threading.current_thread(), None)]


def test_what_only_hands_an_end_to_a_loop_waits_for_nothing() -> None:
    async def main() -> None:
        async with TaskManager() as tasks:
            held = threading.Event()
            task: Task[bool] = tasks.submit(held.wait, SOON)
            bridged = [asyncio.wrap_future(task), to_asyncio(task)]
            assert len(task._callbacks or ()) == 2
            assert not may_wait(task._callbacks)
            task.add_done_callback(print)
            assert may_wait(task._callbacks)
            held.set()
            assert await asyncio.gather(*bridged) == [True, True]

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["thread", "async"])
def test_a_retry_rule_that_cannot_tell_covers_nothing(kind: str) -> None:
    free = []

    class Odd(type):
        def __instancecheck__(cls, other: object) -> bool:
            # Asked without the lock, which another thread can take meanwhile.
            looking = threading.Thread(target=lambda: free.append(tasks.counts()["running"]))
            looking.start()
            looking.join(SOON)
            raise RuntimeError("no idea")

    class OddError(Exception, metaclass=Odd):
        pass

    async def fail_async() -> None:
        raise ValueError("told to")

    with TaskManager(max_concurrent=1) as tasks:
        task = tasks.options(retry=Retry(1, on=OddError)).submit(_raise if kind == "thread" else fail_async)
        assert isinstance(task.exception(SOON), ValueError)
        assert task.state is TaskState.FAILED
        assert tasks.submit(int).result(SOON) == 0
    assert free == [1, 1]
