"""Blocking waits that hold up what they wait for: on workers of others' executors, and on a loop that runs already."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.unit.test_task_invariants import check_closed_manager, check_manager
from wiseflow_nb.context import check_cancelled, current_task
from wiseflow_nb.errors import DependencyError, TaskCancelledError, TaskTimeoutError, UsageError
from wiseflow_nb.records import TaskState
from wiseflow_nb.tasks import Retry, Task, TaskManager
from wiseflow_nb.testing import Stage

SOON = 20.0


async def later(*values: Any) -> Any:
    await asyncio.sleep(0)
    return values[-1] if values else None


# -- on a worker of somebody else's executor ------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("limit", [1, 3])
def test_nested_waits_on_few_workers_end(workers: int, limit: int) -> None:
    with ThreadPoolExecutor(workers) as pool, TaskManager(pool, max_concurrent=limit) as tasks:

        def tree(depth: int) -> int:
            if not depth:
                return 1
            children = [tasks.submit(tree, depth - 1), tasks.submit(tree, depth - 1), tasks.submit(later, depth)]
            return sum(child.result() for child in children)

        def behind() -> Any:
            first = tasks.submit(later, tasks.submit(abs, -1))
            between = [tasks.submit(pow, 2, tasks.submit(later, first)) for _ in range(5)]
            return tasks.submit(sum, between).result()

        roots = [tasks.submit(tree, 3), tasks.submit(behind), tasks.submit(tree, 2)]
        assert [root.result(SOON) for root in roots] == [19, 10, 8]
        check_manager(tasks)
    check_closed_manager(tasks)


def test_what_runs_inside_a_wait_is_a_task_of_its_own() -> None:
    word: contextvars.ContextVar[str] = contextvars.ContextVar("word", default="none")
    seen: dict[str, Any] = {}

    def child() -> str:
        me = current_task()
        assert me is not None
        seen["child"] = (me.task_id, threading.get_ident(), word.get())
        word.set("child")
        print("said by the child")
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass
        return "value"

    def told(_: object) -> None:
        seen["callback"] = current_task()

    def parent() -> str:
        word.set("parent")
        task = tasks.submit(child)
        task.add_done_callback(told)
        value = task.result()
        me = current_task()
        assert me is not None
        seen["parent"] = (me.task_id, threading.get_ident(), word.get())
        return value

    with ThreadPoolExecutor(1) as pool, TaskManager(pool, max_concurrent=1) as tasks:
        outer = tasks.submit(parent)
        assert outer.result(SOON) == "value"
        tasks.drain(SOON)
        inner = tasks.get("t2")
    assert inner is not None
    thread = seen["parent"][1]
    assert seen["parent"] == ("t1", thread, "parent")
    assert seen["child"] == ("t2", thread, "parent")
    assert seen["callback"] is None
    assert (inner.output_tail, outer.record().output_tail) == ("said by the child\n", "")
    assert inner.cpu_seconds >= 0.05 > outer.record().cpu_seconds
    check_closed_manager(tasks)


def test_what_runs_inside_a_wait_is_stopped_like_any_other() -> None:
    begun = threading.Event()

    def until_asked() -> None:
        me = current_task()
        assert me is not None
        begun.set()
        assert me.token.wait(SOON)
        check_cancelled()

    def parent(**options: Any) -> str:
        try:
            tasks.options(**options).submit(until_asked).result()
        except (TaskCancelledError, TaskTimeoutError) as error:
            return type(error).__name__
        return "not stopped"

    with ThreadPoolExecutor(1) as pool, TaskManager(pool) as tasks:
        assert tasks.submit(parent, timeout=0.01).result(SOON) == "TaskTimeoutError"
        begun.clear()
        outer = tasks.submit(parent)
        assert begun.wait(SOON)
        assert tasks.cancel("t4")
        assert outer.result(SOON) == "TaskCancelledError"
    check_closed_manager(tasks)


def test_what_fails_inside_a_wait_is_run_again_there() -> None:
    attempts = []

    def flaky() -> int:
        attempts.append(threading.get_ident())
        if len(attempts) < 3:
            raise ValueError("not yet")
        return len(attempts)

    def parent() -> int:
        return int(tasks.options(retry=Retry(2, base=0.0, jitter=None)).submit(flaky).result())

    with ThreadPoolExecutor(1) as pool, TaskManager(pool, max_concurrent=1) as tasks:
        assert tasks.submit(parent).result(SOON) == 3
    assert len(set(attempts)) == 1
    check_closed_manager(tasks)


def test_nothing_begins_inside_a_wait_that_may_not_begin() -> None:
    stage = Stage()
    with TaskManager(**stage.parts, max_concurrent=1) as tasks:
        tasks.submit(asyncio.sleep, 10)
        stage.run()
        plain = tasks.submit(int)
        assert not tasks._scheduler.slots.take(plain._job)  # no slot is free
        tasks.pause()
        stage.advance(10)
        assert not tasks._scheduler.slots.take(plain._job)  # paused
        tasks.resume()
        stage.run()
        assert plain.result() == 0
    check_closed_manager(tasks)


def test_a_wait_with_a_bound_only_waits() -> None:
    def parent() -> str:
        child = tasks.submit(int)
        with pytest.raises(TimeoutError):
            child.result(0.01)
        return str(child.state)

    with ThreadPoolExecutor(1) as pool, TaskManager(pool) as tasks:
        assert tasks.submit(parent).result(SOON) == "pending"
    check_closed_manager(tasks)


def test_waits_that_lie_too_deep_inside_one_another_are_refused_if_no_worker_is_left() -> None:
    def nested(depth: int) -> int:
        return depth and 1 + tasks.submit(nested, depth - 1).result()

    with ThreadPoolExecutor(2) as pool, TaskManager(pool) as tasks:
        error = tasks.submit(nested, 100).exception(SOON)
        assert "20 calls wait inside one another and every worker of the executor waits" in str(error)
    check_closed_manager(tasks)
    with ThreadPoolExecutor(6) as pool, TaskManager(pool) as tasks:
        assert tasks.submit(nested, 100).result(SOON) == 100
    check_closed_manager(tasks)


def test_a_wait_for_one_that_lies_below_on_the_stack_is_a_circle() -> None:
    told = []

    async def waits_for_the_outer() -> Any:
        return await outer

    def inner() -> str:
        cancelled.cancel()  # so that the outer waits for nothing more, but for this to return
        try:
            tasks.submit(waits_for_the_outer).result()
        except DependencyError as error:
            told.append(str(error))
        return "refused"

    def waits() -> None:
        with pytest.raises(TaskCancelledError):
            cancelled.result()

    with ThreadPoolExecutor(1) as pool, TaskManager(pool) as tasks:
        tasks.pause()
        first = tasks.submit(inner)
        cancelled = tasks.options(dependencies=[first]).submit(int)
        outer = tasks.options(priority="high").submit(waits)
        tasks.resume()
        outer.result(SOON)
        assert first.result(SOON) == "refused"
    assert len(told) == 1
    assert "each waits for the next" in told[0]
    check_closed_manager(tasks)


def test_of_many_dependencies_each_is_looked_at_once() -> None:
    from wiseflow_nb.tasks._helping import Path

    stage = Stage()
    with TaskManager(**stage.parts, max_concurrent=1) as tasks:
        parents = [tasks.submit(int) for _ in range(50)]
        last = tasks.options(dependencies=[tasks.options(dependencies=parents).submit(int)]).submit(int)
        path = Path(last._job, coroutines_too=True)
        ends = []
        while not last.done():
            with tasks._scheduler.lock:
                ends.append(path.end())
                assert ends[-1].state is TaskState.PENDING
            stage.executor.run_next()
        assert [job.number for job in ends] == [task._job.number for task in parents] + [51, 52]
        assert path.end() is last._job
    check_closed_manager(tasks)


# -- on a loop that runs already ------------------------------------------------------------------


def in_a_cell(cell: Callable[[TaskManager], Any], **options: Any) -> Any:
    """What a cell does that has a manager on the kernel's loop: everything, and then all of it is awaited."""

    async def main() -> Any:
        async with TaskManager(loop="kernel", **options) as tasks:
            return cell(tasks)

    return asyncio.run(asyncio.wait_for(main(), SOON))


