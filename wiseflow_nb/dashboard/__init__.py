"""The dashboard: one widget tree that draws a session and speaks to it through a ``SessionView``."""

from __future__ import annotations

from wiseflow_nb.dashboard._dashboard import Dashboard
from wiseflow_nb.dashboard._figures import figure

__all__ = ["Dashboard", "figure"]
