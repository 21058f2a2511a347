"""Whether somebody looks: what the page sends is put here, and the kernel's UI thread takes it."""

from __future__ import annotations

import math
import sys
import threading
from collections import deque
from typing import Any

from wiseflow_nb.clock import Clock

#: A page pings every 2 s; after this long without one, nobody looks.
SILENCE_SECONDS = 6.0
#: What a page may have waiting; the oldest go first, so that a stuck view cannot grow without bound.
INBOX_ITEMS = 1000


class Inbox:
    """What pages have sent. Any thread may put; putting never blocks and never calls a view."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._items: deque[tuple[str, dict[str, Any]]] = deque(maxlen=INBOX_ITEMS)
        self.wake = threading.Event()
        self.heard_at = -math.inf

    @property
    def heard(self) -> bool:
        """Whether any page has ever spoken."""
        return self.heard_at > -math.inf

    def put(self, widget: str, content: dict[str, Any]) -> None:
        """Take one message of a page."""
        now = self._clock.monotonic()
        was_silent = now - self.heard_at > SILENCE_SECONDS
        self.heard_at = now
        # A page that comes back (a laptop woken, a tab unfrozen) missed what was not sent meanwhile.
        if was_silent:
            self._items.append(("", {"type": "refresh"}))
        if content.get("type") != "ping":
            self._items.append((widget, content))
        if was_silent or content.get("type") != "ping":
            self.wake.set()

    def drain(self) -> list[tuple[str, dict[str, Any]]]:
        """Take all that waits, in order."""
        self.wake.clear()
        items: list[tuple[str, dict[str, Any]]] = []
        while self._items:
            items.append(self._items.popleft())
        return items

    def silent(self) -> bool:
        """Whether nobody has spoken for ``SILENCE_SECONDS``."""
        return self._clock.monotonic() - self.heard_at > SILENCE_SECONDS

    def keep(self) -> None:
        """Count silence from now on: while a cell ran, pings could not be heard."""
        self.heard_at = self._clock.monotonic()


class CellWatch:
    """Whether this kernel is running a cell now: then it hears no page, and silence means nothing."""

    def __init__(self) -> None:
        self.running = False
        self._shell: Any = None
        ipython = sys.modules.get("IPython")
        shell = ipython.get_ipython() if ipython is not None else None
        if shell is None or getattr(shell, "kernel", None) is None:
            return
        self._shell = shell
        self.running = True
        shell.events.register("pre_run_cell", self._begin)
        shell.events.register("post_run_cell", self._end)

    def _begin(self, *_: object) -> None:
        self.running = True

    def _end(self, *_: object) -> None:
        self.running = False

    def close(self) -> None:
        """Take the hooks away."""
        shell, self._shell = self._shell, None
        self.running = False
        if shell is None:
            return
        for event, hook in (("pre_run_cell", self._begin), ("post_run_cell", self._end)):
            if hook in shell.events.callbacks.get(event, ()):
                shell.events.unregister(event, hook)
