"""The event loops that coroutines may run on: a thread of our own, or one that runs already."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from wiseflow_nb.errors import UsageError

logger = logging.getLogger("wiseflow_nb.tasks")


class TaskLoop(Protocol):
    """Where coroutines run: a thread of our own, a loop that runs already, or one that a test drives."""

    @property
    def current(self) -> bool:
        """Whether the caller is inside this loop, so that blocking would stop it."""

    def call(self, function: Callable[..., object], *args: Any) -> bool:
        """Call a function on the loop soon; return False if the loop has stopped."""

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None) -> Any:
        """Run a coroutine from another thread and return its result."""

    def drive(self) -> None:
        """Run what needs no waiting, where the caller is the one who runs the loop; else nothing."""

    def stop(self) -> None:
        """Let go of the loop."""


class HostLoop:
    """A loop that belongs to somebody else and runs already, as a kernel's does."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    @property
    def current(self) -> bool:
        """Whether the caller runs inside this loop."""
        return asyncio._get_running_loop() is self._loop

    def call(self, function: Callable[..., object], *args: Any) -> bool:
        """Call a function on the loop soon; return False if the loop was closed."""
        try:
            self._loop.call_soon_threadsafe(function, *args, context=contextvars.Context())
        except RuntimeError:
            return False
        return True

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None) -> Any:
        """Run a coroutine from another thread and return its result; on a loop of its own if this one was closed."""
        if self._loop.is_closed():
            return asyncio.run(coroutine)
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    def drive(self) -> None:
        """Nothing: it runs."""

    def stop(self) -> None:
        """Nothing: whose loop it is will stop it."""


class LoopThread:
    """A daemon thread with a running event loop; it starts with the first call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def current(self) -> bool:
        """Whether the caller runs on this loop's thread."""
        return threading.current_thread() is self._thread

    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop, started if it is not yet."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
            if self._thread is None or self._thread.ident is None:  # or an interrupt came when it was to be started
                self._thread = threading.Thread(target=self._run, args=(self._loop,), name=self._name, daemon=True)
                self._thread.start()
            return self._loop

    def call(self, function: Callable[..., object], *args: Any) -> bool:
        """Call a function on the loop soon; return False if the loop has stopped."""
        try:
            # A fresh context: that of the calling thread belongs to whatever it happens to run.
            self.loop().call_soon_threadsafe(function, *args, context=contextvars.Context())
        except RuntimeError:
            return False
        return True

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None) -> Any:
        """Run a coroutine from another thread and return its result; on a loop of its own if this one has stopped."""
        if self._stopping:
            return asyncio.run(coroutine)
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop())
        try:
            return future.result(timeout)
        except TimeoutError:
            future.cancel()
            raise

    def drive(self) -> None:
        """Nothing: it runs on its thread."""

    def stop(self, timeout: float | None = 2.0) -> None:
        """Cancel what is left, stop the loop, and wait for its thread."""
        with self._lock:
            loop, thread, self._stopping = self._loop, self._thread, True
        if loop is None or thread is None:
            return
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(loop.stop)
        if not self.current:
            thread.join(timeout)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        if threading.current_thread() is not self._thread:
            return
        asyncio.set_event_loop(loop)
        while not self._stopping:
            try:
                loop.run_forever()
            except (KeyboardInterrupt, SystemExit):
                # Raised by a task that user code made on this loop; the other tasks go on.
                logger.exception("code on the task loop tried to end the interpreter")
        with contextlib.suppress(Exception):  # what user code left behind must not keep the thread
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.wait(left, timeout=0.5))
            loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def chosen_loop(which: str | TaskLoop) -> TaskLoop:
    """The loop that ``own``, ``kernel`` or the loop itself stands for."""
    if which == "own":
        return LoopThread("wiseflow-tasks")
    if which == "kernel":
        try:
            return HostLoop(asyncio.get_running_loop())
        except RuntimeError:
            raise UsageError("loop='kernel' needs a loop that runs here, and none does; use loop='own'") from None
    if isinstance(which, str):
        raise UsageError(f"loop {which!r} is unknown; give 'own' or 'kernel'")
    return which
