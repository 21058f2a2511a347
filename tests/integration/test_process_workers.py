"""Worker processes for real: they are killed, orphaned, interrupted, and only the culprit is lost."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from wiseflow_nb.context import TaskContext, check_cancelled, current_task
from wiseflow_nb.errors import TaskCancelledError, TaskError, UsageError, WorkerLostError
from wiseflow_nb.pool import ThreadPoolManager, _process_stop
from wiseflow_nb.pool._process import ProcessWorkers
from wiseflow_nb.session import Session
from wiseflow_nb.tasks import TaskManager

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")
WAIT = 60.0
ROOT = Path(__file__).resolve().parents[2]


def wait_until(condition: Callable[[], object], timeout: float = WAIT) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def said(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


# -- what runs in the workers ---------------------------------------------------------------


def tell(path: Path, text: object) -> None:
    with path.open("a") as file:
        file.write(f"{text}\n")


def pid_of() -> int:
    return os.getpid()


def busy(path: Path) -> None:
    tell(path, os.getpid())
    while True:
        pass


def busy_with_finally(path: Path) -> None:
    try:
        current_task().push_cleanup(tell, path, "pushed")
        busy(path)
    finally:
        tell(path, "finally")


def stubborn(path: Path) -> None:
    """Neither looks at its token nor lets itself be interrupted; leaves children in and out of its group."""
    near = subprocess.Popen(["sleep", "600"])
    far = subprocess.Popen(["sleep", "600"], start_new_session=True)
    tell(path, f"{near.pid} {far.pid} {os.getpid()}")
    while True:
        try:
            while True:
                time.sleep(0.05)
        except BaseException:
            tell(path, "caught")


def cooperative(path: Path) -> None:
    context = current_task()
    context.push_cleanup(tell, path, "first-pushed")
    context.push_cleanup(tell, path, "last-pushed")
    tell(path, os.getpid())
    context.token.wait(WAIT)
    check_cancelled()


def die(how: str) -> None:
    if how == "exit":
        os._exit(7)
    os.kill(os.getpid(), signal.Signals[how])
    time.sleep(WAIT)


def close_its_pipes() -> None:
    os.closerange(3, 256)
    time.sleep(WAIT)


def die_first(path: Path) -> int:
    tell(path, current_task().attempt)
    if current_task().attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return current_task().attempt


def die_always(path: Path) -> None:
    tell(path, current_task().attempt)
    os.kill(os.getpid(), signal.SIGKILL)


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def burn_in_child(seconds: float) -> None:
    code = f"import time\nwhile time.process_time() < {seconds}: pass"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)


def hold(size: int) -> int:
    return len(bytearray(size).replace(b"\0", b"\1"))


def speak() -> None:
    print("x" * 20_000)
    print("from python")
    os.write(2, b"from descriptor two\n")
    subprocess.run(["echo", "from a child"], check=True)


class AwkwardError(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def raise_awkward() -> None:
    raise AwkwardError("this", "that")


def return_lock() -> Any:
    return {"held": [threading.Lock()]}


def nested(method: str) -> list[int]:
    with multiprocessing.get_context(method).Pool(2) as pool:
        return pool.map(abs, [-1, -2])


async def twice(x: int) -> int:
    return 2 * x


def fork_and_leave(path: Path) -> int:
    pid = os.fork()
    if not pid:
        time.sleep(WAIT)
        os._exit(0)
    tell(path, pid)
    return pid


def fork_and_terminate() -> int:
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(told, b"x")
        while True:
            try:
                time.sleep(WAIT)
            except BaseException:
                tell(Path(os.devnull), "a child of the task's is no task: nothing is raised in it")
    os.read(ready, 1)
    os.kill(pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_with_a_fork(path: Path) -> None:
    fork_and_leave(path)
    os.kill(os.getpid(), signal.SIGKILL)


# -- losing workers -------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[ThreadPoolManager]:
    with ThreadPoolManager(max_workers=4) as made:
        yield made
        pids = made.processes.pids()
    assert made.processes.pids() == []
    wait_until(lambda: all(gone(pid) for pid in pids))


def test_a_killed_worker_fails_its_task_alone(tmp_path: Path) -> None:
    with TaskManager(max_concurrent=4) as tasks:
        view = tasks.options(kind="process")
        victim = view.submit(busy, tmp_path / "victim")
        others = [view.submit(burn, 0.2) for _ in range(5)]
        wait_until(lambda: said(tmp_path / "victim"))
        os.kill(int(said(tmp_path / "victim")[0]), signal.SIGKILL)
        with pytest.raises(WorkerLostError, match="SIGKILL"):
            victim.result(WAIT)
        assert [task.result(WAIT) for task in others] == [None] * 5
        assert victim.record().error.startswith("WorkerLostError")
        assert victim.record().cpu_source == "unknown"
        assert view.submit(abs, -1).result(WAIT) == 1


@pytest.mark.parametrize(("how", "told"), [("exit", "exit code 7"), ("SIGSEGV", "SIGSEGV"), ("SIGKILL", "memory")])
def test_how_a_worker_died_is_told(pool: ThreadPoolManager, how: str, told: str) -> None:
    future = pool.options(kind="process").submit(die, how)
    with pytest.raises(WorkerLostError, match=told) as caught:
        future.result(WAIT)
    if how == "SIGSEGV":
        assert "in die" in "".join(caught.value.__notes__)
    row = pool.records().iloc[-1]
    assert (row.state, row.cpu_source, row.memory_source) == ("failed", "unknown", "unknown")


def test_a_worker_that_closed_its_own_pipes_is_not_said_to_have_been_killed_by_others(pool: ThreadPoolManager) -> None:
    with pytest.raises(WorkerLostError, match="it closed its pipes while it still ran") as caught:
        pool.options(kind="process").submit(close_its_pipes).result(WAIT)
    assert "SIGKILL" not in str(caught.value)


def test_a_lost_worker_is_seen_though_its_child_lives_on(pool: ThreadPoolManager, tmp_path: Path) -> None:
    future = pool.options(kind="process").submit(die_with_a_fork, tmp_path / "pid")
    with pytest.raises(WorkerLostError):
        future.result(WAIT)
    wait_until(lambda: gone(int(said(tmp_path / "pid")[0])))


def test_an_idempotent_task_runs_once_more_and_not_twice(tmp_path: Path) -> None:
    moves: list[str] = []
    cleaned: list[int] = []
    with TaskManager(
        on_change=lambda record, move: move and moves.append(f"{move.from_state}>{move.to_state}")
    ) as tasks:
        view = tasks.options(kind="process", idempotent=True, cleanup=lambda context: cleaned.append(context.attempt))
        assert view.submit(die_first, tmp_path / "first").result(WAIT) == 2
        assert "running>pending" in moves
        assert cleaned == [1]
        always = view.submit(die_always, tmp_path / "always")
        with pytest.raises(WorkerLostError):
            always.result(WAIT)
        assert said(tmp_path / "always") == ["1", "2"]
        assert cleaned == [1, 1, 2]
        plain = tasks.options(kind="process").submit(die_always, tmp_path / "plain")
        with pytest.raises(WorkerLostError):
            plain.result(WAIT)
        assert said(tmp_path / "plain") == ["1"]


def test_a_worker_that_died_while_idle_costs_nothing(pool: ThreadPoolManager) -> None:
    view = pool.options(kind="process")
    for _ in range(3):
        pid = view.submit(pid_of).result(WAIT)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: gone(pid))
        assert view.submit(pid_of).result(WAIT) != pid


def test_a_worker_that_cannot_be_started_is_said(pool: ThreadPoolManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(WorkerLostError, match="no worker process could be started"):
        pool.options(kind="process").submit(pid_of).result(WAIT)


# -- stopping -------------------------------------------------------------------------------


def test_a_busy_loop_is_cancelled_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cleaned: list[tuple[int, bool]] = []
    with TaskManager() as tasks:
        task = tasks.options(
            kind="process", cleanup=lambda context: cleaned.append((context.attempt, context.forced))
        ).submit(busy_with_finally, tmp_path / "said")
        wait_until(lambda: said(tmp_path / "said"))
        pid = int(said(tmp_path / "said")[0])
        begun = time.monotonic()
        task.cancel("enough")
        with pytest.raises(TaskCancelledError, match="enough"):
            task.result(WAIT)
        took = time.monotonic() - begun
    assert gone(pid)
    assert [attempt for attempt, _ in cleaned] == [1]
    if not cleaned[0][1]:
        assert said(tmp_path / "said")[1:] == ["finally", "pushed"]
    with capsys.disabled():
        print(f"\na busy loop in a process: dead and cleaned up {took:.3f} s after its cancel")
    assert took < 10.0


def test_code_that_resists_is_killed_with_all_that_it_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned: list[bool] = []
    with TaskManager() as tasks:
        task = tasks.options(kind="process", cleanup=lambda context: cleaned.append(context.forced)).submit(
            stubborn, tmp_path / "said"
        )
        wait_until(lambda: len(said(tmp_path / "said")) == 3)
        begun = time.monotonic()
        task.cancel()
        with pytest.raises(TaskCancelledError):
            task.result(WAIT)
        took = time.monotonic() - begun
    assert cleaned == [True]
    pids = [int(item) for item in said(tmp_path / "said") if item.isdigit()]
    assert len(pids) == 3
    wait_until(lambda: all(gone(pid) for pid in pids))
    with capsys.disabled():
        print(f"\ncode that resists: killed and cleaned up {took:.3f} s after its cancel")


def test_cooperative_code_cleans_up_inside_and_its_worker_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a loaded machine the code may be late to see its token: here it is given the time.
    monkeypatch.setattr(_process_stop, "TOKEN_SECONDS", WAIT)
    monkeypatch.setattr(_process_stop, "KILL_SECONDS", WAIT)
    with TaskManager() as tasks:
        view = tasks.options(kind="process")
        task = view.submit(cooperative, tmp_path / "said")
        wait_until(lambda: said(tmp_path / "said"))
        task.cancel("enough")
        with pytest.raises(TaskCancelledError):
            task.result(WAIT)
        pid, *pushed = said(tmp_path / "said")
        assert pushed == ["last-pushed", "first-pushed"]
        assert view.submit(pid_of).result(WAIT) == int(pid)


def test_a_failing_cleanup_inside_is_recorded(tmp_path: Path) -> None:
    def work() -> None:
        current_task().push_cleanup(die_not)
        raise KeyError("mine")

    def die_not() -> None:
        raise RuntimeError("cleanup broke")

    with TaskManager() as tasks:
        task = tasks.options(kind="process").submit(work)
        with pytest.raises(KeyError):
            task.result(WAIT)
        assert "cleanup broke" in task.record().reason
        assert tasks.cleanup_failures == 1


def test_pool_work_in_a_process_is_cancelled(pool: ThreadPoolManager, tmp_path: Path) -> None:
    cleaned: list[str] = []

    def clean(context: TaskContext) -> None:
        cleaned.append(context.name)

    future = pool.options(kind="process", name="loop", cleanup=clean).submit(busy, tmp_path / "said")
    wait_until(lambda: said(tmp_path / "said"))
    assert pool.cancel_running(future, "enough")
    with pytest.raises(TaskCancelledError, match="enough"):
        future.result(WAIT)
    assert cleaned == ["loop"]
    assert gone(int(said(tmp_path / "said")[0]))
    wait_until(lambda: len(pool.records()) == 1)
    assert pool.records().state.tolist() == ["cancelled"]


# -- figures and output ---------------------------------------------------------------------


def test_cpu_time_and_peak_memory_are_each_task_s_own(pool: ThreadPoolManager) -> None:
    view = pool.options(kind="process")
    for call in [(hold, 200_000_000), (burn, 0.3), (burn_in_child, 0.3), (time.sleep, 0.3)]:
        view.submit(*call).result(WAIT)
    assert len(pool.processes.pids()) == 1
    held, burnt, by_child, slept = (row for row in pool.records().itertuples())
    assert {row.cpu_source for row in (held, burnt, by_child, slept)} == {"process"}
    assert 400e6 <= held.memory_peak_bytes < 600e6
    assert burnt.memory_peak_bytes < 100e6
    assert 0.3 <= burnt.cpu_seconds < 0.4
    assert 0.3 <= by_child.cpu_seconds < 0.6
    assert slept.cpu_seconds < 0.1


def test_the_tail_of_the_output_is_kept_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with TaskManager() as tasks:
        task = tasks.options(kind="process").submit(speak)
        task.result(WAIT)
        silent = tasks.options(kind="process").submit(abs, 1)
        silent.result(WAIT)
    tail = task.record().output_tail
    assert len(tail) == 8192
    assert tail.endswith("xxx\nfrom python\nfrom descriptor two\nfrom a child\n")
    assert silent.record().output_tail == ""
    assert capfd.readouterr() == ("", "")


# -- what goes in and comes out -------------------------------------------------------------


def test_what_cannot_be_sent_is_named_and_the_worker_goes_on(pool: ThreadPoolManager) -> None:
    view = pool.options(kind="process", name="job")
    pid = view.submit(pid_of).result(WAIT)
    with pytest.raises(UsageError, match=r"argument 2\['key'\] \(lock\) of 'job' cannot be sent"):
        view.submit(print, 1, {"key": threading.Lock()}).result(WAIT)
    with pytest.raises(UsageError, match=r"the result of 'job'\['held'\]\[0\] \(lock\) cannot be sent back"):
        view.submit(return_lock).result(WAIT)
    with pytest.raises(TaskError, match=r"AwkwardError.*this and that"):
        view.submit(raise_awkward).result(WAIT)
    assert view.submit(pid_of).result(WAIT) == pid


def test_closures_large_data_and_coroutines(pool: ThreadPoolManager) -> None:
    view = pool.options(kind="process")
    factor = 3
    assert list(view.map(lambda x: x * factor, range(5))) == [0, 3, 6, 9, 12]
    data = os.urandom(1 << 20) * 40
    assert view.submit(functools.partial(bytes.replace, data), b"", b"").result(WAIT) == data
    assert view.submit(twice, 4).result(WAIT) == 8


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_task_may_start_processes_of_its_own(pool: ThreadPoolManager, method: str) -> None:
    assert pool.options(kind="process").submit(nested, method).result(WAIT) == [1, 2]


def test_a_process_that_a_task_forks_ends_as_any_other(pool: ThreadPoolManager) -> None:
    assert pool.options(kind="process").submit(fork_and_terminate).result(WAIT) == -signal.SIGTERM


def test_workers_are_reused_and_end_when_idle() -> None:
    workers = ProcessWorkers(idle_seconds=0.2)
    call = workers.call(pid_of)
    pid = call()
    assert call() == pid
    wait_until(lambda: workers.pids() == [])
    wait_until(lambda: gone(pid))
    assert call() != pid
    workers.kill()
    assert workers.pids() == []


def test_a_pool_that_is_released_has_no_idle_process_either(tmp_path: Path) -> None:
    with ThreadPoolManager(max_workers=3) as pool:
        view = pool.options(kind="process")
        future = view.submit(busy, tmp_path / "said")
        idle = view.submit(pid_of).result(WAIT)
        wait_until(lambda: said(tmp_path / "said"))
        wait_until(lambda: pool.pending == 1)
        pool.release()
        try:
            # What works goes on.
            assert gone(idle)
            assert pool.processes.pids() == [int(said(tmp_path / "said")[0])]
            assert not future.done()
            assert view.submit(pid_of).result(WAIT) != idle
        finally:
            pool.processes.kill()


def test_a_session_that_closes_ends_its_workers(tmp_path: Path) -> None:
    with Session(title="workers") as session:
        future = session.pool.options(kind="process").submit(busy, tmp_path / "said")
        idle = session.tasks.options(kind="process").submit(pid_of)
        idle.result(WAIT)
        wait_until(lambda: said(tmp_path / "said"))
        pid = int(said(tmp_path / "said")[0])
        assert pid in [child.pid for child in psutil.Process().children()]
    with pytest.raises(WorkerLostError):
        future.result(WAIT)
    assert gone(pid)


# -- the end of the kernel, and interrupts --------------------------------------------------


def script(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "script.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(text))
    return [sys.executable, str(path), str(tmp_path / "said")]


_KERNEL = """
    import os, signal, sys, time
    from wiseflow_nb import ThreadPoolManager

    def tell(path):
        with open(path, "a") as file:
            file.write(f"{os.getpid()}\\n")

    def python_loop(path):
        tell(path)
        while True:
            pass

    def c_call(path):
        tell(path)
        sum(range(10**15))

    def with_child(path):
        import subprocess
        with open(path, "a") as file:
            file.write(f"{subprocess.Popen(['sleep', '600']).pid}\\n")
        tell(path)
        time.sleep(600)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pool = ThreadPoolManager(min_workers=4, max_workers=4)
    view = pool.options(kind="process")
    view.submit(tell, sys.argv[1]).result()
    calls = [view.submit(fn, sys.argv[1]) for fn in (python_loop, c_call, with_child)]
    while len(open(sys.argv[1]).read().split()) < 5:
        time.sleep(0.01)
    if HELD and not os.fork():
        time.sleep(600)
    print("up", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("held", [False, True], ids=["alone", "with a forked child that lives on"])
def test_no_worker_outlives_a_killed_kernel(tmp_path: Path, held: bool, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = subprocess.Popen(
        script(tmp_path, _KERNEL.replace("HELD", str(held))), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert kernel.stdout.readline() == "up\n"
        pids = {int(item) for item in said(tmp_path / "said")}
        assert len(pids) >= 4
        kernel.kill()
        kernel.wait()
        begun = time.monotonic()
        wait_until(lambda: all(gone(pid) for pid in pids), timeout=5.0)
        with capsys.disabled():
            print(f"\nall {len(pids)} processes gone {time.monotonic() - begun:.3f} s after kill -9 of their kernel")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(kernel.pid, signal.SIGKILL)
        kernel.stdout.close()


def test_an_interrupt_of_the_group_harms_no_worker(tmp_path: Path) -> None:
    text = """
        import os, signal, sys, time
        from wiseflow_nb import ThreadPoolManager

        def work(path):
            with open(path, "a") as file:
                file.write(f"{os.getpid()}\\n")
            end = time.monotonic() + 1.0
            while time.monotonic() < end:
                pass
            return os.getpid()

        signal.signal(signal.SIGINT, lambda *_: print("interrupted", flush=True))
        with ThreadPoolManager() as pool:
            view = pool.options(kind="process")
            future = view.submit(work, sys.argv[1])
            while not os.path.exists(sys.argv[1]):
                time.sleep(0.01)
            os.killpg(0, signal.SIGINT)
            pid = future.result()
            os.kill(pid, signal.SIGINT)
            assert view.submit(os.getpid).result() == pid
            print("unharmed", flush=True)
    """
    done = subprocess.run(
        script(tmp_path, text), capture_output=True, text=True, timeout=WAIT, start_new_session=True, check=False
    )
    assert (done.stdout.split(), done.stderr) == (["interrupted", "unharmed"], "")


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_script_without_a_guard_runs_once(tmp_path: Path, method: str) -> None:
    text = """
        print("main ran")
        import multiprocessing
        multiprocessing.set_start_method("METHOD")
        from dataclasses import dataclass
        from wiseflow_nb import ThreadPoolManager, TaskManager, current_task

        @dataclass
        class Point:
            x: int

        FACTOR = 2

        class MyError(Exception):
            pass

        def scaled(point):
            if point.x < 0:
                raise MyError(point.x)
            return Point(helper(point.x))

        def helper(x):
            return x * FACTOR

        with ThreadPoolManager() as pool, TaskManager() as tasks:
            back = pool.options(kind="process").submit(scaled, Point(4)).result()
            assert isinstance(back, Point) and back == Point(8), back
            assert tasks.options(kind="process").submit(scaled, Point(1)).result() == Point(2)
            try:
                pool.options(kind="process").submit(scaled, Point(-1)).result()
            except MyError as error:
                print("error", error)
    """.replace("METHOD", method)
    done = subprocess.run(script(tmp_path, text), capture_output=True, text=True, timeout=WAIT, check=False)
    assert (done.stdout.splitlines(), done.stderr) == (["main ran", "error -1"], "")


def test_a_busy_worker_does_not_hold_the_interpreter_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = """
        import atexit, os, sys, time
        from wiseflow_nb import ThreadPoolManager

        def busy(path):
            with open(path, "a") as file:
                file.write(f"{os.getpid()}\\n")
            while True:
                pass

        atexit.register(print, "hooks ran")
        pool = ThreadPoolManager()
        pool.options(kind="process").submit(busy, sys.argv[1])
        while not os.path.exists(sys.argv[1]):
            time.sleep(0.01)
        print(time.monotonic())
    """
    done = subprocess.run(script(tmp_path, text), capture_output=True, text=True, timeout=WAIT, check=False)
    ended = time.monotonic()
    began, *rest = done.stdout.splitlines()
    assert (rest, done.stderr, done.returncode) == (["hooks ran"], "", 0)
    wait_until(lambda: gone(int(said(tmp_path / "said")[0])))
    with capsys.disabled():
        print(f"\nan interpreter with a busy worker ended in {ended - float(began):.2f} s")
