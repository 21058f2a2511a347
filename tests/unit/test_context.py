"""What code inside a task can ask."""

from __future__ import annotations

import threading

import pytest

from wiseflow_nb.context import CancelToken, TaskContext, check_cancelled, current_task, enter_task, leave_task
from wiseflow_nb.errors import TaskCancelledError, UsageError


def test_outside_of_tasks_there_is_none() -> None:
    assert current_task() is None
    check_cancelled()


def test_a_token_is_set_once() -> None:
    token = CancelToken()
    assert not token.wait(0)
    assert token.cancel("enough")
    assert not token.cancel("again")
    assert (token.cancelled, token.reason, token.wait(0)) == (True, "enough", True)


def test_the_context_is_that_of_the_thread_that_entered() -> None:
    context = TaskContext("t1", "one")
    seen: list[object] = []
    entered = enter_task(context)
    thread = threading.Thread(target=lambda: seen.append(current_task()))
    thread.start()
    thread.join()
    assert current_task() is context
    context.token.cancel("stop")
    with pytest.raises(TaskCancelledError, match="'one' was asked to stop: stop"):
        check_cancelled()
    leave_task(entered)
    assert seen == [None]
    assert current_task() is None


def test_progress_is_told_and_checked() -> None:
    told: list[tuple[float, str]] = []
    context = TaskContext("t1", "one", on_progress=lambda fraction, text: told.append((fraction, text)))
    context.progress(0.5, "half")
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="within 0 and 1"):
            context.progress(wrong)
    assert told == [(0.5, "half")]


def test_cleanups_come_last_in_first_out_and_once() -> None:
    context = TaskContext("t1", "one")
    context.push_cleanup(print, 1)
    context.push_cleanup(print, 2, sep="")
    assert context.take_cleanups() == [(print, (2,), {"sep": ""}), (print, (1,), {})]
    assert context.take_cleanups() == []
