"""The psutil path where psutil, and Python, have only what macOS or Windows give them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

_SAMPLE = """
import json, os, sys, time
{without}
from wiseflow_nb.resources._probe import Probe
# On a loaded machine a look at every process can be dear, which would be told.
probe = Probe(os.getpid(), root="/nowhere", environ={{}}, timer=lambda: 0.0)
for at in range(40):
    sample = probe.read(time_seconds=float(at), monotonic_seconds=float(at), interval_seconds=1.0, gap=False)
    time.sleep(0.005)
limits = probe.limits
events = [event.message for event in probe.take_events()]
print(json.dumps([probe.path, sample._asdict(), limits.limit_source, events, len(probe.top_processes())]))
probe.close()
"""

#: What psutil has on Linux alone, or not everywhere: functions gone, fields gone, None instead.
_PSUTIL = """
import collections, psutil
full = psutil.cpu_times()
Times = collections.namedtuple("scputimes", "user nice system idle")
psutil.cpu_times = lambda *a, **k: Times(full.user + time.process_time(), full.nice, full.system, full.idle + time.monotonic())
Own = collections.namedtuple("pcputimes", "user system")
real = psutil.Process.cpu_times
def cpu_times(self):
    times = real(self)
    return Own(times.user, times.system)
def memory_info(self):
    return Memory(*real_memory(self)[:2])
def memory_full_info(self):
    return Memory(*real_memory(self)[:2])
Memory = collections.namedtuple("pmem", "rss vms")
real_memory = psutil.Process.memory_info
for fake, known in ((cpu_times, real), (memory_info, real_memory)):
    fake.cache_activate, fake.cache_deactivate = known.cache_activate, known.cache_deactivate
psutil.Process.cpu_times, psutil.Process.memory_info = cpu_times, memory_info
psutil.Process.memory_full_info = memory_full_info
for name in ("num_fds", "cpu_affinity", "memory_maps", "io_counters", "rlimit", "ionice", "cpu_num"):
    if hasattr(psutil.Process, name): delattr(psutil.Process, name)
for name in ("sensors_temperatures", "sensors_fans", "sensors_battery"):
    if hasattr(psutil, name): delattr(psutil, name)
"""
_NONE = "psutil.disk_io_counters = psutil.net_io_counters = lambda *a, **k: None\n"
_GONE = "del psutil.disk_io_counters, psutil.net_io_counters, psutil.getloadavg, psutil.swap_memory\n"


def sampled(without: str) -> tuple[str, dict[str, float], str, list[str], int]:
    done = subprocess.run(
        [sys.executable, "-c", _SAMPLE.format(without=without)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found: Any = json.loads(done.stdout)
    return tuple(found)


def unknown(values: dict[str, float]) -> set[str]:
    return {name for name, value in values.items() if value != value}


CONTAINER = {
    "container_cpu_seconds_total",
    "container_cpu_throttled_seconds_total",
    "container_memory_usage_bytes",
    "container_memory_oom_kills_total",
    "pressure_cpu_waiting_seconds_total",
    "pressure_memory_waiting_seconds_total",
    "pressure_io_waiting_seconds_total",
    "recorder_memory_rss_bytes",  # in the watched process itself
}
LINUX_ONLY = {
    "system_cpu_iowait_ratio",
    "system_cpu_steal_ratio",
    "process_memory_pss_bytes",
    "process_open_fds",
}
COUNTERS = {
    "disk_read_bytes_total",
    "disk_written_bytes_total",
    "network_receive_bytes_total",
    "network_transmit_bytes_total",
}


@pytest.mark.parametrize(
    ("without", "more"),
    [
        pytest.param("", set(), id="fields"),
        pytest.param(_NONE, COUNTERS, id="none"),
        pytest.param(_GONE, COUNTERS | {"system_load1", "system_swap_used_bytes"}, id="functions"),
    ],
)
def test_without_what_psutil_has_on_linux_alone(without: str, more: set[str]) -> None:
    path, values, source, events, top = sampled(_PSUTIL + without)
    assert path == "psutil"
    # What the system does not offer is no failure.
    assert events == []
    if sys.platform == "linux" and not without:
        more = more | ({"disk_read_bytes_total", "disk_written_bytes_total"} & unknown(values))
    assert unknown(values) == CONTAINER | LINUX_ONLY | more
    assert source.startswith("memory: host, cpu: host")
    assert values["process_count"] >= 1
    assert values["process_memory_rss_bytes"] > 0
    assert 0 <= values["cpu_utilization_ratio"] <= 1
    assert top == 1


def test_where_psutil_fails_it_is_told_once_for_each_part() -> None:
    broken = """
