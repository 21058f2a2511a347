"""The dashboard: one widget tree that draws a session and speaks to it through a ``SessionView``.

The widgets load when first used: serving the page and drawing a figure need none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wiseflow_nb.dashboard._dashboard import Dashboard
    from wiseflow_nb.dashboard._figures import figure

__all__ = ["Dashboard", "figure"]
_LAZY = {"Dashboard": "wiseflow_nb.dashboard._dashboard", "figure": "wiseflow_nb.dashboard._figures"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'wiseflow_nb.dashboard' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