def test_a_plain_call_can_be_waited_for_in_a_cell() -> None:
    def cell(tasks: TaskManager) -> list[Any]:
        tasks.submit(asyncio.sleep, 0)
        held = threading.Event()
        chain = tasks.submit(abs, tasks.submit(abs, -3))
        slow = tasks.submit(held.wait, SOON)
        with pytest.raises(TimeoutError):
            slow.result(0.01)
        held.set()
        with pytest.raises(ZeroDivisionError):
            tasks.options(retry=Retry(1, base=0.0)).submit(divmod, 1, 0).result()
        return [chain.result(), slow.result(), tasks.submit(int).exception()]

    assert in_a_cell(cell) == [3, True, None]


@pytest.mark.parametrize("bound", [None, SOON])
def test_what_needs_the_loop_cannot_be_waited_for_in_a_cell(bound: float | None) -> None:
    def refused(task: Task[Any], why: str) -> None:
        with pytest.raises(UsageError, match=rf"{why}.*; write `await task` instead"):
            task.result(bound)

    def cell(tasks: TaskManager) -> None:
        coroutine = tasks.submit(later, 1)
        refused(coroutine, r"the coroutine 'later' \(t1\) needs it")
        refused(tasks.submit(abs, tasks.submit(abs, coroutine)), r"the coroutine 'later' \(t1\) needs it")
        refused(tasks.submit(lambda: tasks.submit(later, 2).result()), r"the coroutine 'later' \(t\d\) needs it")
        failing = tasks.options(cleanup=later).submit(divmod, 1, 0)
        refused(failing, "the cleanup of a task needs it")

    in_a_cell(cell)


