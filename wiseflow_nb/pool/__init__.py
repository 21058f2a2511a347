"""The thread pool: an executor with classes of priority, live size, and figures per task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wiseflow_nb.pool.manager import ThreadPoolManager

__all__ = ["ThreadPoolManager"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: a worker process imports modules of this package, and needs no pool.
    if name != "ThreadPoolManager":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from wiseflow_nb.pool.manager import ThreadPoolManager

    return ThreadPoolManager
