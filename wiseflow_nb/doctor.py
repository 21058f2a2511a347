"""What can be checked on this machine before anything goes wrong: each check a line with its remedy.

The checks change nothing that lasts; the recorder is tried in a directory that is removed again.
"""

from __future__ import annotations

import os
import platform
import sqlite3
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from wiseflow_nb.config import Settings
from wiseflow_nb.errors import WiseflowError
from wiseflow_nb.quantities import duration, size

OK, WARN, FAIL = "ok", "warn", "fail"
#: The first with what the statements need (upserts).
OLDEST_SQLITE = (3, 24, 0)
_NEEDED = (
    "psutil",
    "pandas",
    "numpy",
    "plotly",
    "ipywidgets",
    "anywidget",
    "voila",
    "ipykernel",
    "platformdirs",
    "pydantic",
)
_EXTRAS = {"pyarrow": "parquet", "prometheus-client": "prometheus", "distributed": "dask"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: ``ok``, ``warn`` or ``fail``, what was found, and what to do."""

    state: str
    what: str
    found: str
    remedy: str = ""


def check_all(settings: Settings) -> Iterator[Check]:
    """Look at everything; a check that fails in itself is a line like any other."""
    checks: tuple[Callable[[Settings], Iterator[Check]], ...] = (
        _python,
        _limits,
        _reading,
        _directory,
        _recorder,
        _sqlite,
        _kernel,
        _packages,
    )
    for check in checks:
        name = check.__name__.strip("_")
        try:
            yield from check(settings)
        except (WiseflowError, OSError, ValueError, sqlite3.Error) as error:
            yield Check(FAIL, name, f"cannot be checked: {error}", "see the message")


def _python(settings: Settings) -> Iterator[Check]:
    import wiseflow_nb

    where = f"Python {platform.python_version()}, {platform.platform(terse=True)}"
    yield Check(OK, "wiseflow_nb", f"{wiseflow_nb.__version__} on {where}")
    if not sys.platform.startswith("linux"):
        yield Check(
            WARN, "system", f"{sys.platform}: no control groups, read through psutil", "for containers use Linux"
        )


def _limits(settings: Settings) -> Iterator[Check]:
    from wiseflow_nb.resources import ResourceMonitor

    limits = ResourceMonitor(settings).limits
    yield Check(OK, "memory", f"{size(limits.memory_limit_bytes)} ({limits.memory_source})")
    yield Check(OK, "cpu", f"{limits.cpu_limit_cores:g} cores ({limits.cpu_source})")
    for name, source in (("memory", limits.memory_source), ("cpu", limits.cpu_source)):
        if source.startswith("environment:"):
            yield Check(
                WARN,
                name,
                f"the limit is what {source} says, not what is enforced",
                "let the container set a real limit",
            )
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        mounts = ""
    found = [number for number, kind in (("1", "cgroup"), ("2", "cgroup2")) if f" - {kind} " in mounts]
    yield Check(OK, "cgroup", f"version {' and '.join(found)}" if found else "none")


def _reading(settings: Settings) -> Iterator[Check]:
    from wiseflow_nb.resources._probe import Probe

    probe = Probe(os.getpid(), settings.disk_path)
    try:
        began = time.perf_counter()
        now = time.monotonic()
        sample = probe.read(time_seconds=time.time(), monotonic_seconds=now, interval_seconds=float("nan"), gap=False)
        took = time.perf_counter() - began
        path = str(getattr(probe, "path", "") or ("psutil" if probe.portable else "/proc and /sys"))
        yield Check(OK, "reading", f"{path}, one sample in {duration(took)}")
        for event in probe.take_events():
            yield Check(WARN, "reading", event.message, "its columns are not available; the others are")
        kills = sample.container_memory_oom_kills_total
        if kills != kills and sys.platform.startswith("linux"):
            yield Check(WARN, "reading", "no OOM kills are counted here", "a report after a crash will be less sure")
    finally:
        probe.close()


def _directory(settings: Settings) -> Iterator[Check]:
    from wiseflow_nb.store.paths import file_system_of, sessions_root

    root, why = sessions_root(settings.state_dir)
    remedy = "set STATE_DIR to a private directory on a local disk"
    if not root.is_dir():
        yield Check(FAIL, "sessions", why or f"{root} is no directory", remedy)
        return
    kind = file_system_of(root)
    mode = stat.S_IMODE(root.stat().st_mode)
    found = f"{root}" + (f" ({kind})" if kind else "") + f", mode {mode:04o}"
    if os.name == "posix" and mode != 0o700:
        yield Check(WARN, "sessions", found, f"chmod 700 {root}")
    else:
        yield Check(OK, "sessions", found)
    if why:
        yield Check(WARN, "sessions", why, remedy)
    if hasattr(os, "statvfs"):
        status = os.statvfs(root)
        left = float(status.f_bavail * status.f_frsize)
        if left < 100e6:
            yield Check(WARN, "sessions", f"{size(left)} left on its file system", "free some space, or set STATE_DIR")


def _recorder(settings: Settings) -> Iterator[Check]:
    """Start a recorder as a session does, in a directory beside the sessions, let it commit, end it."""
    from wiseflow_nb.recorder.client import RecorderClient
    from wiseflow_nb.recorder.protocol import RecorderConfig, RecorderSettings
    from wiseflow_nb.records import CommandResult
    from wiseflow_nb.store.identity import identify
    from wiseflow_nb.store.paths import sessions_root

    if not settings.recorder_enabled:
        yield Check(WARN, "recorder", "on a thread, by setting", "set RECORDER_ENABLED=true to survive a busy kernel")
        return
    root, _ = sessions_root(settings.state_dir)
    if not root.is_dir():
        yield Check(FAIL, "recorder", "not tried: there is no directory for it", "see the line about sessions")
        return
    # Not a session's name: no list shows it.
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=root, ignore_cleanup_errors=True) as above:
        # One deeper: a recorder prunes what lies beside its own directory.
        directory = os.path.join(above, "doctor")
        os.mkdir(directory, 0o700)
        client = RecorderClient(
            RecorderConfig(
                session_id="doctor",
                directory=directory,
                pid=os.getpid(),
                title="doctor",
                identity=identify().to_dict(),
                settings=RecorderSettings(),
                retention_days=settings.retention_days,
            ),
            on_alert=lambda transition: None,
            on_event=lambda event: None,
            on_command=lambda verb, arguments, who: CommandResult(False, "no session"),
        )
        began = time.monotonic()
        client.start()
        ready = time.monotonic() - began
        mode = client.mode
        synced = client.sync(5.0)
        ended = client.stop("doctor")
    if mode != "process":
        yield Check(WARN, "recorder", "cannot run as a process of its own: it runs on a thread", "see recorder.log")
    elif not (synced and ended):
        yield Check(FAIL, "recorder", "it starts, but does not answer in time", "look for a full or very slow disk")
    else:
        yield Check(OK, "recorder", f"a process of its own, ready in {duration(ready)}, commits and ends in order")


def _sqlite(settings: Settings) -> Iterator[Check]:
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        oldest = ".".join(map(str, OLDEST_SQLITE))
        yield Check(FAIL, "sqlite", f"{sqlite3.sqlite_version} is older than {oldest}", "use a newer Python")
    else:
        yield Check(OK, "sqlite", sqlite3.sqlite_version)


def _kernel(settings: Settings) -> Iterator[Check]:
    yield kernel_check(_version("ipykernel"), _version("nest-asyncio"), _version("nest-asyncio2"), sys.version_info[:2])


def kernel_check(kernel: str, one: str, two: str, python: tuple[int, ...]) -> Check:
    """Whether a loop can be re-entered without losing cells, from the installed versions (empty: not installed).

    nest-asyncio drops queued cells in ipykernel 7, and cannot work on Python 3.14; nest-asyncio2 is
    sound on all.

    Examples
    --------
    >>> kernel_check("7.4.0", "1.6.0", "", (3, 11)).state, kernel_check("6.31.0", "1.6.0", "", (3, 11)).state
    ('warn', 'ok')
    """
    found = ", ".join(
        f"{name} {number}"
        for name, number in (("ipykernel", kernel), ("nest-asyncio", one), ("nest-asyncio2", two))
        if number
    )
    if not kernel:
        return Check(WARN, "kernel", "ipykernel is not installed here", "pip install ipykernel")
    major = int(kernel.split(".")[0]) if kernel.split(".")[0].isdigit() else 7
    if not two and (major >= 7 or python >= (3, 14) or not one):
        return Check(
            WARN, "kernel", f"{found}: run_nested has nothing sound to use", "pip install nest-asyncio2, or use await"
        )
    return Check(OK, "kernel", found)


def _packages(settings: Settings) -> Iterator[Check]:
    numbers = {name: _version(name) for name in _NEEDED}
    missing = [name for name, number in numbers.items() if not number]
    yield Check(OK, "packages", ", ".join(f"{name} {number}" for name, number in numbers.items() if number))
    if missing:
        yield Check(FAIL, "packages", f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    for name, extra in _EXTRAS.items():
        number = _version(name)
        # Optional: its absence is no trouble.
        yield Check(
            OK,
            extra,
            f"{name} {number}" if number else "not installed",
            "" if number else f'pip install "wiseflow-nb[{extra}]"',
        )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
