"""``Dashboard``: the widget tree, and the one thread that keeps it up to date."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import ipywidgets

from wiseflow_nb.clock import SYSTEM_CLOCK, Clock
from wiseflow_nb.dashboard._core import Core
from wiseflow_nb.dashboard._widgets import plotly_gzip
from wiseflow_nb.errors import UsageError
from wiseflow_nb.view import SessionView


class Dashboard:
    """Resources, tasks, alerts and settings of a session, live, in a notebook or a Voilà page.

    Parameters
    ----------
    session_or_view
        A ``SessionView``, or anything with one as its ``view`` attribute.
    interval
        Seconds between updates, at least 0.1. Default 1.0.
    clock
        For tests.

    Raises
    ------
    UsageError
        If the first argument is neither, or the interval is too short.

    Examples
    --------
    >>> from wiseflow_nb import Dashboard, current_session  # doctest: +SKIP
    >>> Dashboard(current_session())  # doctest: +SKIP
    """

    def __init__(self, session_or_view: Any, *, interval: float = 1.0, clock: Clock = SYSTEM_CLOCK) -> None:
        view = session_or_view if hasattr(session_or_view, "snapshot") else getattr(session_or_view, "view", None)
        if view is None or not hasattr(view, "snapshot"):
            kind = type(session_or_view).__name__
            raise UsageError(f"Dashboard needs a session or a view, not {kind}; give it current_session()")
        if not interval >= 0.1:
            raise UsageError(f"interval={interval!r} is too short; give at least 0.1 seconds")
        self._core = Core(view, clock)
        self._root = _tree(self._core)
        # The widget registry holds the tree until it is closed; so a dashboard that is only displayed lives on.
        self._root._wiseflow_dashboard = self
        self._root.observe(self._on_comm, "comm")
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_run,
            args=(weakref.ref(self), self._core.inbox.wake, self._stop, clock, interval),
            name="wiseflow-dashboard",
            daemon=True,
        )
        self._thread.start()

    @property
    def widget(self) -> ipywidgets.Box:
        """The root of the tree, to be placed among other widgets."""
        self._core.displayed = True
        return self._root

    @property
    def view(self) -> SessionView:
        """The view that was given."""
        return self._core._own

    @property
    def closed(self) -> bool:
        """Whether the dashboard has been closed, or its widget."""
        return self._stop.is_set()

    def close(self) -> None:
        """Take the dashboard off its pages and end its thread. Closing twice is no error."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._core.inbox.wake.set()
        self._root.unobserve(self._on_comm, "comm")
        for widget in (*self._core.widgets, *_boxes(self._root)):
            widget.close()
        self._root._wiseflow_dashboard = None
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2.0)
        self._core.close()

    def _on_comm(self, change: Any) -> None:
        if change["new"] is None:
            self.close()

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.widget._repr_mimebundle_(**kwargs)

    def __repr__(self) -> str:
        return f"<Dashboard {'closed' if self.closed else 'open'}>"


def _tree(core: Core) -> ipywidgets.Box:
    side = ipywidgets.Box([core.alerts, core.settings])
    side.add_class("wf-side")
    lower = ipywidgets.Box([core.tasks, side])
    lower.add_class("wf-lower")
    root = ipywidgets.Box([core.overview, core.plot, lower])
    root.add_class("wf-root")
    return root


def _boxes(root: ipywidgets.Box) -> list[ipywidgets.Box]:
    lower = root.children[-1]
    return [lower.children[-1], lower, root]


def _run(
    reference: weakref.ref[Dashboard], wake: threading.Event, stop: threading.Event, clock: Clock, interval: float
) -> None:
    """Tick until the dashboard is closed or gone; between ticks the thread holds no reference to it."""
    plotly_gzip()
    while not stop.is_set():
        dashboard = reference()
        if dashboard is None:
            return
        dashboard._core.tick()
        del dashboard
        clock.wait(wake, interval)
