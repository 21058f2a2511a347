"""The words of errors in the records: what they say, and that no call of the manager waits while they are made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from tests.unit.test_task_invariants import check_closed_manager
from wiseflow_nb.context import current_task
from wiseflow_nb.errors import TaskCancelledError, TaskSkippedError, TaskTimeoutError
from wiseflow_nb.records import TaskState
from wiseflow_nb.tasks import Retry, Task, TaskManager
from wiseflow_nb.tasks._texts import TRACEBACK_KEPT, ErrorText, text_of_error, text_of_own
from wiseflow_nb.testing import Stage

SOON = 20.0
S = TaskState


class WatchedError(Exception):
    """Tells, whenever its text is made, whether the manager's lock is held for that."""

    def __init__(self, inside: Callable[[], bool]) -> None:
        super().__init__()
        self._inside = inside
        self.held: list[bool] = []

    def __str__(self) -> str:
        self.held.append(self._inside())
        return "no"


class WatchedCancelError(WatchedError, asyncio.CancelledError):
    """Raised by code that cancels itself."""


class Refusing(Executor):
    """Takes no call."""

    def __init__(self) -> None:
        self.error: Exception = ValueError()

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        raise self.error


async def fail_on_loop(error: Exception) -> None:
    raise error


def fail(error: BaseException) -> None:
    raise error


def fail_when_asked(error: BaseException) -> None:
    context = current_task()
    assert context is not None
    context.token.wait(SOON)
    raise error


CASES: dict[str, tuple[Callable[[TaskManager, WatchedError], Task[Any]], TaskState]] = {
    "call": (lambda tasks, error: tasks.submit(fail, error), S.FAILED),
    "coroutine": (lambda tasks, error: tasks.submit(fail_on_loop, error), S.FAILED),
    "retried": (lambda tasks, error: tasks.options(retry=Retry(1, base=0)).submit(fail, error), S.FAILED),
    "timed out": (lambda tasks, error: tasks.options(timeout=0.01).submit(fail_when_asked, error), S.TIMED_OUT),
    "in a cleanup": (lambda tasks, error: tasks.options(cleanup=lambda: fail(error)).submit(fail, error), S.FAILED),
}


@pytest.mark.parametrize("case", CASES)
def test_the_lock_is_free_while_the_words_of_an_error_are_made(case: str) -> None:
    with TaskManager() as tasks:
        submit, state = CASES[case]
        error = WatchedError(tasks._scheduler.inside)
        task = submit(tasks, error)
        behind = tasks.options(dependencies=[task]).submit(int)
        assert tasks.drain(SOON)
        assert task.state is state
        assert behind.state is S.SKIPPED
        assert error.held
        assert not any(error.held)
    check_closed_manager(tasks)


def test_the_same_of_code_that_cancels_itself() -> None:
    with TaskManager() as tasks:
        error = WatchedCancelError(tasks._scheduler.inside)
        task = tasks.submit(fail, error)
        assert tasks.drain(SOON)
        assert task.state is S.CANCELLED
        assert task.record().error == "WatchedCancelError: no"
        assert error.held
        assert not any(error.held)


def test_the_same_of_a_pool_that_takes_no_call() -> None:
    pool = Refusing()
    with TaskManager(pool) as tasks:
        pool.error = error = WatchedError(tasks._scheduler.inside)
        task = tasks.submit(int)
        assert tasks.drain(SOON)
        assert task.state is S.FAILED
        assert task.record().error == "WatchedError: no"
        assert error.held
        assert not any(error.held)


def test_skipped_tasks_say_what_is_stored_and_make_no_text_anew() -> None:
    with TaskManager() as tasks:
        error = WatchedError(tasks._scheduler.inside)
        tasks.pause()
        first = tasks.submit(fail, error)
        others = [tasks.options(dependencies=[first]).submit(int) for _ in range(5)]
        last = tasks.options(dependencies=[others[0]]).submit(int)
        tasks.resume()
        assert tasks.drain(SOON)
        made = len(error.held)
        late = tasks.options(dependencies=[last]).submit(int)
        with pytest.raises(TaskSkippedError, match=rf"\(WatchedError: no\); retry {first.id}") as caught:
            late.result(SOON)
        assert caught.value.root_cause is error
        assert len(error.held) == made
    for task in (*others, last, late):
        assert f"(WatchedError: no); retry {first.id}" in task.record().error
    assert "because of 'fail'" in late.record().error


def test_a_skipped_task_says_why_the_other_was_cancelled() -> None:
    with TaskManager() as tasks:
        tasks.pause()
        first = tasks.submit(int)
        behind = tasks.options(dependencies=[first]).submit(int)
        first.cancel("not today")
        assert "(not today)" in behind.record().error
        tasks.resume()


def test_a_time_out_is_told_with_what_the_code_raised_then() -> None:
    stage = Stage()
    tasks = TaskManager(**stage.parts)

    async def stopped() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("half done")

    task = tasks.options(timeout=5, name="load").submit(stopped)
    stage.run()
    stage.advance(5)
    record = task.record()
    assert record.state is S.TIMED_OUT
    assert (
        record.error
        == f"TaskTimeoutError: task 'load' ({task.id}) was stopped: over its 5 s; give it more, or less to do"
    )
    head, _, tail = record.traceback.partition("ValueError: half done\n")
    assert head.startswith("Traceback (most recent call last):\n")
    assert tail.startswith("\nThe above exception was the direct cause of the following exception:\n\n")
    assert tail.endswith(f"wiseflow_nb.errors.{record.error}\n")
    tasks.shutdown()
    check_closed_manager(tasks)


def test_a_deadline_that_passes_before_the_task_begins_is_told() -> None:
    stage = Stage()
    tasks = TaskManager(**stage.parts)
    tasks.pause()
    task = tasks.options(deadline=5).submit(int)
    stage.advance(5)
    record = task.record()
    assert record.error.startswith("TaskTimeoutError: task 'int'")
    assert record.traceback == f"wiseflow_nb.errors.{record.error}\n"
    tasks.shutdown()


def test_words_of_our_own_are_as_the_standard_librarys() -> None:
    cause = ValueError("first")
    for error in (TaskTimeoutError("late"), TaskCancelledError("two\nlines")):
        assert text_of_own(error)[:2] == text_of_error(error)[:2]
        error.__cause__ = cause
        assert text_of_own(error, text_of_error(cause)) == text_of_error(error)


def test_an_error_that_cannot_be_shown_is_named() -> None:
    class BadError(Exception):
        def __str__(self) -> str:
            raise KeyboardInterrupt

    told = text_of_error(BadError())
    assert told.line() == "BadError: (its text could not be made)"
    assert told.traceback
    assert text_of_error(None) == ErrorText()
    assert ErrorText().line("why") == ""


def test_only_the_end_of_a_long_traceback_is_kept() -> None:
    told = text_of_error(ValueError("x" * 2 * TRACEBACK_KEPT + "end"))
    assert len(told.traceback) == TRACEBACK_KEPT
    assert told.traceback.endswith("end\n")
