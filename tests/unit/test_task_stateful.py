"""The manager under random operations, on a fake clock, one thread at a time: the same run every time.

The suite runs over the manager and over the plain one in ``tests/oracles``, which it was written for.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.oracles import plain_tasks as plain
from tests.unit.test_task_invariants import Log, check_closed_manager, check_manager
from wiseflow_nb import tasks as fast
from wiseflow_nb.context import TaskContext, current_task
from wiseflow_nb.pool._queue import aged
from wiseflow_nb.records import Priority, TaskRecord, TaskState, TaskTransition
from wiseflow_nb.testing import Stage

SOON = 20.0
S = TaskState


class ManagerMachine(RuleBasedStateMachine):
    """Plain calls run on real threads, but each stands still at a gate, so only one ever moves.

    Coroutines run on a loop that is driven after each operation, until all of them wait at a gate.
    """

    package: Any = fast
    #: Whether a coroutine is RUNNING from when it is handed to the loop: asked to stop before its first
    #: step, its code then never runs.
    begins_early = False

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage()
        self.clock, self.executor, self.loop = self.stage.clock, self.stage.executor, self.stage.loop
        self.log: Log = []
        self.wrong: list[str] = []
        self.manager = self.package.TaskManager(**self.stage.parts, max_concurrent=2, on_change=self._changed)
        self.scheduler = self.manager._scheduler
        self.manager.register_resource_cleanup_handler(self._cleaned)
        self.tasks: dict[str, Any] = {}
        self.coroutines: dict[str, tuple[asyncio.Event, list[str]]] = {}
        self.news: queue.Queue[tuple[str, str]] = queue.Queue()
        self.running: dict[str, tuple[threading.Thread, queue.Queue[str]]] = {}
        self.gates: dict[str, queue.Queue[str]] = {}
        self.runs: list[tuple[str, int]] = []
        self.cleanups: list[tuple[str, int]] = []
        self.settled: list[str] = []

    # -- what runs as a task -------------------------------------------------------------------

    def _changed(self, record: TaskRecord, move: TaskTransition | None) -> None:
        # Called under the manager's lock, in the very moment of the move.
        self.log.append((record, move))
        if move is None or move.to_state is not S.RUNNING:
            return
        jobs = self.scheduler.ledger.jobs
        mine = self._rank(jobs[record.task_id])
        for job in jobs.values():
            same = job.record.kind == record.kind and job.record.state is S.PENDING
            if same and job.record.task_id != record.task_id and self._rank(job) < mine:
                self.wrong.append(f"{record.task_id} began before {job.record.task_id}, whose turn it was")
        held = sum(job.record.state in (S.RUNNING, S.CANCELLING) for job in jobs.values())
        if held > self.manager.max_concurrent:
            self.wrong.append(f"{record.task_id} is number {held} that runs")
        for parent in record.dependencies:
            state = jobs[parent].record.state
            anyway = jobs[record.task_id].options.trigger == "all_done" and state.terminal
            if state is not S.COMPLETED and not anyway:
                self.wrong.append(f"{record.task_id} began while {parent} was {state}")

    async def _cleaned(self, context: TaskContext) -> None:
        self.cleanups.append((context.task_id, context.attempt))

    def _body(self) -> str:
        context = current_task()
        assert context is not None
        self.runs.append((context.task_id, context.attempt))
        gate = self.gates[context.task_id] = queue.Queue()
        self.news.put(("entered", context.task_id))
        if gate.get(timeout=SOON) == "raise":
            raise ValueError("told to")
        return context.task_id

    async def _coroutine(self, stubborn: bool) -> str:
        context = current_task()
        assert context is not None
        self.runs.append((context.task_id, context.attempt))
        event, how = self.coroutines[context.task_id] = asyncio.Event(), ["return"]
        try:
            try:
                await event.wait()
            except asyncio.CancelledError:
                if not stubborn:
                    raise
                await event.wait()
        finally:
            del self.coroutines[context.task_id]
        if how[0] == "raise":
            raise ValueError("told to")
        if how[0] == "cancel":
            raise asyncio.CancelledError
        return context.task_id

    def _on_thread(self, work: Any) -> None:
        work()
        self.news.put(("left", ""))

    # -- operations ----------------------------------------------------------------------------

    @rule(
        priority=st.sampled_from(Priority),
        parents=st.lists(st.integers(0, 100), max_size=3),
        retries=st.sampled_from([0, 0, 1, 2]),
        trigger=st.sampled_from(["all_completed", "all_completed", "all_done"]),
        timeout=st.sampled_from([None, None, 3.0]),
        deadline=st.sampled_from([None, None, 50.0]),
        how=st.sampled_from(["thread", "thread", "async", "async", "stubborn"]),
    )
    def submit(self, priority: Priority, parents: list[int], how: str, **options: Any) -> None:
        known = list(self.tasks)
        needed = [known[index % len(known)] for index in parents] if known else []
        retry = self.package.Retry(options.pop("retries"), base=2.0, jitter=None)
        view = self.manager.options(priority=priority, dependencies=needed, retry=retry, **options)
        task = view.submit(self._body) if how == "thread" else view.submit(self._coroutine, how == "stubborn")
        self.tasks[task.id] = task
        task.add_done_callback(lambda item: self.settled.append(item.id))
        self.loop.run_until_idle()

    @precondition(lambda self: self.executor.pending)
    @rule()
    def begin(self) -> None:
        expected = self._whose_turn()
        thread = threading.Thread(target=self._on_thread, args=(self.executor.take(),))
        thread.start()
        what, task_id = self.news.get(timeout=SOON)
        if what == "left":
            thread.join()
            self.loop.run_until_idle()  # the slot that the call did not need may be a coroutine's
            assert expected is None
            return
        assert task_id == expected
        self.running[task_id] = (thread, self.gates[task_id])

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100), how=st.sampled_from(["return", "return", "raise"]))
    def end(self, which: int, how: str) -> None:
        task_id = list(self.running)[which % len(self.running)]
        thread, gate = self.running.pop(task_id)
        gate.put(how)
        thread.join(SOON)
        assert self.news.get(timeout=SOON) == ("left", "")
        self.loop.run_until_idle()

    @precondition(lambda self: self.coroutines)
    @rule(which=st.integers(0, 100), how=st.sampled_from(["return", "return", "raise", "cancel"]))
    def end_coroutine(self, which: int, how: str) -> None:
        event, told = list(self.coroutines.values())[which % len(self.coroutines)]
        told[0] = how
        self.loop.call(event.set)
        self.loop.run_until_idle()

    @precondition(lambda self: self.tasks)
    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        task = self._pick(which)
        before = task.state
        assert task.cancel() == (not before.terminal or before is S.CANCELLED)
        if not before.terminal:
            runs = task.id in self.running or task.id in self.coroutines
            assert task.state is (S.CANCELLING if runs else S.CANCELLED)
        self.loop.run_until_idle()

    @precondition(lambda self: self.tasks)
    @rule(which=st.integers(0, 100), priority=st.sampled_from(Priority))
    def reprioritise(self, which: int, priority: Priority) -> None:
        task = self._pick(which)
        assert self.manager.reprioritise(task.id, priority) == (not task.state.terminal)

    @rule(seconds=st.sampled_from([0.5, 2.0, 4.0, 31.0]))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.loop.run_until_idle()

    @rule()
    def pause(self) -> None:
        self.manager.pause()

    @rule()
    def resume(self) -> None:
        self.manager.resume()
        self.loop.run_until_idle()

    @rule(count=st.integers(1, 4))
    def bound(self, count: int) -> None:
        self.manager.set_max_concurrent(count)
        self.loop.run_until_idle()

    @precondition(lambda self: any(t.state in (S.FAILED, S.CANCELLED, S.TIMED_OUT) for t in self.tasks.values()))
    @rule(which=st.integers(0, 100))
    def retry(self, which: int) -> None:
        ended = [task for task in self.tasks.values() if task.state in (S.FAILED, S.CANCELLED, S.TIMED_OUT)]
        again = self.manager.retry(ended[which % len(ended)].id)
        for record in self.manager.records():
            if record.task_id not in self.tasks:
                task = self.manager.task(record.task_id)
                if task is not None:
                    self.tasks[task.id] = task
                    task.add_done_callback(lambda item: self.settled.append(item.id))
        self.loop.run_until_idle()
        assert again.record().retry_of

    # -- what must hold ------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        check_manager(self.manager)
        assert sum(self.manager.counts().values()) == len(self.manager.records())
        assert len(set(self.runs)) == len(self.runs)
        assert len(set(self.cleanups)) == len(self.cleanups)
        now_running = {record.task_id for record in self.manager.records() if record.state in (S.RUNNING, S.CANCELLING)}
        assert now_running == set(self.running) | set(self.coroutines)
        assert self.wrong == []
        assert self.scheduler.ledger.callback_failures == 0
        # Whoever could run does: a ready coroutine waits for a slot only, or behind a plain call.
        idle = self.manager.max_concurrent - self.scheduler.slots.used
        ready = [record for record in self.manager.records() if record.state is S.PENDING and record.kind == "async"]
        assert self.manager.paused or idle <= 0 or not ready
        assert len(set(self.settled)) == len(self.settled)
        for task in self.tasks.values():
            assert task.done() == task.state.terminal
            assert task.cancelled() == (task.state is S.CANCELLED)
        ended = self._ended_badly()
        assert sorted(self.cleanups) == sorted(ended)

    @invariant()
    def classes_are_inherited(self) -> None:
        for task_id, level in self._levels().items():
            assert self.scheduler.ledger.jobs[task_id].level is level

    def teardown(self) -> None:
        while self.running:
            self.end(0, "return")
        self.manager.pause()
        while self.coroutines:
            self.end_coroutine(0, "return")
        self.manager.shutdown("cancel_pending")
        self.executor.run_all()
        check_closed_manager(self.manager, self.log)
        assert sorted(self.settled) == sorted(self.tasks)
        assert sorted(self.cleanups) == sorted(self._ended_badly())
        attempts = {record.task_id: record.attempt for record in self.manager.records()}
        expected = {(i, n) for i in attempts for n in range(1, attempts[i] + 1)}
        missing = expected - set(self.runs)
        assert set(self.runs) <= expected
        if self.begins_early:
            asked = {(move.task_id, move.attempt) for _, move in self.log if move and move.to_state is S.CANCELLING}
            missing -= asked
        assert not missing

    # -- the model -----------------------------------------------------------------------------

    def _rank(self, job: Any) -> tuple[int, int]:
        return -aged(job.level, job.ready_at, self.clock.monotonic()), job.number

    def _pick(self, which: int) -> Any:
        return list(self.tasks.values())[which % len(self.tasks)]

    def _ended_badly(self) -> list[tuple[str, int]]:
        ran = (S.RUNNING.value, S.CANCELLING.value)
        return [
            (move.task_id, move.attempt)
            for _, move in self.log
            if move is not None
            and move.from_state in ran
            and move.to_state not in (S.CANCELLING, S.COMPLETED, S.RUNNING)
        ]

    def _levels(self) -> dict[str, Priority]:
        live = {record.task_id: record for record in self.manager.records() if not record.state.terminal}
        levels = {task_id: record.priority for task_id, record in live.items()}
        # Ids grow and a task can only depend on older ones: from the newest to the oldest.
        for task_id in sorted(live, key=lambda item: -int(item[1:])):
            for parent in live[task_id].dependencies:
                if parent in levels:
                    levels[parent] = max(levels[parent], levels[task_id])
        return levels

    def _whose_turn(self) -> str | None:
        if self.manager.paused or self.scheduler.slots.held >= self.manager.max_concurrent:
            return None
        now, levels = self.clock.monotonic(), self._levels()
        records = self.manager.records()
        ready = {record.task_id for record in records if record.state is S.PENDING and record.kind == "thread"}

        def rank(task_id: str) -> tuple[int, int]:
            since = self.scheduler.ledger.jobs[task_id].ready_at
            return -aged(levels[task_id], since, now), int(task_id[1:])

        return min(ready, key=rank, default=None)


class PlainMachine(ManagerMachine):
    package = plain
    begins_early = True


MANY = settings(max_examples=40, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
TestManager = ManagerMachine.TestCase
TestManager.settings = MANY
TestPlainManager = PlainMachine.TestCase
TestPlainManager.settings = MANY
