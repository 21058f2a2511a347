"""Nets under every test: its own state directory, no hang, nothing left behind, no unlisted skip."""

from __future__ import annotations

import faulthandler
import fnmatch
import gc
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest

# How long an example takes tells of the machine, not of the code.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

HANG_SECONDS = float(os.environ.get("WISEFLOW_TEST_TIMEOUT", "180"))
_ALLOWED = Path(__file__).with_name("allowed_skips.txt")
#: What fixtures, children and sessions without a state directory write to.
_OWN = os.path.join(tempfile.gettempdir(), f"wiseflow-{os.getpid()}")
#: Helpers of the standard library's that live as long as the interpreter.
#: ... and the one browser that the browser tests share.
_LASTING = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "chromium", "playwright")


class SkipGuard:
    """Fails a CI run in which a test was skipped for a reason that is not listed."""

    def __init__(self, patterns: list[str]) -> None:
        self._patterns = patterns
        self.unlisted: list[str] = []

    def look(self, nodeid: str, report: Any) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        longrepr = report.longrepr
        reason = str(longrepr[2] if isinstance(longrepr, tuple) else longrepr).removeprefix("Skipped: ")
        if not any(fnmatch.fnmatch(reason, pattern) for pattern in self._patterns):
            self.unlisted.append(f"{nodeid}: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.look(report.nodeid, report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.look(report.nodeid, report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unlisted and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.unlisted:
            terminalreporter.section("skips that tests/allowed_skips.txt does not list")
            for line in self.unlisted:
                terminalreporter.line(line)


def allowed_patterns(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def pytest_configure(config: pytest.Config) -> None:
    os.makedirs(_OWN, mode=0o700, exist_ok=True)
    # Fixtures of a wider scope than one test run before its own state directory is set.
    os.environ.setdefault("WISEFLOW_STATE_DIR", os.path.join(_OWN, "state"))
    # Where sessions go that have no better place: else the tests would see what others have left there.
    os.environ["TMPDIR"] = _OWN
    os.environ.pop("XDG_RUNTIME_DIR", None)
    # Else a test in the developer's directory would read the developer's settings.
    for name in [key for key in os.environ if key.startswith("WISEFLOW_") and key.endswith("_THRESHOLD")]:
        del os.environ[name]
    if os.environ.get("CI", "").lower() in {"1", "true"}:
        config.pluginmanager.register(SkipGuard(allowed_patterns(_ALLOWED.read_text(encoding="utf-8"))), "skip-guard")


def pytest_unconfigure() -> None:
    import shutil

    shutil.rmtree(_OWN, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The browser's driver keeps a loop running on the main thread, where asyncio.run then refuses.
    items.sort(key=lambda item: "browser" in item.path.parent.name or item.get_closest_marker("browser") is not None)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    try:
        # Capture replaces descriptor 2; pytest keeps a copy of the real one.
        from _pytest.faulthandler import fault_handler_stderr_fd_key

        target: Any = item.config.stash[fault_handler_stderr_fd_key]
    except (ImportError, KeyError):
        target = sys.__stderr__
    limit = HANG_SECONDS * (2 if item.get_closest_marker("browser") else 1)
    faulthandler.dump_traceback_later(limit, exit=True, file=target)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's own state directory, also for the children it starts."""
    path = tmp_path / "state"
    monkeypatch.setenv("WISEFLOW_STATE_DIR", str(path))
    return path


@pytest.fixture(autouse=True, scope="module")
def no_foreign_garbage(request: pytest.FixtureRequest) -> Iterator[None]:
    """Collect what clients of Jupyter and of the browser leave to the garbage (loops, their sockets).

    Else it is found, and blamed, in the middle of a later test.
    """
    yield
    if request.path.parent.name in {"browser", "integration"}:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a child process or a thread that would keep the interpreter alive."""
    children, threads = _children(), set(threading.enumerate())
    yield
    deadline = time.monotonic() + 10.0
    while True:
        left = [child for child in _children() - children if _lives(child)]
        stuck = [thread for thread in threading.enumerate() if not thread.daemon and thread not in threads]
        if not left and not stuck:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    told = [f"child {child.pid}: {_command(child)}" for child in left] + [f"thread {item.name}" for item in stuck]
    for child in left:
        child.kill()
    pytest.fail("left behind: " + "; ".join(told))


def _children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _lives(child: psutil.Process) -> bool:
    try:
        command = " ".join(child.cmdline())
        return child.status() != psutil.STATUS_ZOMBIE and not any(name in command for name in _LASTING)
    except psutil.NoSuchProcess:
        return False


def _command(child: psutil.Process) -> str:
    try:
        return " ".join(child.cmdline())[:200]
    except psutil.NoSuchProcess:
        return "(ended)"
