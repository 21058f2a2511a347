"""The public names, locked; importing the package is cheap and starts nothing."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import wiseflow_nb

NAMES = {
    "Dashboard",
    "Priority",
    "ResourceMonitor",
    "Retry",
    "Session",
    "Settings",
    "Task",
    "TaskManager",
    "TaskState",
    "ThreadPoolManager",
    "__version__",
    "check_cancelled",
    "current_session",
    "current_task",
    "errors",
    "load_ipython_extension",
    "open_session",
    "run_nested",
    "sessions",
    "unload_ipython_extension",
}


def test_the_names_are_these() -> None:
    assert set(wiseflow_nb.__all__) == NAMES
    assert set(dir(wiseflow_nb)) == NAMES


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_every_name_is_there_and_explained(name: str) -> None:
    value = getattr(wiseflow_nb, name)
    assert (inspect.getdoc(value) or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = wiseflow_nb.no_such_name


def test_import_is_light_and_starts_nothing() -> None:
    code = (
        "import sys, threading, os\n"
        "before = set(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else set()\n"
        "import wiseflow_nb, wiseflow_nb.cli\n"
        "heavy = {'pandas', 'numpy', 'plotly', 'ipywidgets', 'pydantic', 'IPython', 'voila', 'asyncio'}\n"
        "print(sorted(heavy & set(sys.modules)), threading.active_count())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[] 1"
