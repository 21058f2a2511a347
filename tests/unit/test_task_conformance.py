"""What every kind of task must do alike. A new kind adds an entry to ``KINDS`` and nothing else.

The work speaks to the test through files, so that it may run anywhere.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_task_invariants import Log, check_closed_manager
from wiseflow_nb.context import TaskContext, check_cancelled, current_task
from wiseflow_nb.errors import TaskCancelledError, TaskSkippedError, TaskTimeoutError
from wiseflow_nb.records import TaskState
from wiseflow_nb.tasks import Retry, Task, TaskManager

SOON = 20.0
S = TaskState
#: Each kind, and how its figures say that they were measured.
KINDS = {"thread": "thread_time", "async": "coroutine_steps"}


# -- the work --------------------------------------------------------------------------------------


def work(kind: str, what: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function as work of a kind."""
    if kind != "async":
        return what

    @functools.wraps(what)
    async def coroutine(*args: Any) -> Any:
        await asyncio.sleep(0)
        value = what(*args)
        return await value if inspect.isawaitable(value) else value

    return coroutine


def add(*numbers: int) -> int:
    return sum(numbers)


def fail_until(path: str, times: int) -> int:
    log = Path(path)
    count = len(log.read_text()) if log.exists() else 0
    log.write_text("x" * (count + 1))
    if count < times:
        raise ValueError(f"attempt {count + 1}")
    return count + 1


def wait_until_asked(path: str) -> Any:
    """Begin, say so, and go on until asked to stop; a coroutine for a loop, a loop for the others."""
    Path(path).touch()
    if in_loop():
        return asyncio.sleep(1000)
    while True:
        check_cancelled()
        time.sleep(0.001)


