"""Managers that nobody shuts down: the interpreter ends, the process forks, the last user lets go, the loop closes."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
import weakref
from typing import Any

import pytest

from tests.oracles.scripts import run_script
from tests.unit.test_task_invariants import check_closed_manager, check_manager
from wiseflow_nb.errors import TaskCancelledError
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.records import TaskState
from wiseflow_nb.tasks import Task, TaskManager
from wiseflow_nb.testing import Stage

SOON = 20.0
STARTS_THREADS = pytest.mark.skipif(
    (3, 12) <= sys.version_info < (3, 12, 3), reason="this Python starts no thread once it ends"
)
COUNTS = "atexit.register(lambda: print(ran, {k: n for k, n in tasks.counts().items() if n}, flush=True))"

# -- the interpreter's end ----------------------------------------------------------------------


@STARTS_THREADS
def test_what_is_left_at_the_end_of_a_script_is_done_first() -> None:
    script = f"""
import atexit
from wiseflow_nb.pool import _exit
from wiseflow_nb.tasks import TaskManager
_exit.EXIT_DEADLINE_SECONDS = 50.0
ran = 0
def work(*_):
    global ran
    ran += 1
async def coroutine(*_):
    work()
def again(left):
    work()
    if left:
        tasks.submit(again, left - 1)
tasks = TaskManager(max_concurrent=2)
{COUNTS}
for _ in range(500):
    tasks.submit(work)
last = tasks.submit(coroutine)
for _ in range(20):
    last = tasks.submit(coroutine, tasks.submit(work, last))
tasks.submit(again, 20)
"""
    assert run_script(script).stdout == "562 {'completed': 562}\n"


@STARTS_THREADS
def test_what_is_not_done_in_time_is_cancelled_with_the_reason_and_said_once() -> None:
    script = f"""
import asyncio, atexit, threading
from wiseflow_nb.pool import _exit
from wiseflow_nb.tasks import TaskManager
_exit.EXIT_DEADLINE_SECONDS, _exit.STOP_SECONDS = 4.0, 3.8
ran, begun = [], threading.Barrier(3)
def polite():
    begun.wait()
    try:
        from wiseflow_nb import current_task
        current_task().token.wait()
        current_task().check_cancelled()
    finally:
        ran.append("asked")
def stuck():
    begun.wait()
    threading.Event().wait()
async def clean():
    ran.append("cleaned up")
other = TaskManager(max_concurrent=1)
tasks = TaskManager(max_concurrent=2)
{COUNTS}
tasks.options(cleanup=clean).submit(polite)
never = tasks.submit(stuck)
for _ in range(3):
    tasks.submit(print, never)
waiting = other.submit(asyncio.sleep, 1000)
begun.wait()
pending = [tasks.submit(print), other.submit(asyncio.sleep, 1)]
def late():
    print(pending[0].record().reason)
    for manager in tasks, other:
        try:
            manager.submit(int)
        except RuntimeError as error:
            print(error)
atexit.register(late)
"""
    done = run_script(script, "(not begun, now cancelled: 5; running, asked to stop: 3); drain() or shutdown()")
    assert done.stdout.splitlines() == [
        "the interpreter ended",
        *["the interpreter is ending, no further task can run; submit it earlier"] * 2,
        "['asked', 'cleaned up'] {'cancelled': 5, 'abandoned': 1}",
    ]


@STARTS_THREADS
def test_a_callback_that_does_not_return_keeps_no_interpreter() -> None:
    script = """
import asyncio, atexit, threading
from wiseflow_nb.pool import _exit
from wiseflow_nb.tasks import TaskManager
_exit.EXIT_DEADLINE_SECONDS = 0.4
tasks = TaskManager(max_concurrent=1)
tasks.pause()
never = tasks.submit(int)
never.add_done_callback(lambda _: threading.Event().wait())
atexit.register(lambda: print(never.state, flush=True))
"""
    says = "(not begun, now cancelled: 1; running, asked to stop: 0)"
    assert run_script(script, says).stdout == "cancelled\n"


def test_coroutines_on_a_loop_that_runs_no_more_are_not_waited_for() -> None:
    script = """
import asyncio, atexit
from wiseflow_nb.pool import _exit
from wiseflow_nb.tasks import TaskManager
loop = asyncio.new_event_loop()
async def main():
    global tasks, left
    tasks = TaskManager(loop="kernel")
    left = [tasks.submit(asyncio.sleep, 1000), tasks.submit(int)]
    await asyncio.sleep(0.01)
