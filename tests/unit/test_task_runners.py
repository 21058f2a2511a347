"""Runners and cancels that are not the manager's: who cancels the current task late, or all there are."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.unit.test_task_invariants import check_closed_manager
from wiseflow_nb.tasks import TaskManager, _kept
from wiseflow_nb.testing import FakeClock, ManualLoop, Stage


def test_a_late_cancel_of_the_current_task_hits_no_other() -> None:
    stage = Stage()
    with TaskManager(**stage.parts, max_concurrent=1) as tasks:

        async def leaves_a_cancel() -> str:
            me = asyncio.current_task()
            assert me is not None
            asyncio.get_running_loop().call_later(1, me.cancel)
            return "first"

        first, second = tasks.submit(leaves_a_cancel), tasks.submit(asyncio.sleep, 5, "second")
        stage.run()
        stage.advance(2)
        stage.advance(5)
        assert [first.result(0), second.result(0)] == ["first", "second"]
    check_closed_manager(tasks)


async def _bare() -> None:
    await asyncio.sleep(0)


async def _timed() -> None:
    async with asyncio.timeout(10):
        await asyncio.sleep(1)


@pytest.mark.parametrize("fn", [_bare, _timed])
def test_a_runner_that_nobody_keeps_goes_on(fn: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage()
    with TaskManager(**stage.parts, max_concurrent=1) as tasks:
        tasks.submit(_bare)  # with the first it is found out whether counts tell
        stage.run()
        runner = tasks._scheduler.runner
        started: list[int] = []
        start = runner.start
        monkeypatch.setattr(runner, "start", lambda called: (started.extend(called), start(called)))
        for _ in range(5):
            tasks.submit(fn)
        for _ in range(6):
            stage.advance(1)
        assert tasks.counts()["completed"] == 6
        assert len(started) == 1
    check_closed_manager(tasks)


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="counts of references are CPython's")
def test_where_counts_tell_is_found_out_once() -> None:
    _kept._tell.clear()
    loops = [ManualLoop(FakeClock()) for _ in range(2)]
    for loop in loops:  # the first is closed before it is known
        loop.call(lambda: _kept.try_counts(asyncio.get_running_loop()))
        loop.call(lambda: _kept.try_counts(asyncio.get_running_loop()))
    loops[0]._loop.close()
    loops[1].run_until_idle()
    assert list(_kept._tell.values()) == [True]
    loops[1].stop()


@pytest.mark.parametrize("counts", [itertools.repeat(7), itertools.count()], ids=["never change", "always change"])
def test_where_counts_do_not_tell_a_runner_takes_one_task(
    counts: Iterator[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_kept, "_tell", {})
    monkeypatch.setattr(sys, "getrefcount", lambda _: next(counts))
    started: list[int] = []
    stage = Stage()
    with TaskManager(**stage.parts, max_concurrent=1) as tasks:
        runner = tasks._scheduler.runner
        start = runner.start
        monkeypatch.setattr(runner, "start", lambda called: (started.extend(called), start(called)))
        for _ in range(5):
            tasks.submit(_bare)
        stage.run()
        assert tasks.counts()["completed"] == 5
    assert len(started) >= 5
    assert list(_kept._tell.values()) == [False]
    check_closed_manager(tasks)


def test_cancelling_all_there_are_before_they_begin_loses_no_runner() -> None:
    async def main() -> list[str]:
        async with TaskManager(loop="kernel", max_concurrent=2) as tasks:
            submitted = [tasks.submit(asyncio.sleep, 0, "ran") for _ in range(4)]
            await asyncio.sleep(0)  # the runners are made, and not begun
            assert tasks._scheduler.runner._fresh

            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()
            return [await asyncio.wait_for(asyncio.wrap_future(task), 20) for task in submitted]

    assert asyncio.run(main()) == ["ran"] * 4


def test_the_first_manager_of_a_process_on_a_loop_that_a_test_moves_does_as_the_later_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_kept, "_tell", {})
    monkeypatch.setattr(_kept, "_tried", set())
    with TaskManager(**Stage().parts):
        assert list(_kept._tell.values()) == [True]
