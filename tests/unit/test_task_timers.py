"""The timer thread: what takes time, or never returns, holds up no other time-out."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.unit.test_task_invariants import check_closed_manager
from wiseflow_nb.clock import SYSTEM_CLOCK
from wiseflow_nb.tasks import Retry, Task, TaskManager
from wiseflow_nb.tasks._timer import Timers

SOON = 20.0


def held_back(tasks: TaskManager, gate: threading.Event) -> Task[Any]:
    """A task that its deadline ends at once, since it waits for another."""
    return tasks.options(deadline=0.01, dependencies=[tasks.submit(gate.wait, SOON)]).submit(int)


def test_a_callback_that_does_not_return_holds_up_no_time_out() -> None:
    gate, entered, go = threading.Event(), threading.Event(), threading.Event()
    threads, given_up = [], []

    def block(_: object) -> None:
        threads.append(threading.current_thread())
        entered.set()
        if not go.wait(SOON):
            given_up.append(1)

    with TaskManager(max_concurrent=4) as tasks:
        late = held_back(tasks, gate)
        late.add_done_callback(block)
        assert entered.wait(SOON)
        other = tasks.options(timeout=0.01).submit(gate.wait, SOON)
        ended = tasks.options(deadline=0.01, dependencies=[other]).submit(int)
        assert ended.exception(SOON) is not None
        assert not given_up
        assert tasks._scheduler.timers._thread not in threads
        go.set()
        gate.set()
    check_closed_manager(tasks)


def test_a_callback_may_wait_for_a_task_that_waits_for_its_next_attempt() -> None:
    gate, told = threading.Event(), []
    failed = threading.Event()

    def flaky() -> str:
        if not failed.is_set():
            failed.set()
            raise ValueError("once")
        return "at last"

    with TaskManager(max_concurrent=2) as tasks:
        retried = tasks.options(retry=Retry(1, base=0.05, jitter=None)).submit(flaky)
        assert failed.wait(SOON)
        late = held_back(tasks, gate)
        late.add_done_callback(lambda _: told.append(retried.result(SOON)))
        assert retried.result(SOON) == "at last"
        gate.set()
    assert told == ["at last"]
    check_closed_manager(tasks)


def test_an_executor_that_does_not_take_a_call_at_once_holds_up_no_time_out() -> None:
    class Reluctant(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            if failed.is_set() and not go.is_set():
                entered.set()
                if not go.wait(SOON):
                    given_up.append(1)
            return super().submit(fn, *args, **kwargs)

    failed, entered, go = threading.Event(), threading.Event(), threading.Event()
    given_up = []

    def flaky() -> None:
        if not failed.is_set():
            failed.set()
            raise ValueError("once")

    with Reluctant(1) as pool, TaskManager(pool, max_concurrent=1) as tasks:
        retried = tasks.options(retry=Retry(1, base=0.05, jitter=None)).submit(flaky)
        assert entered.wait(SOON)
        never = tasks.options(deadline=0.01, dependencies=[retried]).submit(int)
        assert never.exception(SOON) is not None
        assert not given_up
        go.set()
        assert retried.exception(SOON) is None
    check_closed_manager(tasks)


def test_shutdown_waits_for_no_callback_beyond_its_time() -> None:
    gate, entered, go = threading.Event(), threading.Event(), threading.Event()
    given_up = []

    def block(_: object) -> None:
        entered.set()
        if not go.wait(SOON):
            given_up.append(1)

    # One whose end the timer told, one whose end a worker told.
    tasks = TaskManager(max_concurrent=4)
    late = held_back(tasks, gate)
    late.add_done_callback(block)
    assert entered.wait(SOON)
    entered.clear()
    plain = tasks.options(dependencies=[late], trigger="all_done").submit(int)
    plain.add_done_callback(block)
    gate.set()
    assert entered.wait(SOON)
    tasks.shutdown("now", timeout=0.1)
    assert not given_up
    go.set()
    assert tasks.drain(SOON)
    check_closed_manager(tasks)


def test_without_a_further_thread_the_timer_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    timers, done = Timers(SYSTEM_CLOCK, "timers"), threading.Event()

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def first() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            timers.step_aside()
        assert timers._thread is threading.current_thread()
        timers.at(0.0, done.set)

    timers.at(0.0, first)
    assert done.wait(SOON)
    timers.close()


def test_who_has_stepped_aside_ends_and_is_not_waited_for() -> None:
    timers, entered, go = Timers(SYSTEM_CLOCK, "timers"), threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def first() -> None:
        threads.append(threading.current_thread())
        timers.step_aside()
        timers.step_aside()  # nothing more
        entered.set()
        go.wait(SOON)

    timers.at(0.0, first)
    assert entered.wait(SOON)
    done = threading.Event()
    timers.at(0.0, done.set)
    assert done.wait(SOON)
    timers.close()
    assert threads[0].is_alive()
    go.set()
    threads[0].join(SOON)
    assert not threads[0].is_alive()
