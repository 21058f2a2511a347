"""Fakes for tests of code that uses wiseflow_nb: time that moves when told to, and more.

They are public: a test of a task with a time-out, or of an alert rule, needs no sleeping and no
thread. A ``Stage`` holds what a ``TaskManager`` needs to be driven by a test:

>>> from wiseflow_nb.tasks import Retry, TaskManager
>>> stage = Stage()
>>> with TaskManager(**stage.parts) as tasks:
...     task = tasks.options(retry=Retry(1, base=5.0, jitter=None)).submit(int, "none")
...     stage.run()
...     waits = str(task.state)
...     stage.advance(5.0)
...     waits, str(task.state), task.record().attempt
('retry_wait', 'failed', 2)
"""

from __future__ import annotations

import asyncio
import contextvars
import selectors
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

from wiseflow_nb.clock import Clock
from wiseflow_nb.errors import PoolClosedError, UsageError
from wiseflow_nb.futures import settle
from wiseflow_nb.records import EventRecord, Limits, Sample

P = ParamSpec("P")
T = TypeVar("T")


class FakeClock:
    """A ``Clock`` that stands still until ``advance`` is called.

    Examples
    --------
    >>> clock = FakeClock()
    >>> before = clock.monotonic()
    >>> clock.advance(5.0)
    >>> clock.monotonic() - before
    5.0
    """

    def __init__(self, start_seconds: float = 1_700_000_000.0) -> None:
        self._epoch = start_seconds
        self._elapsed = 0.0
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def time(self) -> float:
        """Seconds since the epoch on this clock."""
        return self._epoch + self._elapsed

    def monotonic(self) -> float:
        """Seconds since the clock was made, plus 1000 (so that zero never looks valid)."""
        return 1000.0 + self._elapsed

    def advance(self, seconds: float) -> None:
        """Move forward; whoever waits for a moment that has passed now goes on."""
        if seconds < 0:
            raise ValueError(f"cannot advance by {seconds!r} seconds; monotonic time never goes back")
        with self._lock:
            self._elapsed += seconds
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()

    def add_listener(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call ``listener`` after each advance, on the thread that advances; return what removes it.

        A ``TaskManager`` listens: its time-outs, deadlines and retries that have come due happen
        inside ``advance``.
        """
        with self._lock:
            self._listeners.append(listener)

        def remove() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return remove

    def set_back(self, seconds: float) -> None:
        """Set ``time()`` back, as an administrator would; ``monotonic()`` is not moved."""
        self._epoch -= seconds

    def wait(self, event: threading.Event, timeout: float | None) -> bool:
        """Block until the event is set or this clock has passed the timeout."""
        deadline = None if timeout is None else self.monotonic() + timeout
        # The event has no way to tell this clock; a short real wait stands in for it.
        while not event.wait(0.001):
            if deadline is not None and self.monotonic() >= deadline:
                return event.is_set()
        return True


class ScriptedProbe:
    """A probe that gives the samples it was given, the last one for ever.

    Examples
    --------
    >>> from wiseflow_nb.records import Limits, Sample
    >>> probe = ScriptedProbe([Sample(cpu_utilization_ratio=0.5)], Limits(1e9, 2.0, "test", "test"))
    >>> probe.read(time_seconds=1.0, monotonic_seconds=1.0, interval_seconds=1.0, gap=False).cpu_utilization_ratio
    0.5
    """

    def __init__(self, samples: Iterable[Sample], limits: Limits) -> None:
        self._samples = list(samples)
        self.limits = limits
        self.reads = 0

    def read(
        self,
        *,
        time_seconds: float,
        monotonic_seconds: float,
        interval_seconds: float,
        gap: bool,
        settings_revision: int = 0,
    ) -> Sample:
        """Return the next scripted sample, stamped."""
        sample = self._samples[min(self.reads, len(self._samples) - 1)]
        self.reads += 1
        return sample._replace(
            time_seconds=time_seconds,
            monotonic_seconds=monotonic_seconds,
            interval_seconds=interval_seconds,
            gap=float(gap),
            settings_revision=float(settings_revision),
        )

    def top_processes(self, count: int = 3) -> tuple[tuple[int, str, float, float], ...]:
        """No processes."""
        return ()

    def take_events(self) -> list[EventRecord]:
        """No events."""
        return []

    def close(self) -> None:
        """Nothing to close."""


class ManualExecutor(Executor):
    """An executor that runs nothing by itself: the test says what runs, when, and on which thread.

    Examples
    --------
    >>> executor = ManualExecutor()
    >>> future = executor.submit(pow, 2, 3)
    >>> executor.pending, future.done()
    (1, False)
    >>> executor.run_next(), future.result()
    (True, 8)
    """

    def __init__(self) -> None:
        self._queue: deque[Callable[[], None]] = deque()
        self._closed = False

    @property
    def pending(self) -> int:
        """How many submitted calls have not been taken."""
        return len(self._queue)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue the call; return its future.

        Raises
        ------
        PoolClosedError
            After ``shutdown``.
        """
        if self._closed:
            raise PoolClosedError("the executor has been shut down; make a new ManualExecutor")
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                value: Any = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001  user code: handed to the future
                settle(future, error=error)
            else:
                settle(future, value)

        self._queue.append(run)
        return future

    def take(self) -> Callable[[], None]:
        """Take the oldest call out of the queue; whoever calls what is returned runs it."""
        return self._queue.popleft()

    def run_next(self) -> bool:
        """Run the oldest call on this thread; return False if there was none."""
        if not self._queue:
            return False
        self.take()()
        return True

    def run_all(self) -> int:
        """Run calls, those submitted meanwhile included, until none is left; return how many."""
        count = 0
        while self.run_next():
            count += 1
        return count

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no further calls; queued ones stay where they are."""
        self._closed = True


class _WouldWait(selectors.DefaultSelector):
    """A selector that never blocks: where it would, it says so."""

    def __init__(self, would_wait: Callable[[], None]) -> None:
        super().__init__()
        self._would_wait = would_wait

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None or timeout > 0:
            self._would_wait()
        return super().select(0)


class _FakeTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is a given clock's and which stops where it would have to wait."""

    def __init__(self, clock: Clock) -> None:
        self._fake = clock
        super().__init__(_WouldWait(self.stop))

    def time(self) -> float:
        return self._fake.monotonic()


class ManualLoop:
    """An event loop that runs when the test says so, on the test's thread, and whose time is a clock's.

    Give it to ``TaskManager(loop=...)``.

    Examples
    --------
    >>> clock = FakeClock()
    >>> loop = ManualLoop(clock)
    >>> seen = []
    >>> async def work():
    ...     await asyncio.sleep(60)
    ...     seen.append("a minute later")
    >>> loop.call(asyncio.ensure_future, work())
    True
    >>> loop.run_until_idle(); clock.advance(60); loop.run_until_idle(); seen
    ['a minute later']
    >>> loop.stop()
    """

    def __init__(self, clock: Clock) -> None:
        self._loop = _FakeTimeLoop(clock)

    @property
    def current(self) -> bool:
        """Whether the caller runs inside this loop."""
        return asyncio._get_running_loop() is self._loop

    @property
    def over(self) -> bool:
        """Never: it is the manager that stops it."""
        return False

    closed = over

    def call(self, function: Callable[..., object], *args: Any) -> bool:
        """Call a function when the loop runs next; return False once it is stopped for good."""
        if self._loop.is_closed():
            return False
        self._loop.call_soon_threadsafe(function, *args, context=contextvars.Context())
        return True

    def run_until_idle(self) -> None:
        """Run everything that needs no waiting.

        Raises
        ------
        UsageError
            Inside this loop, which runs already.
        """
        if self.current:
            raise UsageError("this loop runs already; call run_until_idle outside of it")
        # Once more after the first pass: what other threads handed in wakes the selector first.
        for _ in range(2):
            self._loop.run_forever()

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        """Run a coroutine to its end; it must not have to wait for the clock."""
        return self._loop.run_until_complete(coroutine)

    def drive(self) -> None:
        """Run until idle; inside this loop nothing, it runs."""
        if not self.current:
            self.run_until_idle()

    def stop(self) -> None:
        """Cancel what is left and close the loop."""
        if self._loop.is_closed():
            return
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self.run_until_idle()
        self._loop.close()


class Stage:
    """A clock, an executor and a loop that belong together, and the two moves a test makes with them.

    ``parts`` are the arguments for a ``TaskManager``. Nothing runs between the moves, so a test can
    look at each state on the way. A ``with`` block over the manager waits at its end for every task:
    call ``run`` first, or ``shutdown("cancel_pending")``.

    Examples
    --------
    >>> from wiseflow_nb.tasks import TaskManager
    >>> stage = Stage()
    >>> with TaskManager(**stage.parts) as tasks:
    ...     task = tasks.options(timeout=30.0).submit(asyncio.sleep, 3600)
    ...     stage.run()
    ...     running = str(task.state)
    ...     stage.advance(30.0)
    ...     running, str(task.state)
    ('running', 'timed_out')
    """

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.executor = ManualExecutor()
        self.loop = ManualLoop(self.clock)

    @property
    def parts(self) -> dict[str, Any]:
        """``pool``, ``clock`` and ``loop`` for a ``TaskManager``."""
        return {"pool": self.executor, "clock": self.clock, "loop": self.loop}

    def run(self) -> None:
        """Run calls and coroutines, those that become ready meanwhile included, until all have to wait."""
        while True:
            self.loop.run_until_idle()
            if not self.executor.run_all():
                return

    def advance(self, seconds: float) -> None:
        """Move the clock, then run what that made possible."""
        self.clock.advance(seconds)
        self.run()
