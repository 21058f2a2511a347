"""One heap of deadlines and one thread that waits for the next: time-outs, retries, deadlines."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import threading
from collections.abc import Callable

from wiseflow_nb.clock import Clock

#: How long ``close`` waits for the thread, which does nothing that takes time.
CLOSE_SECONDS = 1.0


class TimerHandle:
    """A planned call; ``cancel`` lets go of it at once."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Timers:
    """Calls functions at moments of a clock, on one daemon thread that starts with the first of them.

    One thread at a time waits for the next moment. What is called there and comes to code of the
    user's steps aside first (``step_aside``): another thread takes over the waiting, and this one ends
    with what it is at. So no time-out is late because of code that takes long, or never returns.

    A clock that tells its listeners when it moves (a test's) needs no thread: what has come due is
    called by whoever moves it.
    """

    def __init__(self, clock: Clock, name: str) -> None:
        self._clock = clock
        self._name = name
        listen = getattr(clock, "add_listener", None)
        self._unlisten: Callable[[], None] | None = None if listen is None else listen(self.run_due)
        # Re-entrant, for a finaliser that submits or cancels may come in between.
        self._lock = threading.RLock()
        self._heap: list[tuple[float, int, TimerHandle]] = []
        self._tidy_at = 1024
        self._order = itertools.count()
        self._news = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False

    def at(self, due_seconds: float, callback: Callable[[], None]) -> TimerHandle:
        """Call ``callback`` once the clock's ``monotonic()`` has reached ``due_seconds``."""
        handle = TimerHandle(callback)
        with self._lock:
            if self._closed:
                return handle
            if len(self._heap) >= self._tidy_at:
                # A time-out that was not needed would otherwise stay until it is due.
                self._heap = [entry for entry in self._heap if entry[2].callback is not None]
                heapq.heapify(self._heap)
                self._tidy_at = max(1024, 2 * len(self._heap))
            heapq.heappush(self._heap, (due_seconds, next(self._order), handle))
            # An interrupt may have come when it was to be started.
            if self._unlisten is None and (self._thread is None or self._thread.ident is None):
                self._start()
            elif self._heap[0][2] is handle:
                self._news.set()
        return handle

    def run_due(self) -> None:
        """Call everything whose moment has come, in order of the moments."""
        listening = self._unlisten is not None
        while True:
            with self._lock:
                if not self._heap or self._closed:
                    return
                if not listening and self._thread is not threading.current_thread():
                    return  # it has stepped aside
                due, _, handle = self._heap[0]
                if handle.callback is not None and due > self._clock.monotonic():
                    return
                heapq.heappop(self._heap)
            callback, handle.callback = handle.callback, None
            if callback is not None:
                callback()

    def step_aside(self) -> None:
        """Before code of the user's is called: let another thread wait, if it is this one that does."""
        if self._thread is not threading.current_thread():
            return
        with self._lock:
            if self._closed:
                return
            with contextlib.suppress(RuntimeError):  # no thread is to be had: late is better than never
                self._start()

    def close(self) -> None:
        """Forget everything planned and end the thread; wait for it a second at most."""
        with self._lock:
            self._closed = True
            unlisten, self._unlisten = self._unlisten, None
            self._heap.clear()
            thread = self._thread
            self._news.set()
        if unlisten is not None:
            unlisten()
        # Not alive, where an interrupt came before it began: it ends as soon as it looks, if it ever comes.
        if thread is not None and thread is not threading.current_thread() and thread.is_alive():
            thread.join(CLOSE_SECONDS)

    def forget(self) -> None:
        """In a forked child: what was planned is the parent's."""
        self._lock = threading.RLock()
        self._heap, self._thread, self._closed = [], None, True

    def _start(self) -> None:
        # The lock is held.
        before = self._thread
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = before
            raise

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            with self._lock:
                if self._closed or self._thread is not me:
                    return
                # Cleared under the lock that guards the heap: an earlier moment pushed from here
                # on sets it again.
                self._news.clear()
                timeout = max(0.0, self._heap[0][0] - self._clock.monotonic()) if self._heap else None
            self._clock.wait(self._news, timeout)
            self.run_due()
