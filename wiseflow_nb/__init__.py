"""Watch, bound and record the resources of heavy notebook work.

Names are loaded when first used: importing the package loads no pandas, plotly or ipywidgets and
starts nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "Dashboard": "wiseflow_nb.dashboard",
    "Priority": "wiseflow_nb.records",
    "ResourceMonitor": "wiseflow_nb.resources",
    "Retry": "wiseflow_nb.tasks",
    "Session": "wiseflow_nb.session",
    "Settings": "wiseflow_nb.config",
    "Task": "wiseflow_nb.tasks",
    "TaskManager": "wiseflow_nb.tasks",
    "TaskState": "wiseflow_nb.records",
    "ThreadPoolManager": "wiseflow_nb.pool",
    "check_cancelled": "wiseflow_nb.context",
    "current_session": "wiseflow_nb.session",
    "current_task": "wiseflow_nb.context",
    "errors": "",
    "open_session": "wiseflow_nb.session",
    "run_nested": "wiseflow_nb.notebook",
    "sessions": "wiseflow_nb.session",
}

__all__ = ["__version__", *sorted(_LAZY), "load_ipython_extension", "unload_ipython_extension"]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("wiseflow_nb.errors")
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'wiseflow_nb' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def load_ipython_extension(ipython: Any) -> None:
    """``%load_ext wiseflow_nb``: start the kernel's session and register the magics."""
    from wiseflow_nb.notebook import load

    load(ipython)


def unload_ipython_extension(ipython: Any) -> None:
    """``%unload_ext wiseflow_nb``: close the session and remove every hook."""
    from wiseflow_nb.notebook import unload

    unload(ipython)