def test_a_plain_call_that_coroutines_leave_no_slot_cannot_be_waited_for_in_a_cell() -> None:
    async def main() -> str:
        async with TaskManager(loop="kernel", max_concurrent=1) as tasks:
            gate = asyncio.Event()
            first = tasks.submit(gate.wait)
            while first.state is not TaskState.RUNNING:
                await asyncio.sleep(0)
            plain = tasks.submit(str, "plain")
            with pytest.raises(UsageError, match="all 1 that may run at once are coroutines, which need it"):
                plain.result()
            gate.set()
            return str(await plain)

    assert asyncio.run(asyncio.wait_for(main(), SOON)) == "plain"


def test_a_coroutine_does_not_block_the_loop_it_runs_on() -> None:
    async def main() -> None:
        async with TaskManager(loop="kernel") as tasks:

            async def blocks() -> None:
                tasks.submit(int).result()

            with pytest.raises(UsageError, match="stop the loop that runs the manager's coroutines"):
                await tasks.submit(blocks)

    asyncio.run(main())


def test_drain_and_shutdown_in_a_cell() -> None:
    def cell(tasks: TaskManager) -> None:
        plain = [tasks.submit(time.sleep, 0.001) for _ in range(5)]
        assert tasks.drain()
        assert all(task.done() for task in plain)
        coroutine = tasks.submit(later)
        for refused in (tasks.drain, tasks.shutdown, lambda: tasks.shutdown("now")):
            with pytest.raises(UsageError, match=r"need \(1\); write `await asyncio.to_thread\(tasks\.\w+\)`"):
                refused()
        assert tasks.submit(int).result() == 0  # it was left open
        assert coroutine.cancel()

    in_a_cell(cell)


def test_drain_in_a_cell_is_given_up_when_something_comes_to_need_the_loop() -> None:
    def cell(tasks: TaskManager) -> None:
        tasks.submit(lambda: tasks.submit(later, 2).result())
        with pytest.raises(UsageError, match=r"that have not ended need|'later' \(t2\) needs it"):
            tasks.drain()

    in_a_cell(cell)


def test_a_with_block_in_a_cell_keeps_the_callers_error() -> None:
    async def main() -> None:
        with TaskManager(loop="kernel") as done:
            task = done.submit(int)
        assert task.result() == 0
        left, other = TaskManager(loop="kernel"), TaskManager(loop="kernel")
        left.submit(later)
        with pytest.raises(ValueError, match="mine") as caught, left:
            raise ValueError("mine")
        assert "the task manager was left open: shutdown here would never end" in caught.value.__notes__[0]
        with pytest.raises(UsageError, match="`async with` for a block"), other:
            other.submit(later)
        for tasks in (left, other):
            await asyncio.to_thread(tasks.shutdown)
            check_closed_manager(tasks)

    asyncio.run(asyncio.wait_for(main(), SOON))
