"""An interrupt of the main thread in the midst of a submit: the task is not entered, or cancelled, and all else goes on."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import pytest

from tests.unit.test_task_invariants import Log, check_closed_manager
from wiseflow_nb.records import TaskState
from wiseflow_nb.tasks import TaskManager

SOON = 20.0
#: Where an interrupt in between is made up for: not in the standard library's own events.
TELLING = ("both", "record")  # what on_change is handed: there it is one of its failures, as any other
OURS = ("wiseflow_nb/tasks/", "wiseflow_nb/pool/", "wiseflow_nb/futures")


class Interrupt:
    """Raises in the calling thread at the moment with a number: where the interpreter looks for signals.

    That is when a function has begun, and when one of its own has returned.
    """

    def __init__(self, number: int) -> None:
        self._left = number
        self.struck = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "c_return") and _made_up_for(frame.f_code):
            self._left -= 1
            if not self._left:
                sys.setprofile(None)
                self.struck = True
                raise KeyboardInterrupt

    def during(self, call: Callable[[], Any]) -> Any:
        sys.setprofile(self)
        try:
            return call()
        except KeyboardInterrupt:
            return None
        finally:
            sys.setprofile(None)


def _made_up_for(code: CodeType) -> bool:
    if code.co_name == "start":
        return True  # a thread's, too
    return code.co_name not in TELLING and any(part in code.co_filename for part in OURS)


async def nothing() -> None:
    await asyncio.sleep(0)


def fail() -> None:
    raise ValueError("no")


SUBMITS: dict[str, Callable[[TaskManager], Any]] = {
    "call": lambda tasks: tasks.submit(int),
    "coroutine": lambda tasks: tasks.submit(nothing),
    "timed": lambda tasks: tasks.options(timeout=100, deadline=100, priority="high").submit(int),
    "dependent": lambda tasks: tasks.options(dependencies=["t1", "t4"]).submit(int),
    "skipped": lambda tasks: tasks.options(dependencies=["t3"]).submit(int),
}


def interrupted_at(number: int, what: str, *, told: bool) -> bool:
    """Interrupt a submit at a moment, and see that the manager goes on; return whether there was such a moment."""
    log: Log = []
    tasks = TaskManager(max_concurrent=2, on_change=(lambda *change: log.append(change)) if told else None)
    if what in ("dependent", "skipped"):
        for fn in (int, nothing, fail):
            tasks.submit(fn)
        assert tasks.drain(SOON)
    if what == "dependent":
        tasks.pause()
        tasks.submit(nothing)
    interrupt = Interrupt(number)
    task = interrupt.during(lambda: SUBMITS[what](tasks))
    tasks.resume()
    others = [tasks.submit(int), tasks.submit(nothing), tasks.submit(int)]
    assert tasks.drain(SOON)
    assert all(other.state is TaskState.COMPLETED for other in others)
    assert task is None or task.done()
    tasks.shutdown(timeout=SOON)
    check_closed_manager(tasks, log if told else None)
    return interrupt.struck


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("what", SUBMITS)
def test_a_submit_is_whole_or_nothing_wherever_an_interrupt_comes(what: str, told: bool) -> None:
    moments = 0
    while interrupted_at(moments + 1, what, told=told):
        moments += 1
    assert moments > 20
