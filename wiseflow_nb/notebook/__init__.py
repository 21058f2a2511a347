"""In the notebook: the extension, the magics, the cost of each cell, and ``run_nested``."""

from __future__ import annotations

from wiseflow_nb.notebook._extension import load, unload
from wiseflow_nb.notebook._nested import run_nested

__all__ = ["load", "run_nested", "unload"]
