"""The pure sizing rule: bounds, pressure, calm, and no oscillation."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from wiseflow_nb.sizing import SizingInput, decide_workers

CALM = SizingInput(4.0, 0.1, 0.1, 0.72, 0.9, 0.68, 0.85, 2, 0, 2, 8, now_seconds=100.0)
ratios = st.one_of(st.floats(0, 1.5), st.just(float("nan")))


@given(ratios, ratios, st.integers(0, 30), st.integers(0, 50), st.integers(1, 5), st.integers(0, 20))
def test_never_outside_the_bounds(cpu: float, memory: float, workers: int, pending: int, low: int, more: int) -> None:
    given_input = replace(
        CALM,
        cpu_utilization_ratio=cpu,
        memory_utilization_ratio=memory,
        workers=workers,
        pending=pending,
        min_workers=low,
        max_workers=low + more,
    )
    decision = decide_workers(given_input)
    assert low <= decision.target <= low + more
    assert decision.reason
    assert decision == decide_workers(given_input)


def test_critical_halves_warning_takes_one_calm_grows() -> None:
    busy = replace(CALM, workers=8, pending=20)
    assert decide_workers(replace(busy, memory_utilization_ratio=0.9)).target == 4
    assert decide_workers(replace(busy, cpu_utilization_ratio=0.75)).target == 7
    assert decide_workers(replace(CALM, pending=20)).target == 8
    assert decide_workers(replace(CALM, workers=8, pending=0)).target == 2


def test_a_steady_load_is_not_answered_with_swings() -> None:
    workers, changed_at, sizes = 2, -1e9, []
    for second in range(300):
        cpu = min(1.0, workers * 0.12)
        given_input = replace(
            CALM,
            cpu_utilization_ratio=cpu,
            workers=workers,
            pending=50,
            now_seconds=second,
            last_change_seconds=changed_at,
        )
        target = decide_workers(given_input).target
        if target != workers:
            workers, changed_at = target, second
        sizes.append(workers)
    assert len(set(sizes[100:])) == 1


@given(st.floats(0.005, 0.6), st.integers(1, 4), st.integers(0, 28), st.integers(0, 60), st.integers(1, 64))
def test_any_steady_load_settles(load: float, low: int, more: int, pending: int, cores: int) -> None:
    workers, changed_at, sizes = low, -1e9, []
    for second in range(400):
        target = decide_workers(
            replace(
                CALM,
                cpu_limit_cores=float(cores),
                cpu_utilization_ratio=min(1.0, workers * load),
                workers=workers,
                pending=pending,
                min_workers=low,
                max_workers=low + more,
                now_seconds=float(second),
                last_change_seconds=changed_at,
            )
        ).target
        if target != workers:
            workers, changed_at = target, float(second)
        sizes.append(workers)
    assert len(set(sizes[200:])) == 1
