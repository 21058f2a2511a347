"""Tells people of alerts: logged, published, handed to callbacks, in this order.

Two threads: one logs and publishes, the other calls, so that a callback that hangs holds up the other
callbacks and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from wiseflow_nb.clock import Clock
from wiseflow_nb.errors import UsageError
from wiseflow_nb.events import EventBus
from wiseflow_nb.lines import one_line
from wiseflow_nb.records import AlertTransition, EventRecord, Severity, to_json_dict

logger = logging.getLogger("wiseflow_nb.alerts")
AlertCallback = Callable[[AlertTransition], None]
QUEUE_LIMIT = 1000
_Waiting = queue.Queue[AlertTransition | None]
SLOW_CALLBACK_SECONDS = 1.0
#: Letters of an alert's message that are logged.
LONGEST_LOGGED = 1000
#: A callback that runs so long is told of when the next alert comes.
HANGING_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class CallbackStats:
    """How often a callback was called, how often it failed, and the seconds it took."""

    name: str
    calls: int = 0
    failures: int = 0
    seconds_total: float = 0.0
    longest_seconds: float = 0.0


class _Entry:
    """A callback and its book; callbacks need not be hashable."""

    __slots__ = ("callback", "stats")

    def __init__(self, callback: AlertCallback) -> None:
        self.callback = callback
        self.stats = CallbackStats(getattr(callback, "__qualname__", type(callback).__name__))


class Announcer:
    """Two bounded queues of transitions, and the threads that work them off."""

    def __init__(self, bus: EventBus, clock: Clock) -> None:
        self._bus, self._clock = bus, clock
        # The limit is kept at their door: the end of the queue always fits.
        self._queue: _Waiting = queue.Queue()
        self._calls: _Waiting = queue.Queue()
        self._lock = threading.Lock()
        self._entries: tuple[_Entry, ...] = ()
        self._threads: tuple[threading.Thread, ...] = ()
        #: The callback that runs now, and since when (monotonic seconds).
        self._running: tuple[str, float] | None = None
        self._hang_told = False
        #: Called after the others: what the library itself does about an alert.
        self.last: AlertCallback | None = None
        self.dropped = 0
        self.failures = 0

    def stats(self) -> tuple[CallbackStats, ...]:
        """One record a callback, in the order in which they are called."""
        return tuple(entry.stats for entry in self._entries)

    def add(self, callback: AlertCallback) -> None:
        """Call this for every transition, too.

        Raises
        ------
        UsageError
            If it cannot be called.
        """
        if not callable(callback):
            raise UsageError(f"alert callback {callback!r} cannot be called; give a function of the transition")
        with self._lock:
            self._entries = (*self._entries, _Entry(callback))

    def remove(self, callback: AlertCallback) -> None:
        """Stop calling this; an unknown one is no error."""
        with self._lock:
            # Equality, not identity: each look at a bound method gives a new object.
            self._entries = tuple(entry for entry in self._entries if entry.callback != callback)

    def deliver(self, transition: AlertTransition) -> None:
        """Queue a transition; never blocks."""
        with self._lock:
            self._put(self._queue, transition)

    def _put(self, waiting: _Waiting, transition: AlertTransition) -> None:
        if waiting.qsize() < QUEUE_LIMIT:
            waiting.put_nowait(transition)
        else:
            self.dropped += 1

    def start(self) -> None:
        """Start the threads; what an earlier one that hangs has not come to is theirs."""
        with self._lock:
            announcer, caller = self._threads or (None, None)
            self._queue, calls = _taken_over(self._queue, announcer), _taken_over(self._calls, caller)
            if calls is not self._calls:
                self._calls, self._running, self._hang_told = calls, None, False
            self._threads = (
                threading.Thread(target=self._announce, args=(self._queue,), name="wiseflow-alerts", daemon=True),
                threading.Thread(target=self._call_all, args=(calls,), name="wiseflow-callbacks", daemon=True),
            )
        for thread in self._threads:
            thread.start()

    def stop(self, timeout: float) -> None:
        """Work off what is queued, for ``timeout`` seconds a queue at most, and end the threads."""
        for thread, waiting in zip(self._threads, (self._queue, self._calls), strict=False):
            waiting.put_nowait(None)
            if thread is not threading.current_thread():
                thread.join(timeout)

    def after_fork(self) -> None:
        """In a forked child nobody works the queues off, and what waited in them was the parent's."""
        self._queue, self._calls = queue.Queue(), queue.Queue()
        self._lock, self._threads = threading.Lock(), ()
        self._running, self._hang_told = None, False

    def _announce(self, waiting: _Waiting) -> None:
        while (transition := waiting.get()) is not None:
            if not transition.silenced:
                _log(transition)
            event = EventRecord(transition.time_seconds, "alert", transition.message, to_json_dict(transition))
            self._bus.publish(event)
            if not transition.silenced:
                with self._lock:
                    self._put(self._calls, transition)
            self._look_for_hang()

    def _look_for_hang(self) -> None:
        running, now = self._running, self._clock.monotonic()
        if running is None or now - running[1] <= HANGING_SECONDS:
            self._hang_told = False
        elif not self._hang_told:
            self._hang_told = True
            message = f"alert callback {running[0]} has run for {now - running[1]:.0f} s; the others wait for it"
            logger.error("%s", message)
            self._bus.publish(EventRecord(self._clock.time(), "callback_hangs", message))

    def _call_all(self, waiting: _Waiting) -> None:
        while (transition := waiting.get()) is not None:
            for entry in (*self._entries, *(() if self.last is None else (_Entry(self.last),))):
                self._now_runs(waiting, (entry.stats.name, self._clock.monotonic()))
                self._call(entry, transition)
                self._now_runs(waiting, None)

    def _now_runs(self, waiting: _Waiting, running: tuple[str, float] | None) -> None:
        with self._lock:
            # One that was left behind has a successor, whose callback this tells.
            if waiting is self._calls:
                self._running = running

    def _call(self, entry: _Entry, transition: AlertTransition) -> None:
        started, failed = self._clock.monotonic(), False
        try:
            entry.callback(transition)
        except BaseException:
            failed = True
            logger.exception("an alert callback failed")
        took = self._clock.monotonic() - started
        with self._lock:
            # One that was left behind can come back beside its successor.
            self.failures += failed
            told = entry.stats
            entry.stats = replace(
                told,
                calls=told.calls + 1,
                failures=told.failures + failed,
                seconds_total=told.seconds_total + took,
                longest_seconds=max(told.longest_seconds, took),
            )
        if took > SLOW_CALLBACK_SECONDS:
            logger.warning("an alert callback took %.1f s; later alerts waited for it", took)


def _taken_over(waiting: _Waiting, thread: threading.Thread | None) -> _Waiting:
    """The queue for a new thread: with what waits, but without the end that was meant for another one."""
    if thread is None or not thread.is_alive():
        return waiting
    fresh: _Waiting = queue.Queue()
    with contextlib.suppress(queue.Empty):
        while True:
            if (transition := waiting.get_nowait()) is not None:
                fresh.put_nowait(transition)
    waiting.put_nowait(None)
    return fresh


def _log(transition: AlertTransition) -> None:
    # A rule's name and its words are the user's: they must not forge lines, nor drive the terminal.
    message = one_line(transition.message, LONGEST_LOGGED)
    if transition.kind == "resolved":
        logger.info("%s", message)
    elif transition.severity is Severity.CRITICAL:
        logger.error("%s", message)
    else:
        logger.warning("%s", message)
