"""The resources that the work really has: limits, probe, ring, history, alerts, monitor.

Loaded piece by piece: the recorder needs the probe and the ring without numpy or the settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wiseflow_nb.resources.monitor import ResourceMonitor

__all__ = ["ResourceMonitor"]


def __getattr__(name: str) -> Any:
    if name == "ResourceMonitor":
        import wiseflow_nb.resources.monitor as monitor

        return monitor.ResourceMonitor
    raise AttributeError(f"module 'wiseflow_nb.resources' has no attribute {name!r}")
