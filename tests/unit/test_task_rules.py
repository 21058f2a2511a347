"""Admission by memory, output tails, bounded maps, released results, cleanup options, stalled tasks, drain."""

from __future__ import annotations

import asyncio
import doctest
import gc
import io
import itertools
import logging
import math
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wiseflow_nb.testing
from tests.unit.test_task_invariants import Log, check_closed_manager, check_manager
from wiseflow_nb.config import Settings
from wiseflow_nb.context import OutputTail, TaskContext, current_task
from wiseflow_nb.errors import DependencyError, TaskCancelledError, TaskSkippedError, UsageError
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.records import HasRecord, Priority, Sample, TaskRecord, TaskState
from wiseflow_nb.tasks import Task, TaskManager, _closing, _runner, memory_gauges
from wiseflow_nb.tasks._admission import hold_reason, parse_size
from wiseflow_nb.tasks._output import TaskOutput, routed
from wiseflow_nb.tasks._stalled import NAMES_KEPT, UsualTimes, find_stalled
from wiseflow_nb.tasks._timer import Timers
from wiseflow_nb.testing import FakeClock, ManualLoop, Stage

SOON = 20.0
S = TaskState


class Bench(Stage):
    """A manager that the test drives, with gauges that the test sets."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.available = 10e9
        self.pressure = "none"
        self.log: Log = []
        self.tasks = TaskManager(
            **self.parts,
            memory_available=lambda: self.available,
            pressure=lambda: self.pressure,
            on_change=lambda *change: self.log.append(change),
            **options,
        )


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    check_manager(made.tasks, made.log)
    made.pressure, made.available = "none", 1e15
    made.advance(10)
    made.tasks.shutdown("cancel_pending")
    made.executor.run_all()
    check_closed_manager(made.tasks, made.log)


def fail() -> None:
    raise ValueError("no")


def given_value(value: Any) -> Any:
    return value


def context() -> TaskContext:
    found = current_task()
    assert found is not None
    return found


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", "GB", "2XB", "-1GB", 0, -5, True, math.inf, math.nan, None, "2 G B", [1]])
def test_a_size_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match=r"memory .* is not a size; give bytes"):
        parse_size(value)


@settings(deadline=None, max_examples=60)
@given(st.floats(0.001, 1e6), st.sampled_from(["", "b", "kB", "MB", "gb", "TB", "KiB", "MiB", "GiB", "TiB", "g", "M"]))
def test_a_size_is_number_times_unit(number: float, unit: str) -> None:
    letter = unit.lower()[:1]
    power = "bkmgt".index(letter) if letter else 0
    base = 1024 if "i" in unit else 1000
    assert parse_size(f"{number!r}{unit}") == pytest.approx(number * base**power)


@settings(deadline=None, max_examples=60)
@given(
    level=st.sampled_from(Priority),
    need=st.none() | st.floats(1, 1e12),
    available=st.floats(0, 1e12) | st.just(math.nan),
    promised=st.floats(0, 1e12),
    pressure=st.sampled_from(["none", "warning", "critical"]),
    taken=st.booleans(),
)
def test_what_holds_a_task_back(
    level: Priority, need: float | None, available: float, promised: float, pressure: str, taken: bool
) -> None:
    reason = hold_reason(
        "'x' (t1)",
        level,
        need,
        available_bytes=available,
        promised_bytes=promised,
        pressure=pressure,
        reserve_taken=taken,
    )
    fits = need is None or math.isnan(available) or available - promised >= need
    calm = pressure != "critical" or (level is Priority.CRITICAL and not taken)
    assert (reason == "") == (fits and calm)


def test_a_task_starts_only_when_its_memory_is_there(bench: Bench) -> None:
    bench.available = 1e9
    big = bench.tasks.options(memory="2GB", name="big").submit(int)
    coroutine = bench.tasks.options(memory="2GB").submit(asyncio.sleep, 0)
    small = bench.tasks.options(memory=5e8).submit(int)
    plain = bench.tasks.submit(int)
    bench.run()
    # Those that ask are served in order, so that a large one gets in; who asks for nothing goes past.
    assert [task.state for task in (big, coroutine, small, plain)] == [S.PENDING, S.PENDING, S.PENDING, S.COMPLETED]
    assert "waits for 2.00 GB of memory: 1.00 GB are available" in bench.tasks.hold_reason
    bench.available = 2.5e9
    bench.advance(0.5)
    # What has just started has not taken its memory yet: it is promised.
    assert [task.done() for task in (big, coroutine, small)] == [True, False, False]
    assert "promised" in bench.tasks.hold_reason
    bench.advance(2.0)
    bench.advance(2.5)
    assert all(task.done() for task in (big, coroutine, small))
    assert bench.tasks.hold_reason == ""


def test_at_critical_memory_only_the_reserved_slot_serves(bench: Bench) -> None:
    ran: list[str] = []
    bench.pressure = "critical"
    bench.advance(1)
    for name in ("normal", "high", "critical", "critical"):
        bench.tasks.options(priority=name).submit(ran.append, name)
    bench.executor.run_next()
    held = bench.tasks.options(priority="critical").submit(asyncio.sleep, 1)
    bench.run()
    waits = bench.tasks.options(priority="critical").submit(ran.append, "second")
    bench.run()
    assert (ran, held.state, waits.state) == (["critical"], S.RUNNING, S.PENDING)
    assert "the next waits for it" in bench.tasks.hold_reason or "no task starts" in bench.tasks.hold_reason
    bench.advance(1)
    assert ran == ["critical", "critical", "second"]
    bench.pressure = "warning"
    bench.advance(1)
    assert ran == ["critical", "critical", "second", "high", "normal"]


def test_memory_that_turns_critical_takes_a_ticket_back(bench: Bench) -> None:
    task = bench.tasks.submit(int)
    assert bench.executor.pending == 1
    bench.pressure = "critical"
    bench.clock.advance(1)
    bench.executor.run_all()
    assert task.state is S.PENDING
    assert "memory is critical" in bench.tasks.hold_reason
    bench.pressure = "none"
    bench.advance(1)
    assert task.done()


def test_a_gauge_that_fails_holds_nothing_back(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage()

    def broken() -> Any:
        raise OSError("no gauge")

    with TaskManager(**stage.parts, memory_available=broken, pressure=broken) as tasks:
        task = tasks.options(memory="1GB").submit(int)
        stage.run()
        assert task.result(0) == 0
    assert tasks._scheduler.slots.admission.failures >= 2
    assert caplog.text.count("further failures are counted only") == 1


def test_the_gauges_of_a_monitor() -> None:
    class Source:
        sample: Sample | None = None

        def latest(self) -> Sample | None:
            return self.sample

        def sample_now(self) -> Sample:
            return Sample(memory_available_bytes=5.0)

    source, clock, given_settings = Source(), FakeClock(), Settings(memory_threshold=80)
    gauges = memory_gauges(source, lambda: given_settings, clock)
    assert (gauges["memory_available"](), gauges["pressure"]()) == (5.0, "none")
    told = []
    for ratio in (0.5, 0.7, 0.8, math.nan):
        source.sample = Sample(time_seconds=clock.time(), memory_utilization_ratio=ratio)
        told.append(gauges["pressure"]())
    assert told == ["none", "warning", "critical", "none"]
    source.sample = Sample(time_seconds=clock.time(), memory_utilization_ratio=0.99)
    clock.advance(3 * given_settings.resource_check_interval + 1)
    assert gauges["pressure"]() == "none"


def test_why_nothing_starts_while_paused(bench: Bench) -> None:
    bench.tasks.pause()
    assert "paused" in bench.tasks.hold_reason
    bench.tasks.resume()
    assert bench.tasks.hold_reason == ""


# -- output --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=50), max_size=60), st.integers(1, 40))
def test_a_tail_is_the_end_of_all(parts: list[str], limit: int) -> None:
    tail = OutputTail(limit)
    for part in parts:
        tail.write(part)
    assert tail.text() == "".join(parts)[-limit:]
    assert tail._kept <= 5 * limit


def test_output_is_kept_per_task_and_still_shown(capsys: pytest.CaptureFixture[str]) -> None:
    real = sys.stdout
    factory = logging.getLogRecordFactory()
    both = threading.Barrier(2)

    def work(name: str) -> None:
        both.wait(SOON)
        print("hello from", name)
        logging.getLogger("user").warning("%s warns", name)
        logging.getLogger("user").debug("not enabled")
        both.wait(SOON)

    async def talk() -> None:
        print("one")
        await asyncio.sleep(0)
        print("two")

    with TaskManager() as tasks:
        one, two, three = tasks.submit(work, "one"), tasks.submit(work, "two"), tasks.submit(talk)
        for task in (one, two, three):
            task.result(SOON)
        assert tasks.drain(SOON)
        assert sys.stdout is real
        assert logging.getLogRecordFactory() is factory
    assert one.record().output_tail == "hello from one\nWARNING user: one warns\n"
    assert two.record().output_tail == "hello from two\nWARNING user: two warns\n"
    assert three.record().output_tail == "one\ntwo\n"
    shown = capsys.readouterr().out
    assert sorted(shown.split("\n")) == sorted(["hello from one", "hello from two", "one", "two", ""])


def test_output_outside_of_tasks_is_nobodys_and_odd_things_pass() -> None:
    stream = io.StringIO()
    real, sys.stdout = sys.stdout, stream
    try:
        with routed(), routed():
            assert isinstance(sys.stdout, TaskOutput)
            print("plain")
            sys.stdout.writelines(["a", "b"])
            assert sys.stdout.getvalue() == "plain\nab"
            assert "StringIO" in repr(sys.stdout)
            assert list(iter(sys.stdout)) == []
        assert sys.stdout is stream
    finally:
        sys.stdout = real


def test_who_replaced_stdout_meanwhile_keeps_it() -> None:
    real = sys.stdout
    with routed():
        ours = sys.stdout
        sys.stdout = theirs = io.StringIO()
    assert sys.stdout is theirs
    # As a capture does that began while tasks ran: it puts our proxy back, which goes on passing through.
    sys.stdout = ours
    print("", end="")
    with routed():
        assert sys.stdout is ours
    assert sys.stdout is real


def test_a_log_call_that_does_not_fit_breaks_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    task = bench.tasks.submit(lambda: logging.getLogger("user").warning("%d", "x"))
    bench.run()
    assert task.result(0) is None
    assert task.record().output_tail == "WARNING user: %d\n"


# -- map, results, cleanup -------------------------------------------------------------------------


def test_a_bounded_map_draws_as_it_goes(bench: Bench) -> None:
    drawn: list[int] = []

    def numbers() -> Iterator[int]:
        for number in itertools.count():
            drawn.append(number)
            yield number

    results = bench.tasks.options(name="m").map(given_value, numbers(), outstanding=3)
    assert drawn == [0, 1, 2]
    bench.run()
    assert [next(results), next(results)] == [0, 1]
    assert drawn == [0, 1, 2, 3, 4]
    results.close()
    assert bench.tasks.counts()["cancelled"] == 2
    assert list(results) == []
    for wrong in (0, True, 1.5):
        with pytest.raises(UsageError, match="outstanding"):
            bench.tasks.map(int, [1], outstanding=wrong)  # type: ignore[call-overload]
    assert len(bench.tasks.map(int, [1, 2])) == 2


def test_a_bounded_map_in_order_from_both_worlds() -> None:
    async def main(tasks: TaskManager) -> list[int]:
        found = []
        async for value in tasks.map(asyncio.sleep, [0.002, 0.001, 0.0], [1, 2, 3], outstanding=2):
            found.append(value)
        return found

    def odd(number: int) -> int:
        if number % 2 == 0:
            raise ValueError(number)
        return number

    with TaskManager() as tasks:
        assert list(tasks.map(pow, range(50), itertools.repeat(2), outstanding=4)) == [n * n for n in range(50)]
        assert asyncio.run(main(tasks)) == [1, 2, 3]
        with tasks.map(odd, range(4), outstanding=2) as results:
            for number in range(4):
                if number % 2:
                    assert next(results) == number
                else:
                    with pytest.raises(ValueError, match=str(number)):
                        next(results)


def test_a_result_that_is_not_kept_goes_to_those_that_wait(bench: Bench) -> None:
    class Big:
        pass

    made: list[weakref.ref[Big]] = []

    def make() -> Big:
        big = Big()
        made.append(weakref.ref(big))
        return big

    lean = bench.tasks.options(keep_result=False)
    alone = lean.submit(make)
    parent = lean.submit(make)
    children = [bench.tasks.submit(lambda big: type(big).__name__, parent) for _ in range(2)]
    bench.executor.run_next()
    bench.executor.run_next()
    gc.collect()
    assert [ref() is None for ref in made] == [True, False]
    assert bench.executor.run_next()
    assert made[1]() is not None
    bench.run()
    gc.collect()
    assert [child.result(0) for child in children] == ["Big", "Big"]
    assert made[1]() is None
    assert (alone.result(0), parent.result(0), parent.state) == (None, None, S.COMPLETED)
    with pytest.raises(DependencyError, match="its result was released"):
        bench.tasks.submit(given_value, parent)
    with pytest.raises(UsageError, match="neither True nor False"):
        bench.tasks.options(keep_result=1)


def test_cleanup_that_runs_always(bench: Bench) -> None:
    ran: list[str] = []
    remove = bench.tasks.register_resource_cleanup_handler(lambda: ran.append("manager"), always=True)
    bench.tasks.register_resource_cleanup_handler(lambda: ran.append("failure only"))

    def work() -> int:
        context().push_cleanup(ran.append, "pushed")
        return 5

    own = bench.tasks.options(cleanup=lambda: ran.append("own"), cleanup_always=True).submit(work)
    bench.run()
    assert (own.result(0), ran) == (5, ["own", "manager"])
    remove()
    ran.clear()
    bench.tasks.options(cleanup=lambda: ran.append("own")).submit(work)
    coroutine = bench.tasks.options(cleanup=lambda: ran.append("coroutine"), cleanup_always=True).submit(
        asyncio.sleep, 0
    )
    while not coroutine.done():  # a plain handler of a coroutine runs on a thread of its own
        bench.run()
    assert ran == ["coroutine"]
    for wrong in (0, "x", None):
        with pytest.raises(UsageError, match="cleanup_budget"):
            bench.tasks.register_resource_cleanup_handler(int, budget=wrong)  # type: ignore[arg-type]


def test_a_plain_handler_over_its_budget_is_waited_for_no_longer(bench: Bench) -> None:
    seen: list[object] = []
    task: Task[None]

    def slow() -> None:
        bench.clock.advance(4.9)
        seen.append(task.state)
        bench.clock.advance(0.1)
        seen.append(task.state)

    later: list[str] = []
    bench.tasks.register_resource_cleanup_handler(lambda: later.append("ran"))
    task = bench.tasks.options(cleanup=slow, cleanup_budget=5.0).submit(fail)
    bench.run()
    assert seen == [S.RUNNING, S.FAILED]
    assert "over its 5 s and still runs" in task.record().reason
    assert (later, bench.tasks.cleanup_failures) == (["ran"], 1)


def test_an_asynchronous_handler_over_its_budget_is_cancelled(bench: Bench) -> None:
    stopped: list[bool] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            stopped.append(True)

    async def bad() -> None:
        fail()

    task = bench.tasks.options(cleanup=slow, cleanup_budget=5.0).submit(bad)
    bench.run()
    assert task.state is S.RUNNING
    bench.advance(5)
    assert (task.state, stopped) == (S.FAILED, [True])
    assert "over its budget of 5 s" in task.record().reason


# -- stalled -------------------------------------------------------------------------------------


def test_a_usual_time_needs_runs_and_is_bounded() -> None:
    usual = UsualTimes()
    for seconds in (1.0, 9.0):
        usual.add("a", seconds)
    assert math.isnan(usual.usual("a"))
    usual.add("a", 2.0)
    assert usual.usual("a") == 2.0
    for number in range(2 * NAMES_KEPT):
        usual.add(f"n{number}", 1.0)
    assert len(usual._runs) == NAMES_KEPT


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 1000), st.floats(0, 1000) | st.just(math.nan), st.booleans()), max_size=8),
    st.floats(0, 100) | st.just(math.nan),
)
def test_the_stalled_are_found_once_each_longest_first(cases: list[tuple[float, float, bool]], usual: float) -> None:
    running = [
        (
            TaskRecord(f"t{i}", "x", S.CANCELLING if asked else S.RUNNING, started_seconds=started),
            progress,
            started if asked else math.nan,
        )
        for i, (started, progress, asked) in enumerate(cases)
    ]
    found = find_stalled(running, lambda name: usual, 1000.0)
    assert len({item.task_id for item in found}) == len(found)
    assert [item.seconds for item in found] == sorted((item.seconds for item in found), reverse=True)
    kinds = {item.task_id: item.kind for item in found}
    for record, progress, asked_at in running:
        kind = kinds.get(record.task_id, "")
        if record.state is S.CANCELLING:
            assert kind == ("cancelling" if 1000 - asked_at > 10 else "")
        elif 1000 - progress > 60:
            assert kind == "no_progress"
        else:
            wall = 1000 - record.started_seconds
            assert (kind == "slow") == (wall > 3 * usual and wall > usual + 10)


def test_the_manager_tells_who_is_stuck(bench: Bench) -> None:
    async def quick() -> None:
        await asyncio.sleep(1)

    async def tells() -> None:
        context().progress(0.5)
        await asyncio.sleep(1000)

    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(1000)
                return
            except asyncio.CancelledError:
                pass

    for _ in range(3):
        bench.tasks.options(name="n").submit(quick)
        bench.run()
        bench.advance(1)
    slow = bench.tasks.options(name="n").submit(asyncio.sleep, 1000)
    told, deaf = bench.tasks.submit(tells), bench.tasks.submit(stubborn)
    bench.run()
    assert bench.tasks.stalled() == []
    bench.advance(30)
    deaf.cancel()
    bench.advance(31)
    found = {item.task_id: (item.kind, item.message) for item in bench.tasks.stalled()}
    assert found == {
        slow.id: ("slow", "runs for 61 s, usually 1 s"),
        told.id: ("no_progress", "told no progress for 61 s"),
        deaf.id: ("cancelling", "was asked to stop 31 s ago and still runs"),
    }
    bench.advance(2000)


# -- living with it ------------------------------------------------------------------------------


def test_tasks_submitted_from_inside_a_task(bench: Bench) -> None:
    made: list[Task[int]] = []

    def grow(depth: int) -> int:
        if depth:
            made.append(bench.tasks.submit(grow, depth - 1))
        return depth

    async def grow_async(depth: int) -> int:
        return depth and 1 + await bench.tasks.submit(grow_async, depth - 1)

    bench.tasks.submit(grow, 3)
    deep = bench.tasks.submit(grow_async, 10)
    bench.run()
    assert [task.result(0) for task in made] == [2, 1, 0]
    assert deep.result(0) == 10


def test_drain_waits_and_leaves_it_open() -> None:
    with TaskManager() as tasks:
        first = [tasks.submit(int) for _ in range(10)]
        assert tasks.drain(SOON)
        assert all(task.done() for task in first)
        go = threading.Event()
        held = tasks.submit(go.wait, SOON)
        assert not tasks.drain(0.01)
        with pytest.raises(UsageError, match="drain inside a task"):
            tasks.submit(tasks.drain).result(SOON)
        go.set()
        assert tasks.drain(SOON)
        assert held.result(0)


def test_as_an_asynchronous_context() -> None:
    async def main() -> list[int]:
        async with TaskManager() as tasks:
            made = [tasks.submit(asyncio.sleep, 0.01, number) for number in range(3)]
            made += [tasks.submit(given_value, 3)]
        assert all(task.done() for task in made)
        return [await task for task in made]

    assert asyncio.run(main()) == [0, 1, 2, 3]


def test_on_the_loop_that_runs_here() -> None:
    async def main() -> str:
        loop = asyncio.get_running_loop()

        async def where() -> bool:
            await asyncio.sleep(0)
            return asyncio.get_running_loop() is loop

        def plain() -> bool:
            return tasks.submit(where).result(SOON)

        async with TaskManager(loop="kernel") as tasks:
            assert await tasks.submit(where)
            assert await tasks.submit(plain)
            with pytest.raises(UsageError, match="await task"):
                tasks.submit(where).result(1)
            stuck = tasks.submit(asyncio.sleep, 1000)
            await asyncio.sleep(0)
            stuck.cancel()
            with pytest.raises(TaskCancelledError):
                await stuck
            assert await tasks.options(cleanup=asyncio.sleep, cleanup_budget=1).submit(int) == 0
            drained = await asyncio.to_thread(tasks.drain, SOON)
        return "closed" if drained else "not drained"

    assert asyncio.run(main()) == "closed"
    with pytest.raises(UsageError, match="none does"):
        TaskManager(loop="kernel")
    with pytest.raises(UsageError, match="give 'own' or 'kernel'"):
        TaskManager(loop="mine")


# -- the public fakes ------------------------------------------------------------------------------


def test_a_manual_loop_goes_by_its_clock() -> None:
    clock = FakeClock()
    loop = ManualLoop(clock)
    seen: list[float] = []

    async def work() -> None:
        for _ in range(3):
            await asyncio.sleep(10)
            seen.append(clock.monotonic())
            with pytest.raises(UsageError, match="runs already"):
                loop.run_until_idle()

    loop.call(asyncio.ensure_future, work())
    for _ in range(3):
        loop.run_until_idle()
        clock.advance(10)
    loop.drive()
    assert seen == [1010.0, 1020.0, 1030.0]
    assert loop.run(asyncio.sleep(0, "value")) == "value"
    loop.stop()
    loop.stop()
    assert not loop.call(print)


def test_cancelled_timers_do_not_pile_up() -> None:
    clock = FakeClock()
    timers = Timers(clock, "timers")
    seen: list[int] = []
    for number in range(10_000):
        handle = timers.at(clock.monotonic() + 3600 + number % 7, lambda number=number: seen.append(number))  # type: ignore[misc]
        if number % 1000:
            handle.cancel()
        assert len(timers._heap) <= 1025
    clock.advance(4000)
    assert sorted(seen) == list(range(0, 10_000, 1000))
    timers.close()


def test_a_clock_forgets_who_no_longer_listens() -> None:
    clock = FakeClock()
    seen: list[int] = []
    remove = clock.add_listener(lambda: seen.append(1))
    clock.advance(1)
    remove()
    remove()
    clock.advance(1)
    assert seen == [1]


def test_the_examples_of_the_fakes_hold() -> None:
    assert doctest.testmod(wiseflow_nb.testing).failed == 0


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_a_patched_frame_is_a_built_one(steps: list[int], kept: int) -> None:
    stage = Stage()
    tasks = TaskManager(**stage.parts)
    try:
        tasks._scheduler.ledger._kept = kept
        for step in steps:
            if step < 2:
                tasks.submit([int, fail][step])
            elif step == 2:
                stage.run()
            stage.clock.advance(0.5)
            if step == 3:
                check_frame(tasks)
        stage.run()
        check_frame(tasks)
    finally:  # an error must not wait for tasks that nobody runs any more
        tasks.shutdown("cancel_pending")


def check_frame(tasks: TaskManager) -> None:
    frame = tasks.frame()
    records = sorted(tasks.records(), key=lambda record: int(record.task_id[1:]))
    assert frame.index.tolist() == [record.task_id for record in records]
    assert frame["state"].tolist() == [record.state.value for record in records]
    assert frame["rev"].tolist() == [record.rev for record in records]
    assert frame["error"].tolist() == [record.error for record in records]
    for column in ("created", "finished"):
        found = [moment.timestamp() if moment == moment else math.nan for moment in frame[column]]
        assert found == pytest.approx([getattr(record, f"{column}_seconds") for record in records], nan_ok=True)
    frame["state"] = "changed"


_PRINTING = """
import sys
sys.setswitchinterval(1e-6)
from wiseflow_nb.tasks import TaskManager
with TaskManager() as tasks:
    for number in range(3000):
        tasks.submit(abs, -1)
        print("a", "b", "c", number)
