"""Both pools against one model: what runs, what waits, in which order, and every figure, after each step.

The work is real, on real threads; it runs until the test lets it end. Time is a fake clock's. After
each step the pool has come to rest, so that what it must have done is known exactly.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.oracles.pools import POOLS, SOON, check, check_closed, eventually
from wiseflow_nb.context import current_task
from wiseflow_nb.errors import TaskCancelledError
from wiseflow_nb.pool._queue import aged
from wiseflow_nb.records import Priority
from wiseflow_nb.testing import FakeClock

priorities = st.sampled_from(Priority)
HOW = {"completed": None, "failed": KeyError("as told"), "cancelled": TaskCancelledError("as told")}


class Piece:
    """One submitted call, and what the model knows of it."""

    def __init__(self, number: int, priority: Priority, since: float) -> None:
        self.number, self.priority, self.since = number, priority, since
        self.state = "queued"
        self.started = self.ended = math.nan
        self.runs = 0
        self.entered, self.go = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.future: Any = None
        self.asked = False

    def __call__(self) -> int:
        self.runs += 1
        context = current_task()
        assert context is not None
        assert context.name == f"n{self.number}"
        self.entered.set()
        assert self.go.wait(SOON)
        if self.error is not None:
            raise self.error
        return self.number


class PoolMachine(RuleBasedStateMachine):
    kind = ""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.pieces: list[Piece] = []
        self.finished: list[Piece] = []

    @initialize(low=st.integers(1, 2), more=st.integers(0, 3))
    def begin(self, low: int, more: int) -> None:
        self.low, self.high = low, low + more
        self.target = self.high
        self.pool = POOLS[self.kind](self.low, self.high, clock=self.clock)

    def those(self, state: str) -> list[Piece]:
        return [piece for piece in self.pieces if piece.state == state]

    def rest(self) -> None:
        """Let the model start what there is room for, and wait until the pool has."""
        now = self.clock.monotonic()
        while (queued := self.those("queued")) and len(self.those("running")) < self.target:
            piece = min(queued, key=lambda item: (-aged(item.priority, item.since, now), item.number))
            piece.state, piece.started = "running", now
        for piece in self.those("running"):
            assert piece.entered.wait(SOON), f"n{piece.number} did not start"
        limit = max(self.target, len(self.those("running")))
        eventually(lambda: self.pool.status().workers <= limit)

    @rule(priority=priorities)
    def submit(self, priority: Priority) -> None:
        piece = Piece(len(self.pieces) + 1, priority, self.clock.monotonic())
        self.pieces.append(piece)
        piece.future = self.pool.options(priority=priority, name=f"n{piece.number}").submit(piece)
        self.rest()

    @precondition(lambda self: self.those("running"))
    @rule(data=st.data(), how=st.sampled_from(sorted(HOW)))
    def finish(self, data: st.DataObject, how: str) -> None:
        piece = data.draw(st.sampled_from(self.those("running")))
        piece.state, piece.ended, piece.error = how, self.clock.monotonic(), HOW[how]
        self.finished.append(piece)
        piece.go.set()
        assert piece.future.exception(SOON) is HOW[how]
        self.rest()

    @precondition(lambda self: self.pieces)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        piece = data.draw(st.sampled_from(self.pieces))
        never_ran = piece.state == "queued" or (piece.state == "cancelled" and not piece.runs)
        assert piece.future.cancel() == never_ran
        if piece.state == "queued":
            piece.state = "cancelled"
            self.finished.append(piece)
        self.rest()

    @precondition(lambda self: self.pieces)
    @rule(data=st.data(), priority=priorities)
    def reprioritise(self, data: st.DataObject, priority: Priority) -> None:
        piece = data.draw(st.sampled_from(self.pieces))
        assert self.pool.reprioritise(piece.future, priority) == (piece.state == "queued")
        if piece.state == "queued":
            piece.priority = priority

    @precondition(lambda self: self.pieces)
    @rule(data=st.data())
    def ask_to_stop(self, data: st.DataObject) -> None:
        piece = data.draw(st.sampled_from(self.pieces))
        assert self.pool.cancel_running(piece.future, "asked") == (piece.state == "running")
        piece.asked = piece.asked or piece.state == "running"

    @rule(seconds=st.sampled_from([1.0, 10.0, 29.0, 30.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(workers=st.integers(1, 6))
    def resize(self, workers: int) -> None:
        self.target = min(max(workers, self.low), self.high)
        assert self.pool.resize(workers, "told") == self.target
        self.rest()

    @rule(low=st.integers(1, 3), more=st.integers(0, 3))
    def set_bounds(self, low: int, more: int) -> None:
        wanted = low + more if self.target == self.high else self.target
        self.low, self.high = low, low + more
        self.target = min(max(wanted, self.low), self.high)
        self.pool.set_bounds(self.low, self.high)
        self.rest()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        check(self.pool)
        stats, status = self.pool.stats(), self.pool.status()
        running = self.those("running")
        assert stats.submitted == len(self.pieces)
        assert (stats.queued, stats.running) == (len(self.those("queued")), len(running))
        assert stats.cancelling == sum(piece.asked for piece in running)
        for state in HOW:
            assert getattr(stats, state) == len(self.those(state))
        assert (status.min_workers, status.max_workers, status.target) == (self.low, self.high, self.target)
        assert self.pool.pending == stats.queued + stats.running
        assert {piece.number for piece in self.pieces if piece.runs} == {
            piece.number for piece in self.pieces if not math.isnan(piece.started)
        }
        for piece in self.pieces:
            assert piece.runs <= 1
            assert piece.future.running() == (piece.state == "running")
            assert piece.future.done() == (piece.state in HOW)
            assert piece.future.cancelled() == (piece.state == "cancelled" and not piece.runs)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        now = self.clock.monotonic()
        for piece in self.pieces:
            piece.go.set()
        self.pool.shutdown()
        check_closed(self.pool)
        for piece in self.pieces:
            if piece.state in ("queued", "running"):
                piece.started = now if piece.state == "queued" else piece.started
                piece.state, piece.ended = "completed", now
                assert piece.future.result(0) == piece.number
            assert piece.runs == (0 if math.isnan(piece.started) else 1)
        records = {row.name: row for row in self.pool.records().itertuples(index=False)}
        assert len(records) == len(self.pieces)
        # In the order in which they ended, as far as the test said which.
        told = [f"n{piece.number}" for piece in self.finished]
        assert list(records)[: len(told)] == told
        for piece in self.pieces:
            row = records[f"n{piece.number}"]
            assert (row.state, row.priority) == (piece.state, piece.priority.name.lower())
            if piece.runs:
                assert row.queue_seconds == piece.started - piece.since
                assert row.wall_seconds == piece.ended - piece.started
                assert row.cpu_seconds >= 0.0
                assert row.cpu_source == "thread_time"
            else:
                assert math.isnan(row.wall_seconds)
        ran = [piece for piece in self.pieces if piece.runs]
        stats = self.pool.stats()
        assert stats.queue_seconds == pytest.approx(sum(piece.started - piece.since for piece in ran))
        assert stats.wall_seconds == pytest.approx(sum(piece.ended - piece.started for piece in ran))


@pytest.mark.parametrize("kind", POOLS)
def test_a_pool_does_what_the_model_does(kind: str) -> None:
    machine = type(f"Machine_{kind}", (PoolMachine,), {"kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
