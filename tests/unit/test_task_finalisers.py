"""Finalisers that ask the manager for something while their own thread is in the midst of a change there."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.unit.test_task_invariants import check_closed_manager
from wiseflow_nb.errors import PoolClosedError, TaskCancelledError, UsageError
from wiseflow_nb.records import HasRecord, TaskState, TaskTransition
from wiseflow_nb.tasks import Task, TaskManager

SOON = 20.0


class Finalised:
    """What calls a function when it goes."""

    def __init__(self, call: Callable[[], Any], got: list[Any]) -> None:
        self._call, self._got = call, got

    def __del__(self) -> None:
        try:
            self._got.append(self._call())
        except BaseException as error:
            self._got.append(error)


class Midst:
    """A manager, and what goes in the midst of its next change: while a move is told, the lock is held."""

    def __init__(self) -> None:
        self._going: list[Finalised] = []
        self.got: list[Any] = []
        self.tasks = TaskManager(max_concurrent=2, on_move=self._moved)

    def _moved(self, job: HasRecord, move: TaskTransition | None) -> None:
        self._going.clear()

    def do(self, call: Callable[[], Any]) -> Any:
        if not self.tasks.paused:  # else nothing moves but what is submitted here
            assert self.tasks.drain(SOON)
        self._going.append(Finalised(call, self.got))
        # On a thread that may hang, so that the test does not.
        changing = threading.Thread(target=self.tasks.submit, args=(int,), daemon=True)
        changing.start()
        changing.join(SOON)
        assert not changing.is_alive()
        return self.got.pop()


@pytest.fixture
def midst() -> Iterator[Midst]:
    made = Midst()
    yield made
    made.tasks.shutdown("now", timeout=SOON)
    check_closed_manager(made.tasks)


def test_one_that_submits_has_its_task(midst: Midst) -> None:
    parent: Task[int] = midst.tasks.submit(int)
    task = midst.do(lambda: midst.tasks.submit(str, parent))
    assert task.result(SOON) == "0"
    assert midst.tasks.task(task.id) is task
    assert midst.tasks.drain(SOON)
    ids = [record.task_id for record in midst.tasks.records()]
    assert len(set(ids)) == len(ids) == 3


def test_a_drain_waits_for_what_was_put_off(midst: Midst) -> None:
    task = midst.do(lambda: midst.tasks.submit(int))
    assert midst.tasks.drain(SOON)
    assert task.done()


def test_one_that_cancels_stops_its_task(midst: Midst) -> None:
    midst.tasks.pause()
    task: Task[int] = midst.tasks.submit(int)
    assert midst.do(task.cancel) is True
    with pytest.raises(TaskCancelledError):
        task.result(SOON)


def test_what_was_put_off_can_be_cancelled_before_it_is_entered(midst: Midst) -> None:
    midst.tasks.pause()

    def submit_and_cancel() -> Any:
        task = midst.tasks.submit(int)
        assert (task.state, task.running(), task.done()) == (TaskState.PENDING, False, False)
        return task, task.cancel("at once")

    task, accepted = midst.do(submit_and_cancel)
    assert accepted
    with pytest.raises(TaskCancelledError, match="at once"):
        task.result(SOON)
    assert task.record().state is TaskState.CANCELLED


def test_other_changes_are_put_off_too(midst: Midst) -> None:
    midst.tasks.pause()
    task: Task[int] = midst.tasks.submit(int)
    assert midst.do(lambda: midst.tasks.reprioritise(task.id, "high"))
    midst.do(midst.tasks.resume)
    assert task.result(SOON) == 0
    midst.do(lambda: midst.tasks.set_max_concurrent(3))
    assert midst.tasks.drain(SOON)
    assert (task.record().priority.name, midst.tasks.max_concurrent) == ("HIGH", 3)


def test_one_may_look(midst: Midst) -> None:
    assert midst.do(midst.tasks.counts)["pending"] == 1
    assert len(midst.do(midst.tasks.records)) == 2


def test_one_that_would_wait_is_refused(midst: Midst) -> None:
    midst.tasks.pause()
    task: Task[int] = midst.tasks.submit(int)
    for call in (task.result, midst.tasks.drain, midst.tasks.shutdown):
        assert isinstance(midst.do(call), UsageError)
    midst.tasks.resume()
    assert task.result(SOON) == 0


def test_one_that_comes_after_the_end_is_refused() -> None:
    midst = Midst()
    midst.tasks.shutdown()
    with midst.tasks._scheduler.lock, pytest.raises(PoolClosedError):
        midst.tasks.submit(int)


def test_what_is_put_off_beyond_the_end_is_cancelled() -> None:
    midst = Midst()
    with midst.tasks._scheduler.lock:
        task: Task[int] = midst.tasks.submit(int)
        midst.tasks._scheduler.closed = True
    with pytest.raises(TaskCancelledError, match="shutdown"):
        task.result(SOON)
    midst.tasks.shutdown()
    check_closed_manager(midst.tasks)


def test_the_collector_may_come_anywhere() -> None:
    before = gc.get_threshold()
    with TaskManager(max_concurrent=2) as tasks:

        class Cycle:
            def __init__(self) -> None:
                self.me, self.task = self, tasks.submit(int)

            def __del__(self) -> None:
                self.task.cancel()
                with contextlib.suppress(PoolClosedError):  # the last of them go when all is over
                    tasks.submit(int)

        def many() -> None:
            for _ in range(1500):
                Cycle()
                tasks.submit(int)

        gc.set_threshold(40, 2, 2)
        try:
            busy = threading.Thread(target=many, daemon=True)
            busy.start()
            busy.join(3 * SOON)
            assert not busy.is_alive()
        finally:
            gc.set_threshold(*before)
        gc.collect()
        assert tasks.drain(SOON)
    check_closed_manager(tasks)


def test_a_drain_waits_for_a_call_that_is_under_way(midst: Midst) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        go_on.wait(SOON)

    midst.tasks._scheduler.later.add(call)
    assert begun.wait(SOON)
    assert not midst.tasks.drain(0.01)
    go_on.set()
    assert midst.tasks.drain(SOON)