def in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def burn(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def talk() -> str:
    context = current_task()
    assert context is not None
    context.progress(0.5, "half")
    print("said")
    return f"{context.name} {context.attempt}"


# -- the tests -------------------------------------------------------------------------------------


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tasks() -> Iterator[TaskManager]:
    log: Log = []
    manager = TaskManager(max_concurrent=2, on_change=lambda *change: log.append(change))
    yield manager
    manager.shutdown("now", timeout=SOON)
    check_closed_manager(manager, log)


@pytest.fixture
def cleaned(tasks: TaskManager) -> list[tuple[str, int]]:
    seen: list[tuple[str, int]] = []

    def clean(context: TaskContext) -> None:
        seen.append((context.task_id, context.attempt))

    tasks.register_resource_cleanup_handler(clean)
    return seen


def begun(path: Path, task: Task[Any]) -> None:
    deadline = time.monotonic() + SOON
    while not path.exists():
        assert not task.done(), task.record()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_result_and_its_figures(tasks: TaskManager, kind: str) -> None:
    task = tasks.options(kind=kind, name="n").submit(work(kind, add), 1, 2)
    assert task.result(SOON) == 3
    record = task.record()
    assert (record.kind, record.state, record.attempt, record.cpu_source) == (kind, S.COMPLETED, 1, KINDS[kind])
    assert 0 <= record.cpu_seconds <= record.wall_seconds + 0.01
    assert record.created_seconds <= record.ready_seconds <= record.started_seconds <= record.finished_seconds
    assert record.queue_seconds >= 0


def test_cpu_time_is_that_of_the_code(tasks: TaskManager, kind: str) -> None:
    task = tasks.options(kind=kind).submit(work(kind, burn), 0.05)
    task.result(SOON)
    assert task.record().cpu_seconds >= 0.05


def test_dependencies_across(tasks: TaskManager, kind: str) -> None:
    one = tasks.submit(add, 1)
    two = tasks.options(kind=kind).submit(work(kind, add), one, 1)
    three = tasks.submit(add, two, 1)
    assert three.result(SOON) == 3


def test_a_failure_is_raised_and_skips(tasks: TaskManager, kind: str, cleaned: list[Any], tmp_path: Path) -> None:
    task = tasks.options(kind=kind).submit(work(kind, fail_until), str(tmp_path / "log"), 9)
    child = tasks.options(kind=kind).submit(work(kind, add), task)
    with pytest.raises(ValueError, match="attempt 1"):
        task.result(SOON)
    assert isinstance(child.exception(SOON), TaskSkippedError)
    assert (task.state, "ValueError: attempt 1" in task.record().traceback) == (S.FAILED, True)
    assert cleaned == [(task.id, 1)]


def test_retries_until_it_works(tasks: TaskManager, kind: str, cleaned: list[Any], tmp_path: Path) -> None:
    rule = Retry(3, base=0.001, jitter=None)
    task = tasks.options(kind=kind, retry=rule).submit(work(kind, fail_until), str(tmp_path / "log"), 2)
    assert task.result(SOON) == 3
    assert task.record().attempt == 3
    assert cleaned == [(task.id, 1), (task.id, 2)]


def test_cancel_while_it_runs(tasks: TaskManager, kind: str, cleaned: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "begun"
    task = tasks.options(kind=kind, retry=5).submit(work(kind, wait_until_asked), str(path))
    begun(path, task)
    assert task.running()
    assert task.cancel("enough")
    with pytest.raises(TaskCancelledError, match="enough"):
        task.result(SOON)
    assert (task.state, task.record().attempt, cleaned) == (S.CANCELLED, 1, [(task.id, 1)])
    assert tasks.options(kind=kind).submit(work(kind, add), 1).result(SOON) == 1


def test_cancel_before_it_runs(tasks: TaskManager, kind: str, cleaned: list[Any], tmp_path: Path) -> None:
    tasks.pause()
    waiting = tasks.options(kind=kind).submit(work(kind, add), 1)
    child = tasks.options(kind=kind, dependencies=[waiting]).submit(work(kind, add), 1)
    assert child.cancel()
    assert waiting.cancel()
    tasks.resume()
    assert (waiting.state, child.state, waiting.record().attempt, cleaned) == (S.CANCELLED, S.CANCELLED, 0, [])


def test_a_time_out_stops_it(tasks: TaskManager, kind: str, cleaned: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "begun"
    task = tasks.options(kind=kind, timeout=0.05).submit(work(kind, wait_until_asked), str(path))
    with pytest.raises(TaskTimeoutError):
        task.result(SOON)
    assert (task.state, cleaned) == (S.TIMED_OUT, [(task.id, 1)])


def test_a_deadline_stops_it(tasks: TaskManager, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "begun"
    task = tasks.options(kind=kind, deadline=0.05, retry=5).submit(work(kind, wait_until_asked), str(path))
    with pytest.raises(TaskTimeoutError):
        task.result(SOON)
    assert task.state is S.TIMED_OUT


def test_what_it_tells_of_itself(tasks: TaskManager, kind: str) -> None:
    task = tasks.options(kind=kind, name="talker").submit(work(kind, talk))
    assert task.result(SOON) == "talker 1"
    record = task.record()
    assert (record.progress, record.progress_text, record.output_tail) == (0.5, "half", "said\n")


def test_many_in_a_bounded_map(tasks: TaskManager, kind: str) -> None:
    with tasks.options(kind=kind).map(work(kind, add), range(40), range(40), outstanding=4) as results:
        assert list(results) == [2 * number for number in range(40)]


def test_retry_by_hand(tasks: TaskManager, kind: str, tmp_path: Path) -> None:
    task = tasks.options(kind=kind).submit(work(kind, fail_until), str(tmp_path / "log"), 1)
    child = tasks.options(kind=kind).submit(work(kind, add), task, 1)
    assert task.exception(SOON) is not None
    assert child.exception(SOON) is not None
    assert tasks.retry(task.id).result(SOON) == 2
    assert tasks.drain(SOON)
    assert [record.state for record in tasks.records() if record.retry_of == child.id] == [S.COMPLETED]
