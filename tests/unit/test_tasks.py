"""The task manager: with a manual executor and a fake clock where it can be, with real threads where it must."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from typing import Any

import pytest

from tests.unit.test_task_invariants import Log, check_closed_manager, check_closed_pool, check_manager
from wiseflow_nb.context import TaskContext, check_cancelled, current_task
from wiseflow_nb.errors import (
    DependencyError,
    PoolClosedError,
    TaskAbandonedError,
    TaskCancelledError,
    TaskSkippedError,
    TaskTimeoutError,
    UsageError,
)
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.records import Priority, TaskState
from wiseflow_nb.tasks import Retry, Task, TaskManager, _runner
from wiseflow_nb.testing import FakeClock, ManualExecutor, Stage

SOON = 20.0
S = TaskState


class Bench:
    """A manager whose time and threads the test drives."""

    def __init__(self, **options: Any) -> None:
        self.clock = FakeClock()
        self.executor = ManualExecutor()
        self.log: Log = []
        self.tasks = TaskManager(
            self.executor, clock=self.clock, on_change=lambda *change: self.log.append(change), **options
        )

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def run(self) -> None:
        self.executor.run_all()

    def states(self, task: Task[Any]) -> list[str]:
        return [move.to_state.value for _, move in self.log if move is not None and move.task_id == task.id]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    check_manager(made.tasks, made.log)
    made.tasks.resume()
    made.run()
    made.tasks.shutdown("cancel_pending")
    made.run()
    check_closed_manager(made.tasks, made.log)


@pytest.fixture
def live() -> Iterator[TaskManager]:
    log: Log = []
    tasks = TaskManager(max_concurrent=2, on_change=lambda *change: log.append(change))
    yield tasks
    check_manager(tasks)
    tasks.shutdown(timeout=SOON)
    check_closed_manager(tasks, log)
    assert isinstance(tasks.pool, ThreadPoolManager)
    check_closed_pool(tasks.pool)


def fail(message: str = "no") -> None:
    raise ValueError(message)


def given(value: Any) -> Any:
    return value


# -- arguments and dependencies -----------------------------------------------------------------


def test_tasks_among_arguments_become_their_results(bench: Bench) -> None:
    one = bench.tasks.submit(given, 1)
    two = bench.tasks.submit(lambda *args, **kwargs: (args, kwargs), one, [one, 2], key={"a": one}, pair=(one, one))
    assert (one.state, two.state, two.record().dependencies) == (S.PENDING, S.WAITING, (one.id,))
    bench.run()
    assert two.result(0) == ((1, [1, 2]), {"key": {"a": 1}, "pair": (1, 1)})
    assert bench.states(two) == ["waiting", "pending", "running", "completed"]


def test_failure_skips_all_that_depends_with_the_first_cause(bench: Bench) -> None:
    root = bench.tasks.submit(fail, "the root")
    middle = bench.tasks.submit(given, root)
    leaf = bench.tasks.options(dependencies=[middle.id], name="leaf").submit(int)
    anyway = bench.tasks.options(dependencies=[leaf], trigger="all_done").submit(lambda: "ran")
    handed = bench.tasks.options(trigger="all_done").submit(given, root)
    bench.run()
    for task in (middle, leaf):
        error = task.exception(0)
        assert isinstance(error, TaskSkippedError)
        assert isinstance(error.root_cause, ValueError)
        assert "the root" in str(error)
    assert (anyway.result(0), handed.result(0)) == ("ran", root)
    late = bench.tasks.submit(given, leaf)
    assert late.state is S.SKIPPED
    assert [task.record().attempt for task in (middle, leaf, late)] == [0, 0, 0]


def test_dependencies_that_cannot_be(bench: Bench) -> None:
    other = Bench()
    foreign = other.tasks.submit(int)
    with pytest.raises(DependencyError, match="t1 -> t9: there is no task"):
        bench.tasks.options(dependencies=["t9"]).submit(int)
    with pytest.raises(DependencyError, match="t1 -> t1"):
        bench.tasks.options(dependencies=["t1"]).submit(int)
    with pytest.raises(DependencyError, match="another manager"):
        bench.tasks.submit(given, foreign)
    assert bench.tasks.records() == ()
    other.tasks.shutdown("now")
    assert foreign.cancelled()


def test_options_are_checked(bench: Bench) -> None:
    options = bench.tasks.options
    with pytest.raises(UsageError, match="unknown option prio; the options are: name, priority, dependencies, retry"):
        options(prio=1)
    bad: list[tuple[str, Any]] = [
        ("priority", "urgent"),
        ("timeout", 0),
        ("deadline", "x"),
        ("cleanup", 3),
        ("trigger", "x"),
        ("tags", 3),
        ("dependencies", [1]),
        ("retry", -1),
    ]
    for name, value in bad:
        with pytest.raises(UsageError):
            options(**{name: value})
    with pytest.raises(UsageError, match="auto, thread, async"):
        options(kind="greenlet")
    with pytest.raises(UsageError, match="cannot be called"):
        bench.tasks.submit(3)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="max_concurrent"):
        bench.tasks.set_max_concurrent(0)
    task = options(tags="a", name="n", retry=None, priority=3, timeout=None).submit(int)
    assert (task.record().tags, task.name, task.record().priority) == (("a",), "n", Priority.CRITICAL)


# -- order ---------------------------------------------------------------------------------------


def test_the_highest_class_goes_first_even_if_it_comes_last(bench: Bench) -> None:
    ran: list[str] = []
    for name in ("low", "normal", "low", "high", "critical"):
        bench.tasks.options(priority=name).submit(ran.append, name)
    bench.run()
    assert ran == ["critical", "high", "normal", "low", "low"]


def test_a_dependency_inherits_the_class_of_who_waits(bench: Bench) -> None:
    bench.tasks.set_max_concurrent(1)
    ran: list[str] = []
    base = bench.tasks.options(priority="low").submit(ran.append, "base")
    bench.tasks.submit(ran.append, "normal")
    urgent = bench.tasks.options(priority="critical", dependencies=[base]).submit(ran.append, "urgent")
    assert base.record().priority is Priority.LOW
    bench.run()
    assert ran == ["base", "urgent", "normal"]
    assert urgent.done()


def test_the_loan_ends_with_the_borrower(bench: Bench) -> None:
    ran: list[str] = []
    base = bench.tasks.options(priority="low").submit(ran.append, "base")
    bench.tasks.submit(ran.append, "normal")
    urgent = bench.tasks.options(priority="critical", dependencies=[base]).submit(int)
    assert urgent.cancel()
    bench.run()
    assert ran == ["normal", "base"]


def test_ageing_and_reprioritise(bench: Bench) -> None:
    ran: list[str] = []
    bench.tasks.options(priority="low").submit(ran.append, "old")
    bench.advance(61)
    bench.tasks.options(priority="normal").submit(ran.append, "normal")
    late = bench.tasks.options(priority="low").submit(ran.append, "late")
    assert bench.tasks.reprioritise(late.id, "critical")
    assert not bench.tasks.reprioritise("t9", "low")
    bench.run()
    assert ran == ["late", "old", "normal"]


def test_the_bound_holds_and_moves_live(bench: Bench) -> None:
    bench.tasks.set_max_concurrent(1)
    for _ in range(5):
        bench.tasks.submit(int)
    assert bench.executor.pending == 1
    assert bench.tasks.pending_thread_tasks == 0
    bench.tasks.set_max_concurrent(3)
    assert bench.executor.pending == 3
    assert bench.tasks.counts()["pending"] == 5


def test_nothing_starts_while_paused(bench: Bench) -> None:
    early = bench.tasks.submit(int)
    bench.tasks.pause()
    late = bench.tasks.submit(int)
    bench.run()
    assert bench.tasks.paused
    assert (early.state, late.state) == (S.PENDING, S.PENDING)
    bench.tasks.resume()
    bench.run()
    assert (early.state, late.state) == (S.COMPLETED, S.COMPLETED)


# -- retries, time-outs, deadlines ---------------------------------------------------------------


def test_backoff_is_exact_and_frees_the_slot(bench: Bench) -> None:
    bench.tasks.set_max_concurrent(1)
    task = bench.tasks.options(retry=Retry(3, jitter=None)).submit(fail)
    for delay in (1.0, 2.0, 4.0):
        bench.run()
        assert task.state is S.RETRY_WAIT
        assert bench.tasks.submit(int).id
        bench.run()
        bench.advance(delay - 0.25)
        assert task.state is S.RETRY_WAIT
        bench.advance(0.25)
        assert task.state is S.PENDING
    bench.run()
    assert (task.state, task.record().attempt, task.record().max_attempts) == (S.FAILED, 4, 4)
    starts = [m.time_seconds for _, m in bench.log if m and m.task_id == task.id and m.to_state is S.RUNNING]
    assert [b - a for a, b in itertools.pairwise(starts)] == [1, 2, 4]
    assert "ValueError" in task.record().traceback


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, TaskCancelledError, asyncio.CancelledError])
def test_some_things_are_never_retried(bench: Bench, error: type[BaseException]) -> None:
    def leave() -> None:
        raise error("enough")

    task = bench.tasks.options(retry=Retry(3, on=(BaseException,))).submit(leave)
    bench.run()
    assert task.state is (S.CANCELLED if "Cancel" in error.__name__ else S.FAILED)
    assert task.record().attempt == 1


def test_a_thread_that_times_out_is_cancelling_until_it_returns(bench: Bench) -> None:
    seen: list[object] = []

    def work() -> str:
        bench.advance(4.9)
        seen.append(bench.tasks.records()[-1].state)
        bench.advance(0.1)
        record = bench.tasks.records()[-1]
        seen.append((record.state, record.reason))
        with pytest.raises(TaskCancelledError, match="timed out"):
            check_cancelled()
        return "too late"

    task = bench.tasks.options(timeout=5).submit(work)
    bench.run()
    assert seen == [S.RUNNING, (S.CANCELLING, "timed out")]
    assert isinstance(task.exception(0), TaskTimeoutError)
    assert (task.state, task.record().wall_seconds) == (S.TIMED_OUT, pytest.approx(5.0))
    again = bench.tasks.options(timeout=5, retry=1).submit(work)
    bench.run()
    assert bench.states(again)[-2:] == ["cancelling", "retry_wait"]
    again.cancel()
    assert again.state is S.CANCELLED


def test_a_deadline_counts_waiting_too(bench: Bench) -> None:
    bench.tasks.pause()
    waits = bench.tasks.submit(int)
    pending = bench.tasks.options(deadline=5).submit(int)
    waiting = bench.tasks.options(deadline=5, dependencies=[waits]).submit(int)
    skipped = bench.tasks.submit(given, waiting)
    bench.advance(5)
    assert [task.state for task in (pending, waiting, skipped)] == [S.TIMED_OUT, S.TIMED_OUT, S.SKIPPED]
    bench.tasks.resume()
    retried = bench.tasks.options(deadline=5, retry=Retry(9, base=9, jitter=None)).submit(fail)
    running = bench.tasks.options(deadline=5, retry=9).submit(lambda: bench.advance(5))
    bench.run()
    assert [task.state for task in (retried, running)] == [S.TIMED_OUT, S.TIMED_OUT]


def test_the_timer_thread_goes_by_the_clock() -> None:
    clock = FakeClock()
    with TaskManager(ManualExecutor(), clock=clock) as tasks:
        far = tasks.options(deadline=100).submit(int)
        near = tasks.options(deadline=5).submit(int)
        clock.advance(6)
        assert isinstance(near.exception(SOON), TaskTimeoutError)
        assert far.state is S.PENDING
        clock.advance(100)
        assert isinstance(far.exception(SOON), TaskTimeoutError)
    check_closed_manager(tasks)


# -- cancel and cleanup --------------------------------------------------------------------------


def test_cancel_before_it_runs_needs_no_cleanup(bench: Bench) -> None:
    ran: list[str] = []
    task = bench.tasks.options(cleanup=lambda: ran.append("x")).submit(ran.append, "ran")
    assert bench.tasks.cancel(task.id, "no use")
    assert task.cancel()
    bench.run()
    assert (ran, task.cancelled(), task.done()) == ([], True, True)
    with pytest.raises(TaskCancelledError, match="no use"):
        task.result(0)
    with pytest.raises(TaskCancelledError, match="no use"):
        task.exception(0)
    assert not bench.tasks.cancel("t9")
    done = bench.tasks.submit(int)
    bench.run()
    assert not done.cancel()


def test_what_comes_during_cleanup(bench: Bench) -> None:
    by: dict[str, Task[Any]] = {}

    def cleanup(context: TaskContext) -> None:
        if context.name == "cancel":
            assert by["cancel"].cancel()
        bench.advance(10)

    options = {"cleanup": cleanup, "retry": Retry(3, base=1000, jitter=None)}
    by["cancel"] = bench.tasks.options(name="cancel", **options).submit(fail)
    by["timeout"] = bench.tasks.options(name="timeout", timeout=5, **options).submit(fail)
    by["deadline"] = bench.tasks.options(name="deadline", deadline=25, **options).submit(fail)
    bench.run()
    assert {name: task.state for name, task in by.items()} == {
        "cancel": S.FAILED,
        "timeout": S.RETRY_WAIT,
        "deadline": S.RETRY_WAIT,
    }
    assert by["timeout"].record().error == "ValueError: no"


def test_a_cancel_by_a_person_outweighs_a_deadline(bench: Bench) -> None:
    def work() -> None:
        context = current_task()
        assert context is not None
        bench.tasks.cancel(context.task_id, "by hand")
        bench.advance(10)

    task = bench.tasks.options(deadline=5).submit(work)
    bench.run()
    assert (task.state, task.record().reason) == (S.CANCELLED, "by hand")


def test_a_failure_keeps_no_locals_alive_once_the_task_is_gone(bench: Bench) -> None:
    class Big:
        pass

    def work() -> None:
        big = Big()
        refs.append(weakref.ref(big))
        fail()

    refs: list[weakref.ref[Big]] = []
    task = bench.tasks.submit(work)
    bench.run()
    late = bench.tasks.submit(given, task)
    assert isinstance(late._job.cause(), ValueError)
    task_id = task.id
    del task, late
    gc.collect()
    bench.tasks._scheduler.ledger.jobs["t2"].call = (given, (), {})  # what keeps the first task for a retry
    gc.collect()
    assert refs[0]() is None
    skipped = bench.tasks.options(dependencies=[task_id]).submit(int)
    assert "ValueError: no" in str(skipped.exception(0))


def test_cleanup_order_and_a_failing_handler(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    ran: list[str] = []
    bench.tasks.register_resource_cleanup_handler(lambda: ran.append("manager 1"))
    remove = bench.tasks.register_resource_cleanup_handler(lambda context: ran.append(context.name))

    def work() -> None:
        context = current_task()
        assert context is not None
        context.push_cleanup(ran.append, "pushed 1")
        context.push_cleanup(ran.append, "pushed 2")
        fail()

    def own() -> None:
        ran.append("own")
        raise OSError("cannot close")

    task = bench.tasks.options(cleanup=own, name="n", retry=Retry(1, base=0)).submit(work)
    bench.run()
    once = ["pushed 2", "pushed 1", "own", "n", "manager 1"]
    assert ran == once
    bench.advance(0)
    bench.run()
    assert ran == once * 2
    assert isinstance(task.exception(0), ValueError)
    assert "OSError: cannot close" in task.record().reason
    assert bench.tasks.cleanup_failures == 2
    assert "cannot close" in caplog.text
    remove()
    remove()
    bench.tasks.submit(fail)
    bench.run()
    assert ran[-1] == "manager 1"
    assert ran.count("n") == 2
    with pytest.raises(UsageError):
        bench.tasks.register_resource_cleanup_handler(3)  # type: ignore[arg-type]


def test_a_cancelled_thread_task_by_what_its_code_does(bench: Bench) -> None:
    def work(how: str) -> str:
        context = current_task()
        assert context is not None
        bench.tasks.cancel(context.task_id, "stop")
        if how == "check":
            check_cancelled()
        if how == "fail":
            fail()
        return how

    by = {how: bench.tasks.options(retry=3).submit(work, how) for how in ("return", "check", "fail")}
    bench.run()
    assert {how: task.state for how, task in by.items()} == {
        "return": S.CANCELLED,
        "check": S.CANCELLED,
        "fail": S.FAILED,
    }


def test_an_async_cancel_stops_the_coroutine_and_cleans_up_once(live: TaskManager) -> None:
    entered, cleaned = threading.Event(), []

    async def own() -> None:
        await asyncio.sleep(0)
        cleaned.append(threading.current_thread().name)

    def plain() -> None:
        cleaned.append(threading.current_thread().name)

    async def work() -> None:
        context = current_task()
        assert context is not None
        context.push_cleanup(plain)
        entered.set()
        await asyncio.Event().wait()

    task = live.options(cleanup=own).submit(work)
    assert entered.wait(SOON)
    assert task.running()
    assert task.cancel()
    with pytest.raises(TaskCancelledError):
        task.result(SOON)
    assert task.state is S.CANCELLED
    assert len(cleaned) == 2
    assert cleaned[1] == "wiseflow-tasks"
    assert cleaned[0] != "wiseflow-tasks"


def test_a_coroutine_that_swallows_the_cancel_stays_cancelling(live: TaskManager) -> None:
    entered, swallowed, cleaned = threading.Event(), threading.Event(), []
    go: asyncio.Event | None = None

    async def work() -> str:
        nonlocal go
        go = asyncio.Event()
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            swallowed.set()
        await go.wait()
        return "stubborn"

    task = live.options(cleanup=lambda: cleaned.append(1)).submit(work)
    assert entered.wait(SOON)
    task.cancel()
    assert swallowed.wait(SOON)
    assert (task.state, task.done(), cleaned) == (S.CANCELLING, False, [])
    assert go is not None
    live._scheduler.loop.call(go.set)
    with pytest.raises(TaskCancelledError):
        task.result(SOON)
    assert cleaned == [1]


def test_an_async_timeout_stops_for_real() -> None:
    clock, entered, stopped = FakeClock(), threading.Event(), threading.Event()

    async def work() -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    with TaskManager(ManualExecutor(), clock=clock) as tasks:
        task = tasks.options(timeout=2).submit(work)
        assert entered.wait(SOON)
        assert task.state is S.RUNNING
        clock.advance(2)
        assert isinstance(task.exception(SOON), TaskTimeoutError)
        assert stopped.is_set()
        assert task.record().wall_seconds == 2
    check_closed_manager(tasks)


def test_async_cancel_before_the_first_step_closes_the_coroutine(live: TaskManager) -> None:
    hold = threading.Event()
    live._scheduler.loop.call(hold.wait, SOON)

    async def work() -> None:
        raise AssertionError("must not run")

    begun = live.submit(work())
    # RUNNING when its code is: the loop is busy.
    assert begun.state is S.PENDING
    live.pause()
    never = live.submit(work())
    begun.cancel()
    never.cancel()
    hold.set()
    for task in (begun, never):
        with pytest.raises(TaskCancelledError):
            task.result(SOON)
    live.resume()


# -- waiting for tasks ---------------------------------------------------------------------------


def test_nested_waits_do_not_deadlock_with_one_slot() -> None:
    with TaskManager(ThreadPoolManager(1, 1), max_concurrent=1) as tasks:

        def blocking(depth: int) -> int:
            return depth and 1 + tasks.submit(blocking, depth - 1).result(SOON)

        async def awaiting(depth: int) -> int:
            return depth and 1 + await tasks.submit(awaiting, depth - 1)

        async def gathered() -> list[int]:
            return list(await asyncio.gather(*[tasks.submit(awaiting, 2) for _ in range(3)]))

        assert tasks.submit(blocking, 6).result(SOON) == 6
        assert tasks.submit(awaiting, 6).result(SOON) == 6
        assert tasks.submit(gathered).result(SOON) == [2, 2, 2]
        assert tasks.submit(lambda: tasks.submit(awaiting, 3).result(SOON)).result(SOON) == 3
    check_closed_manager(tasks)
    assert isinstance(tasks.pool, ThreadPoolManager)
    tasks.pool.shutdown()


def test_who_waited_goes_on_only_with_a_slot() -> None:
    running, most = 0, 0
    lock = threading.Lock()
    with TaskManager(max_concurrent=2) as tasks:

        def count(change: int) -> None:
            nonlocal running, most
            with lock:
                running += change
                most = max(most, running)

        def leaf() -> int:
            count(1)
            count(-1)
            return 1

        def parent() -> int:
            count(1)
            children = tasks.map(lambda _: leaf(), range(3))
            total = 0
            for child in children:
                count(-1)
                total += child.result(SOON)
                count(1)
            count(-1)
            return total

        assert sum(task.result(SOON) for task in tasks.map(lambda _: parent(), range(20))) == 60
    # The count goes down a moment before the slot is given up, never later: it cannot overstate.
    assert most <= 2
    check_closed_manager(tasks)


def test_who_wants_its_slot_back_goes_before_what_a_worker_would_take_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runner, "SLICE_SECONDS", 1000.0)
    gate, begun, order = threading.Event(), threading.Event(), []

    def hold() -> None:
        begun.set()
        assert gate.wait(SOON)

    def parent() -> None:
        tasks.options(priority="high").submit(int).result()
        order.append("parent")

    with ThreadPoolManager(4, 4) as pool, TaskManager(pool, max_concurrent=1) as tasks:
        tasks.pause()
        first, held, last = tasks.submit(parent), tasks.submit(hold), tasks.submit(order.append, "last")
        tasks.resume()
        assert begun.wait(SOON)
        while not (tasks._scheduler.slots.returning or order):
            time.sleep(0.001)
        gate.set()
        for task in (first, held, last):
            task.result(SOON)
    assert order == ["parent", "last"]


def test_waiting_in_a_circle_is_refused(live: TaskManager) -> None:
    ready, made = threading.Event(), []

    def first() -> str:
        assert ready.wait(SOON)
        with pytest.raises(DependencyError, match="t1 -> t2 -> t1"):
            made[0].result(SOON)
        with pytest.raises(DependencyError, match="t1 -> t1"):
            made[1].result(SOON)
        return "refused"

    task = live.submit(first)
    made += [live.submit(given, task), task]
    ready.set()
    assert made[0].result(SOON) == "refused"


def test_blocking_on_the_loop_is_refused(live: TaskManager) -> None:
    async def work() -> None:
        live.submit(asyncio.sleep, 0).result()

    with pytest.raises(UsageError, match="await task"):
        live.submit(work).result(SOON)


def test_tasks_are_futures(live: TaskManager) -> None:
    tasks = [live.submit(given, i) for i in range(5)] + [live.submit(asyncio.sleep, 0, i) for i in range(5)]
    assert sorted(task.result() for task in as_completed(tasks, SOON)) == sorted([*range(5), *range(5)])

    async def main() -> list[int]:
        return [await live.submit(given, 1), await live.submit(asyncio.sleep, 0, 2)]

    assert asyncio.run(main()) == [1, 2]

    async def cancelled() -> None:
        live.pause()
        task = live.submit(int)
        asyncio.get_running_loop().call_soon(task.cancel)
        with pytest.raises(TaskCancelledError):
            await task
        with pytest.raises(TaskCancelledError):
            await task
        other = live.submit(int)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(other, 0.001)
        assert other.cancelled()
        live.resume()

    asyncio.run(cancelled())
    with pytest.raises(TimeoutError):
        live.submit(threading.Event().wait, 0.05).result(0.001)


def test_done_callbacks_may_use_the_manager(bench: Bench) -> None:
    seen: list[object] = []
    task = bench.tasks.submit(int)
    task.add_done_callback(lambda item: seen.append((item.result(), bench.tasks.submit(given, 2))))
    bench.run()
    assert seen[0][0] == 0  # type: ignore[index]
    assert bench.tasks.counts()["completed"] == 2


# -- running -------------------------------------------------------------------------------------


def test_figures_are_honest(live: TaskManager) -> None:
    def burn(seconds: float = 0.05) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    async def steps() -> None:
        burn(0.03)
        await asyncio.sleep(0.1)
        burn(0.03)

    thread, coroutine = live.submit(burn), live.submit(steps)
    idle = live.submit(threading.Event().wait, 0.2)
    for task in (thread, coroutine, idle):
        task.result(SOON)
    assert thread.record().cpu_seconds >= 0.05
    assert thread.record().cpu_source == "thread_time"
    assert coroutine.record().cpu_seconds >= 0.06
    assert coroutine.record().cpu_source == "coroutine_steps"
    assert coroutine.record().wall_seconds >= 0.15
    assert idle.record().wall_seconds >= 0.19
    assert idle.record().cpu_seconds < 0.1
    assert idle.record().memory_source == "unknown"
    assert idle.record().memory_peak_bytes != idle.record().memory_peak_bytes


def test_progress_reaches_the_record(bench: Bench) -> None:
    def work() -> None:
        context = current_task()
        assert context is not None
        context.progress(0.5, "half")

    task = bench.tasks.submit(work)
    bench.run()
    assert (task.record().progress, task.record().progress_text) == (0.5, "half")
    assert [record.state for record, move in bench.log if move is None] == [S.RUNNING]


def test_a_failing_on_change_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*change: object) -> None:
        fail("listener")

    executor = ManualExecutor()
    with TaskManager(executor, on_change=broken) as tasks:
        task = tasks.submit(int)
        executor.run_all()
        assert task.result(0) == 0
    assert tasks._scheduler.ledger.callback_failures == 3
    assert caplog.text.count("on_change failed") == 1


def test_what_runs_where(live: TaskManager) -> None:
    class Callable_:  # noqa: N801
        async def __call__(self) -> str:
            return threading.current_thread().name

    def name() -> str:
        return threading.current_thread().name

    async def coroutine() -> str:
        return name()

    assert live.submit(name).result(SOON) != "wiseflow-tasks"
    on_loop: list[Any] = [coroutine, coroutine(), Callable_()]
    assert {live.submit(item).result(SOON) for item in on_loop} == {"wiseflow-tasks"}
    assert live.options(kind="async").submit(lambda: coroutine()).result(SOON) == "wiseflow-tasks"
    with pytest.raises(UsageError, match="kind='async'"):
        live.submit(lambda: coroutine()).result(SOON)
    with pytest.raises(UsageError, match="no awaitable"):
        live.options(kind="async").submit(name).result(SOON)
    left = coroutine()
    with pytest.raises(UsageError, match="submit its function"):
        live.options(retry=1).submit(left)
    left.close()


def test_code_that_ends_the_interpreter_ends_only_its_task(live: TaskManager) -> None:
    async def leave() -> None:
        raise SystemExit(3)

    assert isinstance(live.submit(leave).exception(SOON), SystemExit)
    assert live.submit(asyncio.sleep, 0, "alive").result(SOON) == "alive"


def test_the_decorator_and_map(live: TaskManager) -> None:
    @live.task(name="twice", priority="high")
    def double(x: int) -> int:
        """Doc."""
        return 2 * x

    @live.task
    async def triple(x: int) -> int:
        return 3 * x

    task = double(2)
    assert (task.result(SOON), task.name, double.fn(1), double.__doc__) == (4, "twice", 2, "Doc.")
    assert triple(double(1)).result(SOON) == 6
    assert [item.result(SOON) for item in live.map(pow, [2, 3], [3, 2])] == [8, 9]
    assert [item.name for item in live.options(name="m").map(abs, [1, 2])] == ["m", "m"]
    assert live.task(task.id) is task


def test_a_full_pool_leaves_tasks_pending_and_a_resize_wakes_them() -> None:
    entered, go = threading.Semaphore(0), threading.Event()

    def work() -> None:
        entered.release()
        assert go.wait(SOON)

    with ThreadPoolManager(1, 3) as pool, TaskManager(pool, max_concurrent=3) as tasks:
        pool.resize(1)
        made = tasks.map(lambda _: work(), range(3))
        assert entered.acquire(timeout=SOON)
        assert tasks.counts()["running"] == 1
        assert tasks.pending_thread_tasks == 2
        assert tasks.submit(asyncio.sleep, 0, "not held up").result(SOON) == "not held up"
        pool.resize(3)
        assert entered.acquire(timeout=SOON)
        assert entered.acquire(timeout=SOON)
        check_manager(tasks)
        go.set()
        assert len(list(as_completed(made, SOON))) == 3
    check_closed_manager(tasks)


def test_a_pool_that_is_closed_under_it_fails_the_tasks() -> None:
    pool = ThreadPoolManager(1, 1)
    entered, go = threading.Event(), threading.Event()
    pool.submit(lambda: entered.set() or go.wait(SOON))
    assert entered.wait(SOON)
    tasks = TaskManager(pool)
    queued = tasks.submit(int)
    pool.shutdown(wait=False, cancel_futures=True)
    late = tasks.submit(int)
    go.set()
    for task in (queued, late):
        assert isinstance(task.exception(SOON), PoolClosedError)
        assert task.state is S.FAILED
    tasks.shutdown()
    check_closed_manager(tasks)


# -- by hand -------------------------------------------------------------------------------------


def test_retry_by_hand_brings_back_what_was_skipped(bench: Bench) -> None:
    works: list[bool] = []

    def flaky() -> int:
        return 5 if works else fail() or 0

    root = bench.tasks.options(name="root", tags=["x"]).submit(flaky)
    child = bench.tasks.submit(given, [root])
    leaf = bench.tasks.options(dependencies=[child.id]).submit(given, child)
    bench.run()
    works.append(True)
    again = bench.tasks.retry(root.id)
    bench.run()
    assert (again.result(0), again.name, again.record().retry_of, again.record().tags) == (5, "root", root.id, ("x",))
    new = {record.retry_of: record for record in bench.tasks.records() if record.retry_of}
    assert set(new) == {root.id, child.id, leaf.id}
    assert all(record.state is S.COMPLETED for record in new.values())
    assert (root.state, child.state) == (S.FAILED, S.SKIPPED)
    for wrong, told in (
        (again.id, "submit it again"),
        (child.id, f"retry {root.id}, which brings it along"),
        ("t99", "no task"),
    ):
        with pytest.raises(UsageError, match=told):
            bench.tasks.retry(wrong)


def test_deltas_and_the_frame(bench: Bench) -> None:
    first = bench.tasks.submit(int)
    rev = bench.tasks.rev
    second = bench.tasks.options(priority="high").submit(fail)
    assert [record.task_id for record in bench.tasks.records(rev)] == [second.id]
    bench.run()
    assert [record.task_id for record in bench.tasks.records(rev)] == [second.id, first.id]
    assert bench.tasks.records(bench.tasks.rev) == ()
    frame = bench.tasks.frame()
    assert frame.index.tolist() == [first.id, second.id]
    assert frame["state"].tolist() == ["completed", "failed"]
    assert frame["priority"].tolist() == ["normal", "high"]
    assert all(str(frame[name].dt.tz) == "UTC" for name in ("created", "ready", "started", "finished"))
    assert bench.tasks.get("t9") is None
    assert bench.tasks.task("t9") is None
    assert TaskManager(ManualExecutor()).frame().empty


def test_old_finished_records_are_dropped_and_results_not_kept(bench: Bench) -> None:
    class Big:
        pass

    bench.tasks._scheduler.ledger._kept = 3
    for _ in range(5):
        bench.tasks.submit(int)
    waiting = bench.tasks.submit(Big)
    argument = Big()
    dead = weakref.ref(argument)
    user = bench.tasks.submit(lambda item: None, argument)
    bench.run()
    assert len(bench.tasks.records()) == 3
    assert sum(bench.tasks.counts().values()) == 7
    result = weakref.ref(waiting.result(0))
    task_id = waiting.id
    del argument, waiting
    gc.collect()
    assert (dead(), result(), bench.tasks.task(task_id)) == (None, None, None)
    assert user.done()


# -- shutdown ------------------------------------------------------------------------------------


def test_drain_lets_everything_end() -> None:
    tasks = TaskManager()
    first = tasks.submit(given, 1)
    second = tasks.submit(given, first)
    tasks.pause()
    tasks.shutdown()
    tasks.shutdown("now")
    assert second.result(0) == 1
    with pytest.raises(PoolClosedError):
        tasks.submit(int)
    check_closed_manager(tasks)


def test_cancel_pending_keeps_what_runs() -> None:
    entered, go = threading.Event(), threading.Event()

    def work() -> str:
        entered.set()
        assert go.wait(SOON)
        return "whole"

    tasks = TaskManager(max_concurrent=1)
    running = tasks.submit(work)
    assert entered.wait(SOON)
    pending = tasks.submit(int)
    waiting = tasks.submit(given, pending)
    pending.add_done_callback(lambda _: go.set())
    tasks.shutdown("cancel_pending")
    assert running.result(0) == "whole"
    assert (pending.state, waiting.state) == (S.CANCELLED, S.CANCELLED)
    check_closed_manager(tasks)


def test_what_does_not_stop_is_abandoned_and_still_cleaned_up() -> None:
    entered, go, cleaned = threading.Event(), threading.Event(), threading.Event()

    def stuck() -> None:
        entered.set()
        assert go.wait(SOON)

    async def clean() -> None:
        cleaned.set()

    log: Log = []
    tasks = TaskManager(on_change=lambda *change: log.append(change))
    task = tasks.options(cleanup=clean, retry=3).submit(stuck)
    child = tasks.submit(given, task)
    polite = tasks.submit(asyncio.sleep, 1000)
    assert entered.wait(SOON)
    tasks.shutdown("now", timeout=0.2)
    assert (task.state, child.state, polite.state) == (S.ABANDONED, S.CANCELLED, S.CANCELLED)
    assert isinstance(task.exception(0), TaskAbandonedError)
    assert not cleaned.is_set()
    go.set()
    assert cleaned.wait(SOON)
    check_closed_manager(tasks, log)
    tasks.pool.shutdown()
    assert tasks.records()[-1].state.terminal


def test_shutdown_is_refused_where_it_would_wait_for_itself(live: TaskManager) -> None:
    async def from_loop() -> None:
        live.shutdown()

    for work in (live.shutdown, from_loop):
        with pytest.raises(UsageError, match="wait for that very task"):
            live.submit(work).result(SOON)
    with pytest.raises(UsageError, match="drain, cancel_pending, now"):
        live.shutdown("soon")


@pytest.mark.parametrize("work", [int, functools.partial(asyncio.sleep, 0.01)])
@pytest.mark.parametrize("how", ["shutdown", "drain"])
def test_a_done_callback_that_would_wait_for_itself_is_refused(live: TaskManager, work: Any, how: str) -> None:
    told: queue.Queue[BaseException | None] = queue.Queue()

    def close(_: object) -> None:
        try:
            getattr(live, how)()
        except UsageError as error:
            told.put(error)
        else:
            told.put(None)

    gate = threading.Event()
    parent = live.submit(gate.wait, SOON)
    task = live.options(dependencies=[parent]).submit(work)
    task.add_done_callback(close)
    gate.set()
    with pytest.raises(UsageError, match=r"done-callback .* on a thread of its own"):
        raise told.get(timeout=SOON) or AssertionError("not refused")
    live.drain(SOON)
    task.add_done_callback(close)  # called here and now, where waiting is no harm
    assert told.get(timeout=SOON) is None


def test_many_tasks_from_many_threads(live: TaskManager) -> None:
    live.set_max_concurrent(4)
    made: list[list[Task[Any]]] = [[] for _ in range(4)]

    async def coroutine(x: int) -> int:
        await asyncio.sleep(0)
        return x

    def submit(which: int) -> None:
        for i in range(100):
            work: Callable[..., Any] = given if i % 2 else coroutine
            needed = made[which][-1:] if i % 3 == 0 else []
            task = live.options(priority=i % 4, dependencies=needed, trigger="all_done").submit(work, i)
            made[which].append(task)
            if i % 10 == 0:
                task.cancel()

    threads = [threading.Thread(target=submit, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every = [task for several in made for task in several]
    assert len(list(as_completed(every, SOON))) == 400
    assert {task.state for task in every} <= {S.COMPLETED, S.CANCELLED}
    assert all(task.cancelled() or task.result() == i for several in made for i, task in enumerate(several))


def test_children_of_one_task_run_side_by_side() -> None:
    inside: list[int] = []

    async def parent() -> None:
        await asyncio.sleep(1)

    async def child(number: int, _: object) -> None:
        inside.append(number)
        await asyncio.sleep(1)

    stage = Stage()
    tasks = TaskManager(**stage.parts, max_concurrent=3)
    first = tasks.submit(parent)
    stage.run()
    for number in range(3):
        tasks.submit(child, number, first)
    stage.advance(1)
    together = list(inside)
    tasks.shutdown("now", timeout=0)
    assert together == [0, 1, 2]