"""


def test_printing_beside_tasks_that_end_is_safe() -> None:
    # ``print`` borrows what stands in sys.stdout, while the end of the last task takes the proxy away.
    done = subprocess.run([sys.executable, "-c", _PRINTING], stdout=subprocess.DEVNULL, timeout=120, check=False)
    assert done.returncode == 0


def test_an_error_without_a_text_says_what_it_can(bench: Bench) -> None:
    async def stopped() -> None:
        raise asyncio.CancelledError

    def silent() -> None:
        raise ValueError

    task = bench.tasks.submit(asyncio.sleep, 1000)
    bench.run()
    task.cancel("the data is old")
    own, bare = bench.tasks.submit(stopped), bench.tasks.submit(silent)
    bench.run()
    assert task.record().error == "CancelledError: the data is old"
    assert own.record().error == "CancelledError: its own code raised CancelledError"
    assert bare.record().error == "ValueError"


def test_a_second_cancel_does_not_cut_short_what_the_first_began(bench: Bench) -> None:
    closed: list[str] = []

    async def careful() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            await asyncio.sleep(5)
            closed.append("whole")

    task = bench.tasks.submit(careful)
    bench.run()
    for reason in ("first", "second"):
        assert task.cancel(reason)
        bench.run()
        assert (task.state, task.record().reason) == (S.CANCELLING, "first")
    bench.advance(5)
    assert (task.state, closed) == (S.CANCELLED, ["whole"])


def test_cleanup_over_its_budget_does_not_hold_up_later_tasks() -> None:
    gate = threading.Event()
    with ThreadPoolManager(max_workers=2) as pool, TaskManager(pool, max_concurrent=2) as tasks:
        view = tasks.options(cleanup=lambda: gate.wait(60), cleanup_budget=0.1)
        failed = [view.submit(int, "x") for _ in range(5)]
        for task in failed:
            assert isinstance(task.exception(30), ValueError)
        try:
            assert tasks.submit(abs, -1).result(30) == 1
            assert [task.state for task in failed] == [TaskState.FAILED] * 5
        finally:
            gate.set()


def test_cleanup_that_never_returns_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_closing, "OVERDUE_SECONDS", 0.01)
    gate = threading.Event()

    def endless() -> None:
        gate.wait(60)

    try:
        with TaskManager(max_concurrent=2) as tasks:
            task = tasks.options(cleanup=endless, cleanup_budget=0.05).submit(int, "x")
        assert not gate.is_set()
        assert task.state is S.FAILED
        assert "endless" in caplog.records[-1].getMessage()
        assert "left behind" in caplog.records[-1].getMessage()
    finally:
        gate.set()
    assert isinstance(tasks.pool, ThreadPoolManager)
    assert tasks.pool.join(30)
    tasks.shutdown()
    assert sum("left behind" in record.getMessage() for record in caplog.records) == 1


def test_plain_calls_that_no_worker_takes_up_hold_up_no_coroutine(bench: Bench) -> None:
    bench.tasks.set_max_concurrent(2)
    calls = [bench.tasks.submit(abs, -number) for number in range(3)]
    coroutine = bench.tasks.submit(asyncio.sleep, 0, "ran")
    bench.loop.run_until_idle()
    assert coroutine.state is S.PENDING
    assert bench.tasks.hold_reason == "3 plain calls come first and wait for a worker of the pool"
    bench.clock.advance(0.5)
    bench.loop.run_until_idle()
    assert coroutine.result(0) == "ran"
    assert [call.state for call in calls] == [S.PENDING] * 3
    bench.run()
    assert [call.result(0) for call in calls] == [0, 1, 2]
    assert bench.tasks.hold_reason == ""


def test_a_coroutine_of_a_higher_class_goes_before_a_call_that_has_no_worker_yet(bench: Bench) -> None:
    bench.tasks.set_max_concurrent(1)
    call = bench.tasks.submit(int)
    urgent = bench.tasks.options(priority="high").submit(asyncio.sleep, 1, "ran")
    bench.loop.run_until_idle()
    assert urgent.state is S.RUNNING
    bench.executor.run_all()
    assert call.state is S.PENDING
    bench.advance(1)
    assert (urgent.result(0), call.result(0)) == ("ran", 0)


def test_a_runner_that_stays_leaves_the_slot_to_a_call_that_comes_first(bench: Bench) -> None:
    bench.tasks.set_max_concurrent(1)
    bench.tasks.pause()
    first, call, last = (bench.tasks.submit(fn, 0) for fn in (asyncio.sleep, abs, asyncio.sleep))
    bench.tasks.resume()
    bench.loop.run_until_idle()
    assert [task.state for task in (first, call, last)] == [S.COMPLETED, S.PENDING, S.PENDING]
    bench.executor.run_next()
    assert call.done()
    bench.run()
    assert last.done()


def test_a_worker_that_stays_leaves_the_slot_to_a_coroutine_that_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runner, "SLICE_SECONDS", 1000.0)
    order: list[str] = []

    async def coroutine() -> None:
        order.append("coroutine")

    with TaskManager(max_concurrent=1) as tasks:
        tasks.pause()
        tasks.submit(order.append, "first")
        tasks.submit(coroutine)
        tasks.submit(order.append, "last")
        tasks.resume()
        assert tasks.drain(30)
    assert order == ["first", "coroutine", "last"]


def test_calls_that_wait_for_a_busy_pool_have_a_reason() -> None:
    gate = threading.Event()
    with ThreadPoolManager(2, 2) as pool, TaskManager(pool, max_concurrent=2) as tasks:
        try:
            others = [pool.submit(gate.wait, 30) for _ in range(2)]
            while pool.free_workers:
                time.sleep(0.001)
            calls = [tasks.submit(abs, -1) for _ in range(3)]
            assert tasks.hold_reason == "plain calls wait for a worker: all of the pool's 2 are busy with other work"
            assert tasks.submit(asyncio.sleep, 0, "ran").result(30) == "ran"
        finally:
            gate.set()
        assert [call.result(30) for call in calls] == [1, 1, 1]
        assert all(other.result(30) for other in others)


def test_who_needs_few_records_is_given_what_makes_them() -> None:
    stage = Stage()
    moves: list[tuple[HasRecord, str]] = []
    records: list[TaskRecord] = []
    tasks = TaskManager(
        **stage.parts, on_move=lambda task, move: moves.append((task, "progress" if move is None else move.to_state))
    )
    other = Stage()
    both = TaskManager(
        **other.parts,
        on_move=lambda task, move: moves.append((task, "")),
        on_change=lambda record, move: records.append(record),
    )

    def work() -> None:
        context = current_task()
        assert context is not None
        context.progress(0.5)

    task = tasks.submit(work)
    stage.run()
    assert [told for _, told in moves] == ["pending", "running", "progress", "completed"]
    assert len({id(given) for given, _ in moves}) == 1
    assert task._job._record is None
    assert (moves[0][0].task_id, moves[0][0].record) == (task.id, task.record())
    assert moves[0][0].record is moves[-1][0].record
    moves.clear()
    both.submit(int)
    other.run()
    assert (len(moves), [record.state for record in records]) == (3, [S.PENDING, S.RUNNING, S.COMPLETED])
    for manager in (tasks, both):
        manager.shutdown()


def test_a_skipped_grandchild_names_the_task_that_began_it() -> None:
    with TaskManager() as tasks:
        root = tasks.options(name="bad").submit(int, "x")
        child = tasks.options(name="child").submit(abs, root)
        grandchild = tasks.options(name="grandchild").submit(abs, child)
        with pytest.raises(TaskSkippedError, match=rf"because of 'bad' \({root.id}\) .*; retry {root.id}$"):
            grandchild.result(30)
        with pytest.raises(UsageError, match=rf"retry {root.id}, which brings it along"):
            tasks.retry(grandchild.id)
