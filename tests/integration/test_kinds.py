"""One contract for every kind of task: thread, process and async."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from wiseflow_nb.context import TaskContext, check_cancelled, current_task
from wiseflow_nb.errors import TaskCancelledError, TaskTimeoutError
from wiseflow_nb.records import Priority, TaskRecord, TaskState, TaskTransition
from wiseflow_nb.tasks import Retry, TaskManager

KINDS = ["thread", "process", "async"]
WAIT = 60.0


def shaped(kind: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function as the kind wants it."""
    if kind != "async":
        return fn

    @functools.wraps(fn)
    async def run(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return run


def add(first: int, /, second: int, *, third: int = 0) -> int:
    return first + second + third


def fail_with(text: str) -> None:
    raise ValueError(text)


def who() -> tuple[str, str, int]:
    context = current_task()
    assert context is not None
    context.progress(0.5, "half")
    return context.task_id, context.name, context.attempt


def third_time() -> int:
    context = current_task()
    assert context is not None
    if context.attempt < 3:
        raise OSError(f"attempt {context.attempt}")
    return context.attempt


def hang() -> None:
    context = current_task()
    assert context is not None
    context.progress(0.0, "up")
    context.token.wait(WAIT)
    check_cancelled()


async def hang_async() -> None:
    context = current_task()
    assert context is not None
    context.progress(0.0, "up")
    await asyncio.sleep(WAIT)


def hanging(kind: str) -> Callable[[], Any]:
    return hang_async if kind == "async" else hang


class Bench:
    """A manager, and a way to wait for what its records say."""

    def __init__(self) -> None:
        self.news = threading.Condition()
        self.records: dict[str, TaskRecord] = {}
        self.moves: list[tuple[str, str]] = []
        self.cleaned: list[tuple[str, int]] = []
        self.tasks = TaskManager(max_concurrent=2, on_change=self._changed)

    def _changed(self, record: TaskRecord, transition: TaskTransition | None) -> None:
        with self.news:
            self.records[record.task_id] = record
            if transition is not None:
                self.moves.append((record.task_id, transition.to_state.value))
            self.news.notify_all()

    def until(self, task: Any, condition: Callable[[TaskRecord], bool]) -> None:
        with self.news:
            assert self.news.wait_for(lambda: task.id in self.records and condition(self.records[task.id]), WAIT)

    def clean(self, context: TaskContext) -> None:
        self.cleaned.append((context.task_id, context.attempt))


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.tasks.shutdown("now")
    assert made.tasks.cleanup_failures == 0
    # Each task was settled once, in one of the terminal states.
    ended = [number for number, state in made.moves if TaskState(state).terminal]
    assert len(ended) == len(set(ended)) == len(made.records)


@pytest.mark.parametrize("kind", KINDS)
def test_results_arguments_and_dependencies(bench: Bench, kind: str) -> None:
    view = bench.tasks.options(kind=kind)
    fn = shaped(kind, add)
    first = view.submit(fn, 1, 2)
    second = view.submit(fn, first, second=10, third=100)
    third = bench.tasks.options(kind=kind, dependencies=[second.id]).submit(fn, 0, 0)
    assert (first.result(WAIT), second.result(WAIT), third.result(WAIT)) == (3, 113, 0)
    record = second.record()
    assert (record.kind, record.state, record.dependencies) == (kind, "completed", (first.id,))
    assert bench.cleaned == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_comes_back_with_its_traceback(bench: Bench, kind: str) -> None:
    task = bench.tasks.options(kind=kind, cleanup=bench.clean).submit(shaped(kind, fail_with), "bad value")
    with pytest.raises(ValueError, match="bad value"):
        task.result(WAIT)
    record = task.record()
    assert (record.state, record.error) == ("failed", "ValueError: bad value")
    assert "in fail_with" in record.traceback
    assert bench.cleaned == [(task.id, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_task_knows_itself_and_is_known(bench: Bench, kind: str) -> None:
    options = {"kind": kind, "name": "me", "priority": "high", "tags": ["a"]}
    task = bench.tasks.options(**options).submit(shaped(kind, who))
    assert task.result(WAIT) == (task.id, "me", 1)
    record = task.record()
    assert (record.name, record.priority, record.tags) == ("me", Priority.HIGH, ("a",))
    assert (record.progress, record.progress_text) == (0.5, "half")
    sources = {"thread": "thread_time", "process": "process", "async": "coroutine_steps"}
    assert record.cpu_source == sources[kind]
    assert 0.0 <= record.cpu_seconds <= record.wall_seconds + 1.0
    assert record.queue_seconds >= 0.0
    assert (record.memory_source == "process") == (kind == "process")
    assert (record.memory_peak_bytes > 1e6) == (kind == "process")


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_tried_again(bench: Bench, kind: str) -> None:
    task = bench.tasks.options(kind=kind, retry=Retry(2, base=0.0), cleanup=bench.clean).submit(
        shaped(kind, third_time)
    )
    assert task.result(WAIT) == 3
    assert task.record().attempt == 3
    assert bench.cleaned == [(task.id, 1), (task.id, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_queued_task_is_cancelled_before_it_runs(bench: Bench, kind: str) -> None:
    holders = [bench.tasks.options(kind=kind).submit(hanging(kind)) for _ in range(2)]
    for holder in holders:
        bench.until(holder, lambda record: record.progress_text == "up")
    queued = bench.tasks.options(kind=kind, cleanup=bench.clean).submit(shaped(kind, add), 1, 2)
    assert queued.state == "pending"
    assert queued.cancel("not needed")
    with pytest.raises(TaskCancelledError, match="not needed"):
        queued.result(WAIT)
    assert queued.record().attempt == 0
    assert bench.cleaned == []
    for holder in holders:
        holder.cancel()


@pytest.mark.parametrize("kind", KINDS)
def test_a_running_task_is_cancelled_and_cleaned_up_once(bench: Bench, kind: str) -> None:
    task = bench.tasks.options(kind=kind, cleanup=bench.clean, retry=3).submit(hanging(kind))
    bench.until(task, lambda record: record.progress_text == "up")
    assert task.cancel("enough")
    with pytest.raises(TaskCancelledError, match="enough"):
        task.result(WAIT)
    assert [state for number, state in bench.moves if number == task.id][-2:] == ["cancelling", "cancelled"]
    assert bench.cleaned == [(task.id, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_time_out_stops_the_code(bench: Bench, kind: str) -> None:
    task = bench.tasks.options(kind=kind, cleanup=bench.clean, timeout=0.2).submit(hanging(kind))
    with pytest.raises(TaskTimeoutError):
        task.result(WAIT)
    assert task.state == "timed_out"
    assert bench.cleaned == [(task.id, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_time_out_may_lead_to_another_attempt(bench: Bench, kind: str) -> None:
    task = bench.tasks.options(kind=kind, cleanup=bench.clean, timeout=0.2, retry=Retry(1, base=0.0)).submit(
        hanging(kind)
    )
    with pytest.raises(TaskTimeoutError):
        task.result(WAIT)
    assert task.record().attempt == 2
    assert bench.cleaned == [(task.id, 1), (task.id, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_shutdown_stops_what_runs(bench: Bench, kind: str) -> None:
    task = bench.tasks.options(kind=kind, cleanup=bench.clean).submit(hanging(kind))
    bench.until(task, lambda record: record.progress_text == "up")
    bench.tasks.shutdown("now", timeout=WAIT)
    assert task.state == "cancelled"
    assert bench.cleaned == [(task.id, 1)]
