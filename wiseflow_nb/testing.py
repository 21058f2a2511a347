"""Fakes for tests of code that uses wiseflow_nb: time that moves when told to, and more.

They are public: a test of a task with a time-out, or of an alert rule, needs no sleeping.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

from wiseflow_nb.errors import PoolClosedError
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
