"""The end of the interpreter, in interpreters of their own."""

from __future__ import annotations

import pytest

from tests.oracles.scripts import run_script
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.pool._exit import EXIT_DEADLINE_SECONDS


@pytest.mark.parametrize("how", ["pool", "tasks"])
def test_a_stuck_worker_does_not_keep_the_interpreter(how: str) -> None:
    script = f"""
import atexit, threading, time
from wiseflow_nb.pool import ThreadPoolManager
from wiseflow_nb.tasks import TaskManager
entered = threading.Event()
def stuck():
    entered.set()
    threading.Event().wait()
work = ThreadPoolManager(1, 2) if {how!r} == "pool" else TaskManager()
future = work.submit(stuck)
entered.wait()
atexit.register(lambda: print("hook", time.monotonic() - began, flush=True))
print("end of script", flush=True)
began = time.monotonic()
"""
    # Without a deadline this would never end at all.
    says = "" if how == "pool" else "(not begun, now cancelled: 0; running, asked to stop: 1)"
    lines = run_script(script, says).stdout.split("\n")
    assert lines[0] == "end of script"
    assert lines[1].startswith("hook ")
    assert EXIT_DEADLINE_SECONDS < 2.0


def test_a_deadline_is_kept_by_all_pools_together() -> None:
    script = """
import threading, time
from wiseflow_nb.pool import _exit, ThreadPoolManager
pools = [ThreadPoolManager(2, 2) for _ in range(5)]
entered = [threading.Event() for _ in range(10)]
def stuck(event):
    event.set()
    threading.Event().wait()
for number, event in enumerate(entered):
    pools[number // 2].submit(stuck, event)
for event in entered:
    event.wait()
later = pools[0].submit(print, "never")
told = []
for pool in pools:
    inner = pool._crew.join
    pool._crew.join = lambda deadline, inner=inner: (told.append(deadline), inner(deadline))
_exit.EXIT_DEADLINE_SECONDS = 0.2
began = time.monotonic()
_exit._end_all()
assert len(told) == 5 and len(set(told)) == 1 and 0.1 < told[0] - began < 20
try:
    pools[0].submit(int)
except RuntimeError:
    print("closed", flush=True)
"""
    assert run_script(script, "calls of pools had begun (now cancelled: 1)").stdout == "closed\n"


def test_queued_work_still_runs_when_the_script_ends() -> None:
    script = (
        "from wiseflow_nb.pool import ThreadPoolManager\n"
        "pool = ThreadPoolManager(1, 1)\n"
        "for i in range(3): pool.submit(print, i, flush=True)\n"
    )
    assert run_script(script).stdout.split() == ["0", "1", "2"]


def test_work_may_submit_while_the_interpreter_ends() -> None:
    script = """
import atexit, time
from wiseflow_nb.pool import ThreadPoolManager
pool = ThreadPoolManager(1, 1)
def late():
    try:
        pool.submit(int)
    except RuntimeError as error:
        print("refused", flush=True)
def nested():
    while not pool._crew._closed:
        time.sleep(0.001)
    late()
pool.submit(nested)
atexit.register(late)
"""
    assert run_script(script).stdout.split() == ["refused", "refused"]


def test_a_pool_first_used_at_the_end_does_not_hang() -> None:
    script = """
import atexit
from wiseflow_nb.pool import ThreadPoolManager
def late():
    pool = ThreadPoolManager(1, 1)
    try:
        print(pool.submit(pow, 2, 3).result(60), flush=True)
    except RuntimeError:  # no thread may be started any more
        print(8, flush=True)
    pool.shutdown()
atexit.register(late)
"""
    assert run_script(script).stdout.split() == ["8"]


def test_a_thread_that_cannot_be_started_is_said_at_submit(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = ThreadPoolManager(1, 4)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start"):
            pool.submit(int)
    assert pool.stats().submitted == pool.stats().queued == 0
    gate = threading.Event()
    first = pool.submit(gate.wait, 20)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        second = pool.submit(int)
        assert pool.resize(1) == 1
        assert pool.resize(4) == 4
    assert pool.status().workers == 1
    gate.set()
    assert first.result(20) is True
    assert second.result(20) == 0
    pool.shutdown()
    assert pool.status().workers == 0
