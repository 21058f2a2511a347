"""Loading and unloading: one object per shell holds every hook, so that all of them can be removed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from wiseflow_nb.notebook._cells import CellTracker

if TYPE_CHECKING:
    from wiseflow_nb.session import Session

_ATTRIBUTE = "_wiseflow_nb_extension"


class Extension:
    """The hooks of one IPython shell and the session they serve."""

    def __init__(self, ipython: Any) -> None:
        self.ipython = ipython
        self.session: Session | None = None
        self.tracker = CellTracker(ipython, lambda: self.session)
        self.dashboards: list[Any] = []

    def start(self) -> Session:
        """Start the kernel's session, or take the one it has."""
        from wiseflow_nb.session import start_default

        self.session = start_default()
        if getattr(self.ipython, "kernel", None) is not None:
            self.session.on_idle_stop_kernel(self._stop_kernel)
        return self.session

    def _stop_kernel(self) -> None:
        """Nobody was here for long: end the record in order, then the kernel."""
        from ipykernel.connect import get_connection_file

        from wiseflow_nb.notebook._stop import stop_kernel

        self.stop("idle shutdown")
        stop_kernel(get_connection_file())

    def stop(self, reason: str) -> bool:
        """Close the dashboards and the session; return whether there was one."""
        for dashboard in self.dashboards:
            dashboard.close()
        self.dashboards.clear()
        # The cell that asks for it is still running; its row must not stay open.
        self.tracker.finish_open()
        session, self.session = self.session, None
        if session is not None:
            session.close(reason)
        return session is not None

    def hook(self) -> None:
        from wiseflow_nb.notebook._magics import WiseflowMagics

        self.ipython.register_magics(WiseflowMagics(self.ipython, self))
        self.tracker.hook()

    def unhook(self) -> None:
        self.tracker.unhook()
        manager = self.ipython.magics_manager
        for kind in ("line", "cell"):
            manager.magics[kind].pop("wiseflow", None)
        manager.registry.pop("WiseflowMagics", None)


def say(text: str) -> None:
    """Write a line where the running cell shows it."""
    sys.stdout.write(text + "\n")


def load(ipython: Any) -> None:
    """Start the kernel's session, register the magics, track cells, and say so in one line.

    Loading again without unloading keeps the session.
    """
    extension: Extension | None = getattr(ipython, _ATTRIBUTE, None)
    if extension is None:
        extension = Extension(ipython)
        session = extension.start()
        extension.hook()
        setattr(ipython, _ATTRIBUTE, extension)
    elif extension.session is None:
        session = extension.start()
    else:
        session = extension.session
    say(f"wiseflow_nb: session {session.id} is recording; %wiseflow dashboard shows it, %wiseflow? tells the rest")


def unload(ipython: Any) -> None:
    """Close the session and remove the magics and every hook; without a load before, do nothing."""
    extension: Extension | None = getattr(ipython, _ATTRIBUTE, None)
    if extension is None:
        return
    delattr(ipython, _ATTRIBUTE)
    extension.stop("extension unloaded")
    extension.unhook()
