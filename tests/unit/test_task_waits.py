"""Waiting inside tasks: whose slot is whose, whatever time-outs and cancels come in between."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import plain_tasks as plain
from tests.unit.test_task_invariants import check_closed_manager, check_manager
from wiseflow_nb import tasks as fast
from wiseflow_nb.testing import Stage

BOTH = pytest.mark.parametrize("package", [fast, plain], ids=["fast", "plain"])


@BOTH
def test_a_time_out_while_the_slot_is_taken_waits_for_it(package: Any) -> None:
    stage = Stage()
    tasks = package.TaskManager(**stage.parts, max_concurrent=1)
    told: list[str] = []

    async def outer() -> str:
        short = tasks.submit(asyncio.sleep, 0)
        tasks.submit(asyncio.sleep, 100)
        try:
            async with asyncio.timeout(3):
                await short
        except TimeoutError:
            told.append(f"late, {tasks._scheduler.slots.held} of 1")
        await tasks.submit(asyncio.sleep, 0)
        return "end"

    task = tasks.submit(outer)
    stage.run()
    stage.advance(5)
    assert told == []
    check_manager(tasks)
    stage.advance(100)
    assert told == ["late, 1 of 1"]
    assert task.result(0) == "end"
    tasks.shutdown()
    check_closed_manager(tasks)


@BOTH
def test_two_waits_of_one_task_want_one_slot_back(package: Any) -> None:
    stage = Stage()
    tasks = package.TaskManager(**stage.parts, max_concurrent=1)

    async def outer() -> str:
        first, hold = tasks.submit(asyncio.sleep, 0), tasks.submit(asyncio.sleep, 10)

        async def one() -> None:
            await first  # ends at once, and wants the slot that ``hold`` has by then

        async def other() -> None:
            await asyncio.sleep(1)
            await hold

        await asyncio.gather(one(), other())
        return "end"

    task = tasks.submit(outer)
    stage.run()
    for _ in range(4):
        stage.advance(4)
        check_manager(tasks)
    assert task.result(0) == "end"
    tasks.shutdown()
    check_closed_manager(tasks)


STEPS = st.tuples(st.sampled_from([0.0, 1.0, 3.0, 7.0]), st.sampled_from([None, 1.0, 2.0, 5.0]))


@BOTH
@settings(max_examples=60, deadline=None)
@given(
    limit=st.integers(1, 3),
    plans=st.lists(st.lists(STEPS, min_size=1, max_size=4), min_size=1, max_size=6),
    cancels=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), max_size=3),
)
def test_time_outs_around_waits_lose_no_slot(
    package: Any, limit: int, plans: list[list[tuple[float, float | None]]], cancels: list[tuple[int, int]]
) -> None:
    stage = Stage()
    tasks = package.TaskManager(**stage.parts, max_concurrent=limit)
    inside, most = 0, 0

    def count(change: int) -> None:
        nonlocal inside, most
        inside += change
        most = max(most, inside)

    async def inner(seconds: float) -> None:
        count(1)
        try:
            await asyncio.sleep(seconds)
        finally:
            count(-1)

    async def outer(plan: list[tuple[float, float | None]]) -> None:
        count(1)
        try:
            for seconds, timeout in plan:
                child = tasks.submit(inner, seconds)
                try:
                    async with asyncio.timeout(timeout):
                        count(-1)
                        try:
                            await child
                        finally:
                            count(1)
                except TimeoutError:
                    await asyncio.sleep(0.5)
        finally:
            count(-1)

    submitted = [tasks.submit(outer, plan) for plan in plans]
    stage.run()
    # With one slot all of them sleep one after the other.
    for second in range(int(sum(seconds + 1 for plan in plans for seconds, _ in plan)) + 20):
        for when, which in cancels:
            if when == second:
                submitted[which % len(submitted)].cancel()
        stage.advance(1)
        check_manager(tasks)
        assert tasks._scheduler.slots.held <= limit
    assert all(task.done() for task in submitted)
    assert inside == 0
    assert most <= limit + len(cancels)
    stage.advance(1000)
    tasks.shutdown()
    check_closed_manager(tasks)


def test_waits_that_use_up_an_executor_have_a_reason() -> None:
    made = threading.Event()
    inner: list[fast.Task[int]] = []

    with ThreadPoolExecutor(1) as pool, fast.TaskManager(pool, max_concurrent=2) as tasks:

        def outer() -> str:
            inner.append(tasks.submit(int))
            made.set()
            return str(inner[0].exception(20))

        task = tasks.submit(outer)
        assert made.wait(20)
        while not tasks._scheduler.ledger.jobs[task.id].wait_depth:
            threading.Event().wait(0.001)
        assert "1 that have one wait for other tasks; give it more workers" in tasks.hold_reason
        inner[0].cancel()
        task.cancel()
    check_closed_manager(tasks)
