"""The pure core: every legal and illegal move, every outcome, every delay."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import CancelledError
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wiseflow_nb.errors import IllegalTransitionError, TaskCancelledError, UsageError
from wiseflow_nb.records import TaskState
from wiseflow_nb.tasks import Retry
from wiseflow_nb.tasks._graph import find_path
from wiseflow_nb.tasks._machine import BIRTH, LEGAL, Stop, check_move, outcome

S = TaskState
TABLE = {
    S.WAITING: {S.PENDING, S.SKIPPED, S.CANCELLED, S.TIMED_OUT},
    S.PENDING: {S.RUNNING, S.CANCELLED, S.TIMED_OUT},
    S.RUNNING: {S.COMPLETED, S.FAILED, S.RETRY_WAIT, S.CANCELLING, S.PENDING},
    S.RETRY_WAIT: {S.PENDING, S.CANCELLED, S.TIMED_OUT},
    S.CANCELLING: {S.CANCELLED, S.COMPLETED, S.FAILED, S.TIMED_OUT, S.RETRY_WAIT, S.ABANDONED},
}


@pytest.mark.parametrize(("source", "target"), list(product(TaskState, TaskState)))
def test_every_move(source: TaskState, target: TaskState) -> None:
    if target in TABLE.get(source, set()):
        check_move("t1", [], source, target)
        return
    with pytest.raises(IllegalTransitionError, match=r"t1: .* went waiting -> pending") as caught:
        check_move("t1", ["waiting", "pending"], source, target)
    assert f"{source} -> {target}" in str(caught.value)


@pytest.mark.parametrize("target", list(TaskState))
def test_birth(target: TaskState) -> None:
    if target in (S.WAITING, S.PENDING):
        check_move("t1", [], None, target)
    else:
        with pytest.raises(IllegalTransitionError):
            check_move("t1", [], None, target)


def test_terminal_is_terminal() -> None:
    assert set(LEGAL) == {state for state in TaskState if not state.terminal}
    assert all(not state.terminal for state in BIRTH)


@pytest.mark.parametrize(
    ("stop", "error", "may_retry", "expected"),
    [
        (Stop.NONE, None, True, S.COMPLETED),
        (Stop.NONE, ValueError(), False, S.FAILED),
        (Stop.NONE, ValueError(), True, S.RETRY_WAIT),
        (Stop.NONE, asyncio.CancelledError(), True, S.CANCELLED),
        (Stop.NONE, CancelledError(), False, S.CANCELLED),
        (Stop.CANCEL, None, True, S.CANCELLED),
        (Stop.CANCEL, TaskCancelledError(), False, S.CANCELLED),
        (Stop.CANCEL, ValueError(), False, S.FAILED),
        (Stop.TIMEOUT, None, False, S.TIMED_OUT),
        (Stop.TIMEOUT, ValueError(), False, S.TIMED_OUT),
        (Stop.TIMEOUT, None, True, S.RETRY_WAIT),
        (Stop.DEADLINE, None, True, S.TIMED_OUT),
    ],
)
def test_outcome(stop: Stop, error: BaseException | None, may_retry: bool, expected: TaskState) -> None:
    assert outcome(stop, error, may_retry=may_retry) is expected
    assert expected in LEGAL[S.CANCELLING] | LEGAL[S.RUNNING]


def test_delays_are_exact_without_jitter() -> None:
    rule = Retry(9, base=1.0, cap=60.0, jitter=None)
    rng = random.Random(0)
    assert [rule.delay(k, rng) for k in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert rule.delay(5000, rng) == 60


@given(st.integers(1, 200), st.floats(0, 10), st.floats(0, 100), st.integers())
def test_jitter_stays_below_the_bound_and_repeats(k: int, base: float, cap: float, seed: int) -> None:
    rule = Retry(3, base=base, cap=cap)
    delay = rule.delay(k, random.Random(seed))
    assert 0 <= delay <= min(cap, base * 2.0 ** (k - 1))
    assert delay == rule.delay(k, random.Random(seed))


def test_what_a_retry_covers() -> None:
    rule = Retry(1, on=(BaseException,))
    assert rule.covers(ValueError())
    never = [KeyboardInterrupt(), SystemExit(), asyncio.CancelledError(), TaskCancelledError(), GeneratorExit(), None]
    assert not any(rule.covers(error) for error in never)
    assert not Retry(1, on=KeyError).covers(ValueError())


@pytest.mark.parametrize(
    "values", [{"times": -1}, {"times": True}, {"on": ("x",)}, {"base": -1.0}, {"cap": float("nan")}, {"jitter": "x"}]
)
def test_a_bad_rule_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="retry"):
        Retry(**values)  # type: ignore[arg-type]


def test_a_path_is_found_or_not() -> None:
    edges = {1: [2, 3], 2: [4], 3: [], 4: [1]}
    assert find_path(1, 4, edges.__getitem__) == [1, 2, 4]
    assert find_path(3, 1, edges.__getitem__) is None
    assert find_path(1, 1, edges.__getitem__) == [1]