loop.run_until_complete(main())
_exit.EXIT_DEADLINE_SECONDS = 1000.0
atexit.register(loop.close)
atexit.register(lambda: print(*(task.record().state for task in left), flush=True))
"""
    assert run_script(script, "cancelled for that: 1").stdout == "cancelled completed\n"


def test_on_a_clock_of_a_tests_own_nothing_is_waited_for_at_the_end() -> None:
    script = """
from wiseflow_nb.tasks import TaskManager
from wiseflow_nb.testing import Stage
tasks = TaskManager(**Stage().parts)
task = tasks.submit(int)
"""
    assert run_script(script).stdout == ""


# -- a forked child -----------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_in_a_forked_child_a_manager_can_be_looked_at_and_refuses_the_rest() -> None:
    script = """
import asyncio, os, sys, threading
from wiseflow_nb import context
from wiseflow_nb.tasks import TaskManager, _output, task as task_module
told = []
tasks = TaskManager(max_concurrent=1, on_change=lambda record, move: told.append(record))
entered, go = threading.Event(), threading.Event()
def held():
    entered.set()
    go.wait(60)
    return "parent"
running = tasks.options(timeout=60).submit(held)
entered.wait(60)
pending = tasks.submit(asyncio.sleep, 0, "parent too")
locks = [tasks._scheduler.lock, tasks._scheduler.timers._lock, task_module.ending, _output._lock, context._lock]
held_by, all_held, let_go = [], threading.Event(), threading.Event()
def hold():
    for lock in locks:
        lock.acquire()
    all_held.set()
    let_go.wait(60)
    for lock in locks[::-1]:
        lock.release()
holder = threading.Thread(target=hold)  # as threads of the parent's may hold them at any moment
holder.start()
all_held.wait(60)
child = os.fork()
if child == 0:
    count = len(told)
    assert tasks.counts()["running"] == tasks.counts()["pending"] == 1
    assert tasks.get(pending.id).name == "sleep"
    for refused in (lambda: tasks.submit(int), running.result, pending.exception):
        try:
            refused()
        except (RuntimeError, ValueError) as error:
            print("child:", error, flush=True)
    assert not running.cancel() and not pending.cancel()
    assert tasks.drain(0)
    tasks.set_max_concurrent(3)
    tasks.shutdown("now")
    assert len(told) == count
    with TaskManager() as mine:
        assert mine.submit(pow, 2, 5).result(60) == 32
        assert mine.submit(asyncio.sleep, 0, "new").result(60) == "new"
    sys.exit(0)
