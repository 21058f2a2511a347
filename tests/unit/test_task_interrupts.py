"""An interrupt of the main thread in the midst of a call: it is carried out or not at all, and all else goes on.

A submit whose task nobody gets is taken back: the task is not entered, or cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from inspect import CO_GENERATOR
from types import CodeType, FrameType
from typing import Any

import pytest

from tests.oracles.pools import eventually
from tests.unit.test_task_invariants import Log, check_closed_manager, check_manager
from wiseflow_nb.context import current_task
from wiseflow_nb.records import TaskState
from wiseflow_nb.tasks import Retry, Task, TaskManager
from wiseflow_nb.tasks._lives import lenders
from wiseflow_nb.tasks._machine import FIRST_TERMINAL

SOON = 20.0
S = TaskState
#: Where an interrupt in between is made up for: not in the standard library's own events.
TELLING = ("both", "record", "output_tail")  # what on_change is handed: there it is one of its failures, as any other
OURS = ("wiseflow_nb/tasks/", "wiseflow_nb/pool/", "wiseflow_nb/futures")


class Interrupt:
    """Raises in the calling thread at the moment with a number: where the interpreter looks for signals.

    That is when a function has begun, and when one of its own has returned.
    """

    def __init__(self, number: int) -> None:
        self._left = number
        self.struck = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        # Raised when a generator goes on, it would end that without its own ``finally``: no signal does so.
        goes_on = event == "call" and frame.f_code.co_flags & CO_GENERATOR
        if event in ("call", "c_return") and not goes_on and _made_up_for(frame.f_code):
            self._left -= 1
            if not self._left:
                sys.setprofile(None)
                self.struck = True
                raise KeyboardInterrupt

    def during(self, call: Callable[[], Any]) -> Any:
        sys.setprofile(self)
        try:
            return call()
        except KeyboardInterrupt:
            return None
        finally:
            sys.setprofile(None)


def _made_up_for(code: CodeType) -> bool:
    if code.co_name == "start":
        return True  # a thread's, too
    return code.co_name not in TELLING and any(part in code.co_filename for part in OURS)


async def nothing() -> None:
    await asyncio.sleep(0)


def fail() -> None:
    raise ValueError("no")


SUBMITS: dict[str, Callable[[TaskManager], Any]] = {
    "call": lambda tasks: tasks.submit(int),
    "coroutine": lambda tasks: tasks.submit(nothing),
    "timed": lambda tasks: tasks.options(timeout=100, deadline=100, priority="high").submit(int),
    "dependent": lambda tasks: tasks.options(dependencies=["t1", "t4"]).submit(int),
    "skipped": lambda tasks: tasks.options(dependencies=["t3"]).submit(int),
}


def interrupted_at(number: int, what: str, *, told: bool) -> bool:
    """Interrupt a submit at a moment, and see that the manager goes on; return whether there was such a moment."""
    log: Log = []
    tasks = TaskManager(max_concurrent=2, on_change=(lambda *change: log.append(change)) if told else None)
    if what in ("dependent", "skipped"):
        for fn in (int, nothing, fail):
            tasks.submit(fn)
        assert tasks.drain(SOON)
    if what == "dependent":
        tasks.pause()
        tasks.submit(nothing)
    interrupt = Interrupt(number)
    task = interrupt.during(lambda: SUBMITS[what](tasks))
    tasks.resume()
    others = [tasks.submit(int), tasks.submit(nothing), tasks.submit(int)]
    assert tasks.drain(SOON)
    assert all(other.state is TaskState.COMPLETED for other in others)
    assert task is None or task.done()
    tasks.shutdown(timeout=SOON)
    check_closed_manager(tasks, log if told else None)
    return interrupt.struck


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("what", SUBMITS)
def test_a_submit_is_whole_or_nothing_wherever_an_interrupt_comes(what: str, told: bool) -> None:
    moments = 0
    while interrupted_at(moments + 1, what, told=told):
        moments += 1
    assert moments > 20


# -- steering ---------------------------------------------------------------------------------------


def levels_hold(tasks: TaskManager) -> bool:
    with tasks._scheduler.lock:
        alive = [job for job in tasks._scheduler.ledger.jobs.values() if job.code < FIRST_TERMINAL]
        return all(job.level == max((job.options.priority, *lenders(job))) for job in alive)


class Scene:
    """Tasks before an operation, the operation, and what must be so after it was interrupted or done."""

    def __init__(self, tasks: TaskManager) -> None:
        self.tasks = tasks
        self.gates: list[threading.Event] = []

    def operation(self) -> object:
        raise NotImplementedError

    def after(self) -> None:
        """What has to hold; whatever stands still is let go."""

    def gated(self, **options: Any) -> Task[Any]:
        gate, entered = threading.Event(), threading.Event()
        self.gates.append(gate)

        def hold() -> bool:
            entered.set()
            return gate.wait(SOON)

        task = self.tasks.options(**options).submit(hold)
        if not self.tasks.paused:
            assert entered.wait(SOON)
        return task


class CancelPending(Scene):
    def __init__(self, tasks: TaskManager) -> None:
        super().__init__(tasks)
        tasks.pause()
        self.task = tasks.submit(int)
        self.behind = tasks.options(dependencies=[self.task], priority="high").submit(int)
        self.last = tasks.options(dependencies=[self.behind]).submit(nothing)
        self.anyway = tasks.options(dependencies=[self.task], trigger="all_done").submit(int)
        self.after_anyway = tasks.options(dependencies=[self.anyway]).submit(int)

    def operation(self) -> object:
        return self.task.cancel()

    def after(self) -> None:
        self.tasks.resume()
        assert self.tasks.drain(SOON)
        cancelled = self.task.state is S.CANCELLED
        assert cancelled or self.task.state is S.COMPLETED
        assert self.behind.state is self.last.state is (S.SKIPPED if cancelled else S.COMPLETED)
        assert self.anyway.state is self.after_anyway.state is S.COMPLETED
        assert all(task.done() for task in (self.task, self.behind, self.last))


class CancelCoroutine(Scene):
    def __init__(self, tasks: TaskManager) -> None:
        super().__init__(tasks)
        self.unwound: list[bool] = []
        entered = threading.Event()

        async def stopped() -> None:
            try:
                entered.set()
                await asyncio.Event().wait()
            finally:
                for _ in range(20):  # a second cancel would come in between
                    await asyncio.sleep(0)
                self.unwound.append(True)

        self.task = tasks.submit(stopped)
        assert entered.wait(SOON)

    def operation(self) -> object:
        return self.task.cancel()

    def after(self) -> None:
        assert self.task.cancel()
        assert self.tasks.drain(SOON)
        assert self.task.state is S.CANCELLED
        assert self.unwound == [True]


class CancelCall(CancelCoroutine):
    def __init__(self, tasks: TaskManager) -> None:
        Scene.__init__(self, tasks)
        self.unwound: list[bool] = []
        entered = threading.Event()

        def stopped() -> None:
            entered.set()
            context = current_task()
            assert context is not None
            self.unwound.append(context.token.wait(SOON))

        self.task = tasks.submit(stopped)
        assert entered.wait(SOON)


class CancelBeforeAnotherAttempt(Scene):
    def __init__(self, tasks: TaskManager) -> None:
        super().__init__(tasks)
        self.task = tasks.options(retry=Retry(1, base=100, jitter=None)).submit(fail)
        eventually(lambda: self.task.state is S.RETRY_WAIT)

    def operation(self) -> object:
        return self.task.cancel()

    def after(self) -> None:
        assert self.task.cancel()
        assert self.tasks.drain(SOON)
        assert self.task.state is S.CANCELLED


class CancelOneThatWantsItsSlotBack(Scene):
    def __init__(self, tasks: TaskManager) -> None:
        super().__init__(tasks)
        inner: list[Task[Any]] = []
        entered, go = threading.Event(), threading.Event()

        def outer() -> None:
            entered.set()
            assert go.wait(SOON)
            inner[0].result(SOON)

        self.task = tasks.submit(outer)
        assert entered.wait(SOON)
        inner.append(self.gated())
        tasks.pause()
        self.gated()
        tasks.resume()
        go.set()
        # It gave up its slot, and the others hold both.
        eventually(lambda: tasks._scheduler.ledger.running == 3)
        tasks.set_max_concurrent(1)
        self.gates[0].set()
        eventually(lambda: self.task._job.grant is not None)

    def operation(self) -> object:
        return self.task.cancel()

    def after(self) -> None:
        assert self.task.cancel()
        eventually(self.task.done)  # without a slot
        self.tasks.set_max_concurrent(2)
        for gate in self.gates:
            gate.set()
        assert self.tasks.drain(SOON)


class Reprioritise(Scene):
    def __init__(self, tasks: TaskManager, *before: str) -> None:
        super().__init__(tasks)
        tasks.pause()
        self.first = tasks.submit(int)
        self.second = tasks.options(dependencies=[self.first]).submit(int)
        self.third = tasks.options(dependencies=[self.second]).submit(int)
        for priority in before:
            tasks.reprioritise(self.third.id, priority)

    def operation(self) -> object:
        return self.tasks.reprioritise(self.third.id, "critical")

    def after(self) -> None:
        assert levels_hold(self.tasks)
        with self.tasks._scheduler.lock:
            ready = self.tasks._scheduler.slots.ready()
            assert [job.place % 4 for job in ready] == [job.level for job in ready]
        self.tasks.resume()
        assert self.tasks.drain(SOON)


class Lower(Reprioritise):
    def __init__(self, tasks: TaskManager) -> None:
        super().__init__(tasks, "critical")

    def operation(self) -> object:
        return self.tasks.reprioritise(self.third.id, "low")


class Resume(Scene):
    def __init__(self, tasks: TaskManager) -> None:
        super().__init__(tasks)
        tasks.pause()
        for fn in (int, nothing, int, nothing):
            tasks.submit(fn)

    def operation(self) -> object:
        self.tasks.resume()
        return True

    def after(self) -> None:
        if self.tasks.paused:
            self.tasks.resume()
        assert self.tasks.drain(SOON)


class Pause(Resume):
    def __init__(self, tasks: TaskManager) -> None:
        Scene.__init__(self, tasks)

    def operation(self) -> object:
        self.tasks.pause()
        return True


class Limit(Scene):
    def __init__(self, tasks: TaskManager) -> None:
        super().__init__(tasks)
        tasks.set_max_concurrent(1)
        self.blocker = self.gated()
        self.others = [tasks.submit(int), tasks.submit(nothing), tasks.submit(int)]

    def operation(self) -> object:
        self.tasks.set_max_concurrent(3)
        return True

    def after(self) -> None:
        if self.tasks.max_concurrent == 1:
            self.tasks.set_max_concurrent(3)
        # No end of another task is what has them begin.
        assert [task.result(SOON) for task in self.others] == [0, None, 0]
        self.gates[0].set()
        assert self.tasks.drain(SOON)


class Result(Scene):
    def __init__(self, tasks: TaskManager) -> None:
        super().__init__(tasks)
        tasks.pause()
        self.task = tasks.submit(int)

    def operation(self) -> object:
        with contextlib.suppress(TimeoutError):
            self.task.result(0)
        return True

    def after(self) -> None:
        self.tasks.resume()
        assert self.task.result(SOON) == 0


class Shutdown(CancelPending):
    def operation(self) -> object:
        self.tasks.shutdown("cancel_pending", timeout=SOON)
        return True

    def after(self) -> None:
        self.tasks.shutdown("cancel_pending", timeout=SOON)
        assert self.task.state in (S.CANCELLED, S.COMPLETED)


SCENES: tuple[Callable[[TaskManager], Scene], ...] = (
    CancelPending,
    CancelCoroutine,
    CancelCall,
    CancelBeforeAnotherAttempt,
    CancelOneThatWantsItsSlotBack,
    Reprioritise,
    Lower,
    Resume,
    Pause,
    Limit,
    Result,
    Shutdown,
)


def steered_at(number: int, make: Callable[[TaskManager], Scene], *, told: bool) -> bool:
    """Interrupt an operation at a moment, and see that the manager goes on; return whether there was such a moment."""
    log: Log = []
    tasks = TaskManager(max_concurrent=2, on_change=(lambda *change: log.append(change)) if told else None)
    scene = make(tasks)
    interrupt = Interrupt(number)
    done = interrupt.during(scene.operation)
    assert done or interrupt.struck
    check_manager(tasks, log if told else None)
    scene.after()
    if not tasks._scheduler.closed:
        others = [tasks.submit(int), tasks.submit(nothing), tasks.submit(int)]
        assert tasks.drain(SOON)
        assert all(other.state is S.COMPLETED for other in others)
    tasks.shutdown(timeout=SOON)
    check_closed_manager(tasks, log if told else None)
    return interrupt.struck


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_an_operation_is_carried_out_or_not_at_all_wherever_an_interrupt_comes(
    scene: Callable[[TaskManager], Scene], told: bool
) -> None:
    moments = 0
    while steered_at(moments + 1, scene, told=told):
        moments += 1
    assert moments > 8


class Here(Executor):
    """Makes each call at once, on the thread that submits it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def waited_at(number: int, limit: int) -> bool:
    tasks = TaskManager(Here(), max_concurrent=limit)
    interrupt = Interrupt(number)

    def outer() -> bool:
        tasks.pause()
        inner = tasks.submit(int)

        def wait() -> None:
            with contextlib.suppress(TimeoutError):
                inner.result(0)

        interrupt.during(wait)
        assert not inner._job.waiters
        tasks.resume()
        return True

    assert tasks.submit(outer).result(SOON)
    others = [tasks.submit(int), tasks.submit(nothing), tasks.submit(int)]
    assert tasks.drain(SOON)
    assert all(other.state is S.COMPLETED for other in others)
    tasks.shutdown(timeout=SOON)
    check_closed_manager(tasks)
    return interrupt.struck


@pytest.mark.parametrize("limit", [1, 2])
def test_a_wait_inside_a_task_leaves_all_slots_whole_wherever_an_interrupt_comes(limit: int) -> None:
    moments = 0
    while waited_at(moments + 1, limit):
        moments += 1
    assert moments > 20


def waited_on_loop_at(number: int) -> bool:
    interrupt = Interrupt(number)

    async def main() -> None:
        async with TaskManager(loop="kernel") as tasks:
            tasks.pause()
            task = tasks.submit(int)

            def wait() -> None:
                with contextlib.suppress(TimeoutError):
                    task.result(0)

            interrupt.during(wait)
            assert tasks._scheduler.slots.bells == []
            assert tasks._scheduler.loop._stopped == []  # type: ignore[attr-defined]
            tasks.resume()
            assert await task == 0
        check_closed_manager(tasks)

    asyncio.run(main())
    return interrupt.struck


def test_a_wait_in_a_cell_leaves_nobody_behind_wherever_an_interrupt_comes() -> None:
    moments = 0
    while waited_on_loop_at(moments + 1):
        moments += 1
    assert moments > 20
