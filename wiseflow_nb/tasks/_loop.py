"""The event loops that coroutines may run on: a thread of our own, or one that runs already."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, Protocol

from wiseflow_nb.errors import UsageError

logger = logging.getLogger("wiseflow_nb.tasks")


class TaskLoop(Protocol):
    """Where coroutines run: a thread of our own, a loop that runs already, or one that a test drives."""

    @property
    def current(self) -> bool:
        """Whether the caller is inside this loop, so that blocking would stop it."""

    @property
    def over(self) -> bool:
        """Whether the loop was closed by somebody else, or is being closed: it takes no further coroutine."""

    @property
    def closed(self) -> bool:
        """Whether the loop was closed by somebody else: nothing on it goes on."""

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
        self._over = False
        self._told: Callable[[], object] | None = None
        self._stopped: list[Callable[[str], object]] = []
        #: A loop that ends in good order closes the asynchronous generators that were begun on it: the
        #: one way to hear of that.
        self._watch: AsyncGenerator[None, None] | None = None
        if self.current:
            self._watch = _until_closed(weakref.ref(self))
            with contextlib.suppress(StopIteration):
                self._watch.__anext__().__await__().send(None)

    @property
    def current(self) -> bool:
        """Whether the caller runs inside this loop."""
        return asyncio._get_running_loop() is self._loop

    @property
    def over(self) -> bool:
        """Whether the loop was closed, or is being closed."""
        return self._over or self._loop.is_closed()

    @property
    def closed(self) -> bool:
        """Whether the loop was closed."""
        return self._loop.is_closed()

    @property
    def runs(self) -> bool:
        """Whether the loop runs at this moment."""
        return self._loop.is_running()

    @contextlib.contextmanager
    def stopped(self, need: Callable[[str], object]) -> Iterator[None]:
        """Inside the block the loop's thread waits for something else; ``need`` is told what needs the loop."""
        try:
            self._stopped.append(need)
            yield
        finally:
            if need in self._stopped:  # no interrupt came before
                self._stopped.remove(need)

    def when_over(self, told: Callable[[], object]) -> None:
        """Call ``told`` on the loop when it is being closed."""
        self._told = told

    def _ends(self) -> None:
        told, self._told = self._told, None
        if told is not None:
            self._over = True
            told()

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
        running = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        for need in tuple(self._stopped):
            need("the cleanup of a task needs it")
        return running.result(timeout)

    def drive(self) -> None:
        """Nothing: it runs."""

    def stop(self) -> None:
        """Watch it no longer; whose loop it is will stop it."""
        self._told = None
        watch, self._watch = self._watch, None
        if watch is not None:
            with contextlib.suppress(StopIteration, RuntimeError):  # it may be closing it right now
                watch.aclose().__await__().send(None)


async def _until_closed(host: weakref.ref[HostLoop]) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        if (known := host()) is not None:
            known._ends()


class LoopThread:
    """A daemon thread with a running event loop; it starts with the first call."""

    #: It is the manager alone that stops it.
    over = closed = False

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
                # Before it runs: ``current`` may be asked by the first call there.
                self._thread = threading.Thread(target=self._run, args=(self._loop,), name=self._name, daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # not one is to be had, as while the interpreter ends
                    self._thread = None
                    self._loop.close()
                    self._loop = None
                    raise
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
            begun = thread is not None and thread.is_alive()
            if not begun:  # an interrupt came before it began: it ends as soon as it looks, if it ever comes
                self._thread = None
        if loop is None or thread is None:
            return
        if not begun:
            loop.close()
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