let_go.set()
_, status = os.waitpid(child, 0)
go.set()
print("parent:", os.waitstatus_to_exitcode(status), running.result(60), pending.result(60), flush=True)
tasks.shutdown()
"""
    stayed = "stayed with the process that this one was forked from"
    assert run_script(script).stdout.splitlines() == [
        f"child: the task manager {stayed}; make a new one here",
        f"child: <Task t1 'held' running> {stayed}; wait for it there",
        f"child: <Task t2 'sleep' pending> {stayed}; wait for it there",
        "parent: 0 parent parent too",
    ]


# -- dropped ------------------------------------------------------------------------------------


def collected(gone: threading.Event) -> bool:
    """Collect until it is gone: a thread may be about to leave the last step of its last task."""
    deadline = time.monotonic() + SOON
    while not gone.wait(0.01) and time.monotonic() < deadline:
        gc.collect()
    return gone.is_set()


def test_a_dropped_manager_ends_its_threads() -> None:
    before = set(threading.enumerate())
    tasks = TaskManager(max_concurrent=1)
    assert tasks.submit(abs, -1).result(SOON) == 1
    assert tasks.submit(asyncio.sleep, 0, 2).result(SOON) == 2
    assert tasks.options(timeout=1000).submit(int).result(SOON) == 0
    mine = [thread for thread in threading.enumerate() if thread not in before]
    assert len(mine) >= 3  # a worker, the loop's and the timer's
    gone = threading.Event()
    weakref.finalize(tasks._scheduler, gone.set)
    del tasks
    assert collected(gone)
    for thread in mine:
        thread.join(SOON)
        assert not thread.is_alive()


def test_a_dropped_manager_leaves_a_loop_alone_that_it_was_given() -> None:
    stage = Stage()
    dropped = TaskManager(**stage.parts)
    gone = threading.Event()
    weakref.finalize(dropped._scheduler, gone.set)
    del dropped
    assert collected(gone)
    with TaskManager(**stage.parts) as tasks:
        task = tasks.submit(asyncio.sleep, 0, 1)
        stage.run()
        assert task.result(0) == 1


def test_what_a_dropped_manager_was_given_is_done_all_the_same() -> None:
    gate = threading.Event()

    def submit() -> Task[Any]:
        tasks = TaskManager(max_concurrent=1)
        first = tasks.submit(gate.wait, SOON)
        return tasks.submit(asyncio.sleep, 0, tasks.options(dependencies=[first]).submit(str, "done"))

    last = submit()
    gc.collect()
    gate.set()
    assert last.result(SOON) == "done"


def test_a_pool_that_is_used_by_others_keeps_no_manager() -> None:
    with ThreadPoolManager(1, 2) as pool:
        kept, dropped = TaskManager(pool), TaskManager(pool)
        assert dropped.submit(abs, -1).result(SOON) == 1
        gone = threading.Event()
        weakref.finalize(dropped._scheduler, gone.set)
        del dropped
        assert collected(gone)
        assert len(pool._listeners) == 1
        pool.resize(1)
        assert kept._scheduler.slots.room == 1
        kept.shutdown()
        assert pool._listeners == []


# -- a loop that is somebody else's, and closes ---------------------------------------------------


def test_a_loop_that_ends_cancels_its_coroutines_with_the_reason() -> None:
    cleaned: list[str] = []

    async def main() -> tuple[TaskManager, list[Task[Any]]]:
        tasks = TaskManager(loop="kernel", max_concurrent=2)
        gate = tasks.submit(go.wait, SOON)
        some = [tasks.options(cleanup=lambda: cleaned.append("cleaned")).submit(asyncio.sleep, 1000) for _ in range(4)]
        some += [tasks.submit(asyncio.sleep, 0, gate)]
        while len(tasks._scheduler.running()) < 2:
            await asyncio.sleep(0)
        return tasks, some

    go = threading.Event()
    tasks, some = asyncio.run(main())
    for task in some:
        assert isinstance(task.exception(SOON) if not task.cancelled() else TaskCancelledError(), TaskCancelledError)
        assert task.state is TaskState.CANCELLED
    assert [task.record().reason for task in some[1:]] == ["the loop that it was to run on has ended"] * 4
    late = tasks.submit(asyncio.sleep, 0)
    with pytest.raises(TaskCancelledError, match="the loop that it was to run on has ended"):
        late.result(SOON)
    go.set()
    assert tasks.submit(abs, -1).result(SOON) == 1
    assert cleaned == ["cleaned"]
    tasks.shutdown()
    check_closed_manager(tasks)


def test_a_loop_that_is_closed_without_a_word_is_noticed() -> None:
    closed: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            closed.append("closed")

    async def clean() -> None:
        closed.append("cleaned")

    async def main() -> None:
        tasks.append(TaskManager(loop="kernel", max_concurrent=2))
        for _ in range(3):
            left.append(tasks[0].options(cleanup=clean).submit(endless))
        await asyncio.sleep(0.01)

    tasks: list[TaskManager] = []
    left: list[Task[Any]] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    assert [str(task.state) for task in left] == ["running", "running", "pending"]
    assert tasks[0].drain(SOON)
    for task in left:
        with pytest.raises(TaskCancelledError, match="has ended"):
            task.result(SOON)
    assert sorted(closed) == ["cleaned", "cleaned", "closed", "closed"]
    check_manager(tasks[0])
    tasks[0].shutdown()
    check_closed_manager(tasks[0])


def test_a_manager_that_was_shut_down_hears_nothing_of_its_loop() -> None:
    async def main() -> TaskManager:
        async with TaskManager(loop="kernel") as tasks:
            assert await tasks.submit(asyncio.sleep, 0, 1) == 1
        assert not tasks._scheduler.loop.over
        return tasks

    tasks = asyncio.run(main())
    assert not tasks._scheduler.loop._over  # type: ignore[attr-defined]
    check_closed_manager(tasks)


def test_a_loop_of_the_managers_own_is_never_over() -> None:
    stage = Stage()
    for tasks in (TaskManager(), TaskManager(**stage.parts)):
        assert not tasks._scheduler.loop.over
        tasks.shutdown()
        assert not tasks._scheduler.loop.over
