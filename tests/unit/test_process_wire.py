"""Frames in any pieces, pickles by reference or by value, and the culprit's name."""

from __future__ import annotations

import pickle
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wiseflow_nb.context import CancelToken, RemoteRun, TaskContext
from wiseflow_nb.errors import UsageError
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.pool._process_stop import CLEANUP_SECONDS, KILL_SECONDS, TOKEN_SECONDS, StopPlan
from wiseflow_nb.pool._process_wire import FrameReader, call_culprit, culprit, dump_call, dumps, frame
from wiseflow_nb.tasks import TaskManager

HEADERS = st.tuples(st.text(), st.integers(), st.floats(allow_nan=False), st.booleans())


@given(st.lists(st.tuples(HEADERS, st.binary(max_size=300)), max_size=6), st.data())
def test_frames_come_out_whole_however_they_were_cut(messages: list[tuple[Any, bytes]], data: st.DataObject) -> None:
    stream = b"".join(frame(header, body) for header, body in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader, found = FrameReader(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[start:end])
    assert found == messages


def test_what_is_importable_goes_by_reference_and_the_rest_by_value() -> None:
    assert pickle.loads(dump_call(len, ("abc",), {})) == (len, ("abc",), {})
    assert b"cloudpickle" not in dump_call(len, ("abc",), {})
    two = 2
    fn, args, kwargs = pickle.loads(dump_call(lambda x: x + two, (1,), {}))
    assert fn(*args, **kwargs) == 3
    made_here = type("MadeHere", (), {"__module__": "__main__"})
    data = dumps({"value": made_here})
    assert b"cloudpickle" in data
    assert pickle.loads(data)["value"] is made_here


def test_the_culprit_is_named_with_its_place() -> None:
    lock = threading.Lock()
    assert culprit("the result", lock) == "the result (lock)"
    assert culprit("the result", {"a": [1, (lock,)]}) == "the result['a'][1][0] (lock)"
    assert culprit("the result", SimpleNamespace(held=lock)) == "the result.held (lock)"
    assert call_culprit(len, (1, lock), {}) == "argument 2 (lock)"
    assert call_culprit(len, (1,), {"key": {"x": lock}}) == "argument 'key'['x'] (lock)"
    assert call_culprit(lambda: lock, (), {}) == "the function's variable 'lock' (lock)"


def test_a_kind_that_is_unknown_is_refused_before_anything_starts() -> None:
    with ThreadPoolManager() as pool:
        with pytest.raises(UsageError, match="thread, process"):
            pool.options(kind="fiber")
        assert pool.processes.pids() == []
    with TaskManager() as tasks:
        with pytest.raises(UsageError, match="process"):
            tasks.options(kind="fiber")
        with pytest.raises(UsageError, match="idempotent"):
            tasks.options(idempotent="yes")


def test_a_token_tells_within_the_block_only() -> None:
    told: list[str] = []
    token = CancelToken()
    with token.telling(told.append):
        assert told == []
        token.cancel("enough")
        token.cancel("again")
        assert told == ["enough"]
    with token.telling(told.append):
        assert told == ["enough", "enough"]
    late = CancelToken()
    with late.telling(told.append):
        pass
    late.cancel()
    assert len(told) == 2


def test_a_context_knows_whether_its_code_was_killed() -> None:
    context = TaskContext("t1", "one")
    assert not context.forced
    context.remote = RemoteRun("process", 1.0, 2.0)
    assert not context.forced
    assert context.remote.memory_source == "process"
    context.remote = RemoteRun(forced=True)
    assert context.forced
    assert context.remote.memory_source == "unknown"


@given(
    st.floats(0.0, 1e6),
    st.none() | st.floats(0.0, TOKEN_SECONDS - 0.01) | st.floats(TOKEN_SECONDS + 0.01, KILL_SECONDS - 0.01),
)
def test_code_that_was_asked_to_stop_has_an_end_and_is_interrupted_once_before(
    asked: float, stopped: float | None
) -> None:
    plan, now, actions = StopPlan(), asked, []
    assert plan.due(now)[0] == "wait"
    plan.asked = asked
    while len(actions) < 20:
        if stopped is not None and plan.stopped is None and now >= asked + stopped:
            plan.stopped = now
        action, seconds = plan.due(now)
        actions.append(action)
        if action == "kill":
            break
        if action == "interrupt":
            assert now >= asked + TOKEN_SECONDS
            plan.interrupted = True
        assert 0.0 < seconds <= CLEANUP_SECONDS + 1e-6
        now += seconds
        if stopped is not None and plan.stopped is None:
            now = min(now, max(asked + stopped, now - seconds))
    assert actions[-1] == "kill"
    assert actions.count("interrupt") == (0 if stopped is not None and stopped < TOKEN_SECONDS else 1)
    limit = KILL_SECONDS if stopped is None else stopped + CLEANUP_SECONDS
    assert now - asked == pytest.approx(limit, abs=1e-6)
