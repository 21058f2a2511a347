"""The anywidgets of the dashboard: thin, each a script, a list of parts and a ``send``."""

from __future__ import annotations

import functools
import gzip
import json
import threading
import uuid
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import anywidget
import numpy as np
import traitlets


@functools.cache
def static_text(name: str) -> str:
    """The text of one packaged script or style sheet."""
    return (files("wiseflow_nb.dashboard") / "static" / name).read_text(encoding="utf-8")


def script(name: str) -> str:
    """A widget's module: the shared code, then its own (modules sent as text cannot import each other)."""
    return static_text("common.js") + "\n" + static_text(name)


_gzip_lock = threading.Lock()
_gzip_cache: dict[str, bytes] = {}


def plotly_version() -> str:
    """The version of the plotly.js that the installed plotly package carries."""
    from plotly.offline import get_plotlyjs_version

    return str(get_plotlyjs_version())


def plotly_gzip() -> bytes:
    """plotly.js as the installed plotly package carries it, gzipped once a process."""
    from plotly.offline import get_plotlyjs

    with _gzip_lock:
        if "js" not in _gzip_cache:
            _gzip_cache["js"] = gzip.compress(get_plotlyjs().encode(), compresslevel=6, mtime=0)
        return _gzip_cache["js"]


class WiseflowWidget(anywidget.AnyWidget):
    """A widget that is told only what changed.

    The page sends ``hello`` when it has loaded the script; whoever owns the widget answers with
    everything. After that ``push`` sends the parts that differ from the last ones sent.
    """

    name = ""
    _dom_classes = traitlets.List(trait=traitlets.Unicode(), default_value=["wf-widget"]).tag(sync=True)

    def __init__(self, deliver: Callable[[str, dict[str, Any]], None] | None = None, **kwargs: Any) -> None:
        self._sent: dict[str, str] = {}
        super().__init__(**kwargs)
        self.key = uuid.uuid4().hex
        if deliver is not None:
            name = self.name

            def enqueue(_widget: object, content: Any, _buffers: object) -> None:
                if isinstance(content, dict):
                    deliver(name, content)

            self.on_msg(enqueue)

    def forget(self) -> None:
        """Take it that the page knows nothing: the next ``push`` sends everything."""
        self._sent.clear()

    def push(self, parts: Mapping[str, Any]) -> int:
        """Send the parts that changed in one message; returns how many there were."""
        changed: dict[str, Any] = {}
        for key, value in parts.items():
            text = json.dumps(value, separators=(",", ":"), allow_nan=False)
            if self._sent.get(key) != text:
                self._sent[key] = text
                changed[key] = value
        for key in [key for key in self._sent if ":" in key and key not in parts]:
            del self._sent[key]
        if changed:
            self.send({"type": "parts", "parts": changed})
        return len(changed)


class Overview(WiseflowWidget):
    """The header and the cards; it carries the style sheet of the whole tree."""

    name = "overview"
    _esm = script("overview.js")
    _css = static_text("style.css")


class LivePlot(WiseflowWidget):
    """Charts that get their history once and then only new points, as binary float64 columns."""

    name = "plot"
    _esm = script("plot.js")
    plotly_version = traitlets.Unicode().tag(sync=True)

    def __init__(self, deliver: Callable[[str, dict[str, Any]], None] | None = None, **kwargs: Any) -> None:
        super().__init__(deliver, plotly_version=plotly_version(), **kwargs)

    def send_library(self) -> None:
        """Send plotly.js itself, on request of a page that has none."""
        self.send({"type": "plotly", "version": self.plotly_version}, buffers=[plotly_gzip()])

    def send_columns(self, kind: str, epoch: int, block: np.ndarray, **extra: Any) -> None:
        """Send times and columns as one block, shape (1 + columns, points); kind is history or append."""
        data = np.ascontiguousarray(block, dtype="<f8")
        self.send({"type": kind, "epoch": epoch, "n": int(data.shape[1]), **extra}, buffers=[data.tobytes()])


class TaskTable(WiseflowWidget):
    """The virtualised table of tasks: all rows once, then the changed ones."""

    name = "tasks"
    _esm = script("tasks.js")


class AlertPanel(WiseflowWidget):
    """Live alerts, then past ones."""

    name = "alerts"
    _esm = script("alerts.js")


class SettingsPanel(WiseflowWidget):
    """The settings that can change while the session runs."""

    name = "settings"
    _esm = script("settings.js")
