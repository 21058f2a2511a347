"""The pure sizing rule, alone and in a loop with simulated machines."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wiseflow_nb.sizing import (
    HOLD_SECONDS,
    IDLE_SECONDS,
    SizingInput,
    SizingPast,
    decide_workers,
)

CALM = SizingInput(4.0, 0.1, 0.1, 0.72, 0.9, 0.68, 0.85, 2, 0, 2, 8, now_seconds=100.0)
ratios = st.one_of(st.floats(0, 1.5), st.just(math.nan))


# -- one decision -----------------------------------------------------------------------------


@given(ratios, ratios, st.integers(0, 30), st.integers(0, 50), st.integers(1, 5), st.integers(0, 20), st.data())
def test_never_outside_the_bounds(
    cpu: float, memory: float, workers: int, pending: int, low: int, more: int, data: st.DataObject
) -> None:
    past = SizingPast()
    for step in range(data.draw(st.integers(1, 6))):
        now = replace(
            CALM,
            cpu_utilization_ratio=data.draw(st.sampled_from([cpu, memory, 0.1])),
            memory_utilization_ratio=data.draw(st.sampled_from([cpu, memory, 0.1])),
            workers=workers,
            pending=pending,
            min_workers=low,
            max_workers=low + more,
            now_seconds=100.0 + 7 * step,
        )
        decision = decide_workers(now, past)
        assert low <= decision.target <= low + more
        assert decision.reason
        assert decision.pressure in ("none", "warning", "critical")
        assert decision == decide_workers(now, past)
        past, workers = decision.past, decision.target


def test_critical_halves_warning_takes_an_eighth_calm_doubles() -> None:
    busy = replace(CALM, workers=8, pending=20)
    assert decide_workers(replace(busy, memory_utilization_ratio=0.9)).target == 4
    assert decide_workers(replace(busy, cpu_utilization_ratio=0.75)).target == 7
    assert decide_workers(replace(busy, workers=32, max_workers=64, cpu_utilization_ratio=0.75)).target == 28
    assert decide_workers(replace(CALM, pending=20)).target == 4
    assert decide_workers(replace(CALM, pending=3)).target == 3
    assert decide_workers(replace(CALM, pending=20, memory_utilization_ratio=0.5)).target == 3


def test_every_reason_can_be_read() -> None:
    busy = replace(CALM, workers=4, pending=20)
    just = SizingPast(changed_seconds=99.0)
    held = SizingPast(ceiling=4, ceiling_until_seconds=120.0)
    dear = SizingPast(cpu_per_worker=0.7, memory_per_worker=0.01)
    told = {
        "brought within the bounds": decide_workers(replace(busy, workers=9)),
        "is critical: fewer": decide_workers(replace(busy, memory_utilization_ratio=0.9)),
        "CPU at 75% is warning: fewer": decide_workers(replace(busy, cpu_utilization_ratio=0.75)),
        "already at the least of 2": decide_workers(replace(busy, workers=2, cpu_utilization_ratio=0.95)),
        "waiting for the last change": decide_workers(busy, just),
        "is warning; waiting": decide_workers(replace(busy, cpu_utilization_ratio=0.75), just),
        "cores carry 2 threads": decide_workers(replace(busy, cpu_limit_cores=0.5)),
        "close to its warning": decide_workers(replace(busy, memory_utilization_ratio=0.65)),
        "trying again in 20 s": decide_workers(busy, held),
        "one more would near": decide_workers(busy, dear),
        "resources are calm": decide_workers(busy),
        "enough workers": decide_workers(replace(busy, pending=3)),
        "no work is waiting": decide_workers(replace(busy, pending=0)),
        "back to the least": decide_workers(replace(busy, pending=0), SizingPast(idle_since_seconds=60.0)),
    }
    for phrase, decision in told.items():
        assert phrase in decision.reason


def test_unknown_figures_neither_press_nor_bar() -> None:
    blind = replace(CALM, cpu_utilization_ratio=math.nan, memory_utilization_ratio=math.nan, pending=20)
    assert decide_workers(replace(blind, cpu_limit_cores=math.nan)).target == 4
    assert range(9)[decide_workers(blind)] == 4


# -- in a loop with a machine -----------------------------------------------------------------


@dataclass
class Machine:
    """A machine that answers to the number of busy workers late, and is read with noise.

    CPU and memory approach what the load asks for with a time constant each; ``others`` is what
    runs beside the pool.
    """

    cpu_per_worker: float = 0.05
    memory_per_worker: float = 0.02
    cpu_base: float = 0.05
    memory_base: float = 0.1
    cores: float = 4.0
    lag_seconds: float = 1.0
    memory_lag_seconds: float = 3.0
    noise: float = 0.0
    low: int = 2
    high: int = 16
    period: float = 1.0
    seed: int = 0
    others: Callable[[float], tuple[float, float]] = lambda _: (0.0, 0.0)
    pending: Callable[[float], int] = lambda _: 100
    #: What was so at each step: time, target, true CPU, true memory, reason.
    steps: list[tuple[float, int, float, float, str]] = field(default_factory=list)

    def run(self, seconds: float) -> Machine:
        chance = random.Random(self.seed)
        workers, past = self.low, SizingPast()
        cpu, memory = self.cpu_base, self.memory_base
        for step in range(int(seconds / self.period)):
            now = step * self.period
            pending = self.pending(now)
            busy = min(workers, pending)
            cpu_beside, memory_beside = self.others(now)
            cpu_asked = min(1.0, self.cpu_base + cpu_beside + busy * self.cpu_per_worker)
            memory_asked = self.memory_base + memory_beside + busy * self.memory_per_worker
            cpu += (cpu_asked - cpu) * (1 - math.exp(-self.period / self.lag_seconds))
            memory += (memory_asked - memory) * (1 - math.exp(-self.period / self.memory_lag_seconds))
            seen = SizingInput(
                self.cores,
                min(1.0, max(0.0, cpu + chance.gauss(0, self.noise))),
                max(0.0, memory + chance.gauss(0, self.noise / 10)),
                0.72,
                0.9,
                0.68,
                0.85,
                workers=workers,
                pending=pending,
                min_workers=self.low,
                max_workers=self.high,
                now_seconds=now,
            )
            decision = decide_workers(seen, past)
            workers, past = decision.target, decision.past
            self.steps.append((now, workers, cpu, memory, decision.reason))
        return self

    def after(self, seconds: float) -> list[tuple[float, int, float, float, str]]:
        return [step for step in self.steps if step[0] >= seconds]

    def changes(self, since: float = 0.0) -> list[tuple[float, int]]:
        """Every change of the target, as time and size of the step."""
        steps = self.after(since)
        return [(b[0], b[1] - a[1]) for a, b in itertools.pairwise(steps) if a[1] != b[1]]

    def turns(self, since: float = 0.0) -> int:
        """How often growth follows shrinking or the other way round."""
        signs = [math.copysign(1, change) for _, change in self.changes(since)]
        return sum(a != b for a, b in itertools.pairwise(signs))


def test_a_light_load_gets_all_there_is_soon_and_keeps_it() -> None:
    machine = Machine(cpu_per_worker=0.02, memory_per_worker=0.01, noise=0.03).run(300)
    assert machine.after(30)[0][1] == 16
    assert machine.changes(30) == []


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
@pytest.mark.parametrize("seed", range(8))
def test_a_cpu_load_settles_below_the_warning_level(noise: float, seed: int) -> None:
    machine = Machine(cpu_per_worker=0.11, noise=noise, seed=seed).run(900)
    assert max(step[2] for step in machine.steps) < 0.9
    assert all(step[2] < 0.72 for step in machine.after(60))
    assert all(step[1] >= 4 for step in machine.after(60))
    assert len(machine.changes(60)) <= 4
    assert machine.turns(60) <= 3


@pytest.mark.parametrize("per_worker", [0.05, 0.09, 0.15])
@pytest.mark.parametrize("lag", [1.0, 4.0, 10.0])
def test_a_memory_load_never_gets_critical(per_worker: float, lag: float) -> None:
    machine = Machine(cpu_per_worker=0.01, memory_per_worker=per_worker, memory_lag_seconds=lag).run(900)
    assert max(step[3] for step in machine.steps) < 0.85
    assert all(step[3] < 0.68 for step in machine.after(300))
    assert machine.after(300)[0][1] >= min(16, int((0.68 * 0.75 - 0.1) / per_worker))
    assert machine.turns(300) <= 2


def test_pressure_from_beside_is_given_way_to_and_recovered_from() -> None:
    machine = Machine(
        cpu_per_worker=0.03, others=lambda now: (0.6, 0.0) if 100 <= now < 160 else (0.0, 0.0), noise=0.02
    ).run(400)
    before = machine.after(90)[0][1]
    assert before == 16
    during = machine.after(150)[0][1]
    assert during <= 4
    assert machine.after(160 + HOLD_SECONDS + 60)[0][1] == before
    assert machine.changes(160 + HOLD_SECONDS + 60) == []


def test_memory_pressure_from_beside_too() -> None:
    machine = Machine(
        cpu_per_worker=0.02, memory_per_worker=0.02, others=lambda now: (0.0, 0.35) if 100 <= now < 200 else (0.0, 0.0)
    ).run(500)
    assert machine.after(90)[0][1] == 16
    assert machine.after(195)[0][1] <= 12
    assert machine.after(190)[0][3] < 0.85
    assert machine.after(200 + HOLD_SECONDS + 90)[0][1] == 16


def test_a_load_that_grows_dearer_is_not_tried_again_and_again() -> None:
    # Each worker costs little until more than six are busy: what was learned below does not hold above.
    machine = Machine(cpu_per_worker=0.03, others=lambda _: (0.0, 0.0))
    machine.others = lambda _: (0.5, 0.0) if machine.steps and machine.steps[-1][1] > 6 else (0.0, 0.0)
    machine.run(3600)
    ups = [when for when, change in machine.changes() if change > 0]
    assert len([when for when in ups if when > 600]) <= 6
    assert max(b - a for a, b in itertools.pairwise(ups)) >= 8 * HOLD_SECONDS


def test_bursts_do_not_make_the_size_follow_each() -> None:
    machine = Machine(cpu_per_worker=0.02, pending=lambda now: 40 if now % 20 < 10 else 0).run(600)
    assert machine.changes(120) == []
    assert machine.after(120)[0][1] == 16


def test_without_work_it_goes_back_and_knows_the_way_up_again() -> None:
    machine = Machine(cpu_per_worker=0.02, pending=lambda now: 40 if now < 60 or now >= 200 else 0).run(260)
    assert machine.after(60 + IDLE_SECONDS + 2)[0][1] == 2
    # What proved itself before is not approached in steps a second time.
    assert machine.after(201)[0][1] == 16


@settings(max_examples=300, deadline=None)
@given(
    cpu=st.floats(0.002, 0.6),
    memory=st.floats(0.0, 0.3),
    base=st.floats(0.0, 0.6),
    low=st.integers(1, 4),
    more=st.integers(0, 28),
    pending=st.integers(0, 60),
    cores=st.integers(1, 64),
    lag=st.floats(0.1, 2.0),
    memory_lag=st.floats(0.1, 6.0),
    noise=st.sampled_from([0.0, 0.01, 0.03]),
    period=st.sampled_from([0.25, 1.0, 2.0]),
    seed=st.integers(0, 5),
)
def test_any_steady_load_settles_below_what_it_can_help(
    cpu: float,
    memory: float,
    base: float,
    low: int,
    more: int,
    pending: int,
    cores: int,
    lag: float,
    memory_lag: float,
    noise: float,
    period: float,
    seed: int,
) -> None:
    machine = Machine(
        cpu_per_worker=cpu,
        memory_per_worker=memory,
        cpu_base=base / 2,
        memory_base=base,
        cores=float(cores),
        lag_seconds=lag,
        memory_lag_seconds=memory_lag,
        noise=noise,
        low=low,
        high=low + more,
        period=period,
        seed=seed,
        pending=lambda _: pending,
    ).run(1200)
    late = machine.after(600)
    # Bounded: trials come at 30, 60, 120, ... seconds, so that few fall into ten minutes.
    assert len(machine.changes(600)) <= 6
    assert machine.turns(600) <= 4
    for _, workers, cpu_now, memory_now, reason in late[len(late) // 2 :: 10]:
        if workers > low and machine.changes(600) == []:
            assert cpu_now < 0.72 + 3 * noise, reason
            assert memory_now < 0.68 + noise, reason
