"""How the manager calls for workers of a pool: in which class, and what becomes of a call that fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, ThreadPoolExecutor, wait
from typing import Any

import pytest

from tests.oracles import plain_tasks
from tests.unit.test_task_invariants import check_closed_manager
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.records import TaskState
from wiseflow_nb.tasks import TaskManager

SOON = 20.0


def fail() -> None:
    raise ValueError("no connection")


@pytest.mark.parametrize("make", [ThreadPoolManager, ThreadPoolExecutor])
@pytest.mark.parametrize("manager", [TaskManager, plain_tasks.TaskManager])
def test_an_initializer_that_fails_fails_the_tasks(make: Callable[..., Executor], manager: Any) -> None:
    pool = make(max_workers=2, initializer=fail)
    with manager(pool, max_concurrent=2) as tasks:
        calls = [tasks.submit(int) for _ in range(5)]
        done, _ = wait(calls, SOON)
        assert len(done) == 5
        assert all(isinstance(call.exception(), BrokenExecutor) for call in calls)
        assert "initializer" in str(calls[0].exception())
        assert isinstance(tasks.submit(int).exception(SOON), BrokenExecutor)
    check_closed_manager(tasks)
    pool.shutdown()


class Refusing(ThreadPoolExecutor):
    """As a pool of processes, which cannot be handed what leads to a lock."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return super().submit(fail)


def test_a_call_that_the_pool_cannot_make_fails_its_task() -> None:
    with Refusing(1) as pool, TaskManager(pool) as tasks:
        with pytest.raises(ValueError, match="no connection"):
            tasks.submit(int).result(SOON)
        assert tasks.counts()["failed"] == 1
    check_closed_manager(tasks)


class Upset(ThreadPoolExecutor):
    """Fails in a way that no pool of the standard library does."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("the cluster is gone")


@pytest.mark.parametrize("manager", [TaskManager, plain_tasks.TaskManager])
def test_whatever_a_pool_raises_fails_the_task(manager: Any) -> None:
    with Upset(1) as pool, manager(pool) as tasks:
        calls = [tasks.submit(int) for _ in range(3)]
        assert [str(call.exception(SOON)) for call in calls] == ["the cluster is gone"] * 3
    check_closed_manager(tasks)


def _behind(how: Callable[[TaskManager, list[Any]], Any]) -> list[Any]:
    order: list[Any] = []
    gate, begun = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert gate.wait(SOON)

    with ThreadPoolManager(1, 1) as pool, TaskManager(pool, max_concurrent=1) as tasks:
        pool.submit(hold)
        assert begun.wait(SOON)
        others = [tasks.options(priority="low").submit(order.append, "low")]
        direct = [pool.submit(order.append, number) for number in range(5)]
        others += how(tasks, order)
        gate.set()
        wait([*others, *direct], SOON)
    check_closed_manager(tasks)
    assert tasks._scheduler.slots.lowest_ticket > 3
    return order


def test_a_call_of_a_higher_class_lifts_the_one_that_waits_in_the_pool() -> None:
    def submitted(tasks: TaskManager, order: list[Any]) -> Any:
        return [tasks.options(priority="critical").submit(order.append, "critical")]

    assert _behind(submitted)[0] == "critical"


def test_a_class_that_is_raised_or_lent_lifts_it_too() -> None:
    def raised(tasks: TaskManager, order: list[Any]) -> Any:
        tasks.reprioritise("t1", "high")
        return []

    def lent(tasks: TaskManager, order: list[Any]) -> Any:
        task = tasks.task("t1")
        assert task is not None
        assert task.state is TaskState.PENDING
        return [tasks.options(priority="high", dependencies=["t1"]).submit(order.append, "high")]

    assert _behind(raised)[0] == "low"
    assert _behind(lent)[0] == "low"