def broken(*a, **k): raise RuntimeError("no physical disk was found")
def refused(*a, **k): raise psutil.AccessDenied(1)
psutil.disk_io_counters = broken
psutil.Process.children = refused
"""
    _path, values, _, events, _ = sampled("import psutil\n" + broken)
    assert sorted(event.split(" cannot")[0] for event in events) == ["disk counters", "processes"]
    assert {name for name in values if name.startswith(("process_", "disk_"))} <= unknown(values)
    assert values["memory_utilization_ratio"] > 0


#: An interpreter as on Windows, as far as one can be made of another: modules that are not there,
#: functions that are not there. The standard library is loaded first, with what it needs.
_ELSEWHERE = """
import asyncio, asyncio.subprocess, concurrent.futures, ctypes, http.server, importlib, importlib.metadata, inspect
import json, logging.handlers, multiprocessing, multiprocessing.connection, os, pathlib, pkgutil, platform
import selectors, shutil, signal, socket, socketserver, sqlite3, ssl, subprocess, sys, tempfile, threading, time
import traceback, webbrowser, warnings
warnings.simplefilter("ignore")
# What the package stands on has its own branches, taken by the real platform.
for name in {third!r}:
    importlib.import_module(name)
# psutil's own module for this system goes on with the whole of them.
for where in (os, signal):
    whole = type(os)(where.__name__)
    whole.__dict__.update(where.__dict__)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "psutil" and getattr(module, where.__name__, None) is where:
            setattr(module, where.__name__, whole)
MODULES = {modules!r}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MODULES:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
for name in MODULES: sys.modules.pop(name, None)
for where, names in ((os, {of_os!r}), (signal, {of_signal!r})):
    for name in names:
        if hasattr(where, name): delattr(where, name)
import wiseflow_nb
failed = []
def walk(package):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if found.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(found.name)
        except Exception as error:
            failed.append(f"{{found.name}}: {{type(error).__name__}}: {{error}}")
walk(wiseflow_nb)
from wiseflow_nb.resources._probe import Probe
# On a loaded machine a look at every process can be dear, which would be told.
probe = Probe(os.getpid(), root="/nowhere", environ={{}}, timer=lambda: 0.0)
for at in range(3):
    sample = probe.read(time_seconds=float(at), monotonic_seconds=float(at), interval_seconds=1.0, gap=False)
events = [event.message for event in probe.take_events()]
probe.close()
# Linux' files through it as well: without pread a seek does.
if {linux}:
    files = Probe(os.getpid(), environ={{}})
    for at in range(3):
        other = files.read(time_seconds=float(at), monotonic_seconds=float(at), interval_seconds=1.0, gap=False)
    events += [event.message for event in files.take_events()]
    files.close()
    assert other.process_count == sample.process_count, (other, sample)
print(json.dumps([failed, sample._asdict(), events, probe.path]))
"""
MISSING_MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "syslog", "crypt", "nis", "ossaudiodev")
MISSING_OS = [
    "pread",
    "preadv",
    "pwrite",
    "pwritev",
    "sysconf",
    "statvfs",
    "fstatvfs",
    "getloadavg",
    "register_at_fork",
    "posix_fallocate",
    "posix_fadvise",
    "sched_getaffinity",
    "sched_setaffinity",
    "fork",
    "forkpty",
    "getuid",
    "geteuid",
    "getgid",
    "getegid",
    "setsid",
    "setpgid",
    "getpgid",
    "getsid",
    "killpg",
    "getpgrp",
    "mkfifo",
    "O_CLOEXEC",
    "O_NOFOLLOW",
    "O_NONBLOCK",
    "O_DIRECTORY",
    "WNOHANG",
    "wait4",
    "waitid",
    "pipe2",
    "memfd_create",
    "nice",
    "uname",
    "setpriority",
    "getpriority",
    "eventfd",
    "pidfd_open",
    "fchown",
    "chown",
    "lchown",
    "sendfile",
]
MISSING_SIGNALS = [
    "SIGKILL",
    "SIGHUP",
    "SIGQUIT",
    "SIGUSR1",
    "SIGUSR2",
    "SIGCHLD",
    "SIGALRM",
    "SIGSTOP",
    "SIGCONT",
    "pthread_kill",
    "pthread_sigmask",
]
THIRD = ["psutil", "pandas", "pydantic", "plotly", "plotly.graph_objects", "anywidget", "ipywidgets", "IPython"]
THIRD += ["ipykernel", "ipykernel.ipkernel", "jupyter_client", "voila.app", "cloudpickle", "platformdirs"]
THIRD += ["nest_asyncio", "nest_asyncio2", "tornado.web", "jupyter_server.extension.application"]


def test_every_module_can_be_imported_where_posix_is_missing() -> None:
    code = _ELSEWHERE.format(
        third=THIRD,
        modules=MISSING_MODULES,
        of_os=tuple(MISSING_OS),
        of_signal=tuple(MISSING_SIGNALS),
        linux=sys.platform == "linux",
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": os.path.expanduser("~")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    failed, values, events, path = json.loads(done.stdout.splitlines()[-1])
    assert failed == []
    assert events == []
    assert path == "psutil"
    for name in (
        "memory_utilization_ratio",
        "process_memory_rss_bytes",
        "filesystem_utilization_ratio",
        "cpu_limit_cores",
    ):
        assert values[name] > 0, name
