"""Tells people of alerts: logged, published, handed to callbacks, in this order, on a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from wiseflow_nb.clock import Clock
from wiseflow_nb.events import EventBus
from wiseflow_nb.records import AlertTransition, EventRecord, Severity, to_json_dict

logger = logging.getLogger("wiseflow_nb.alerts")
AlertCallback = Callable[[AlertTransition], None]
QUEUE_LIMIT = 1000
SLOW_CALLBACK_SECONDS = 1.0


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
    """A bounded queue of transitions and the thread that works it off."""

    def __init__(self, bus: EventBus, clock: Clock) -> None:
        self._bus, self._clock = bus, clock
        self._queue: queue.Queue[AlertTransition | None] = queue.Queue(QUEUE_LIMIT)
        self._lock = threading.Lock()
        self._entries: tuple[_Entry, ...] = ()
        self._thread: threading.Thread | None = None
        #: Called after the others: what the library itself does about an alert.
        self.last: AlertCallback | None = None
        self.dropped = 0
        self.failures = 0

    def stats(self) -> tuple[CallbackStats, ...]:
        """One record a callback, in the order in which they are called."""
        return tuple(entry.stats for entry in self._entries)

    def add(self, callback: AlertCallback) -> None:
        """Call this for every transition, too."""
        with self._lock:
            self._entries = (*self._entries, _Entry(callback))

    def remove(self, callback: AlertCallback) -> None:
        """Stop calling this; an unknown one is no error."""
        with self._lock:
            # Equality, not identity: each look at a bound method gives a new object.
            self._entries = tuple(entry for entry in self._entries if entry.callback != callback)

    def deliver(self, transition: AlertTransition) -> None:
        """Queue a transition; never blocks."""
        try:
            self._queue.put_nowait(transition)
        except queue.Full:
            self.dropped += 1

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run, name="wiseflow-alerts", daemon=True)
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Work off what is queued, for ``timeout`` seconds at most, and end the thread."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while (transition := self._queue.get()) is not None:
            if not transition.silenced:
                _log(transition)
            event = EventRecord(transition.time_seconds, "alert", transition.message, to_json_dict(transition))
            self._bus.publish(event)
            if transition.silenced:
                continue
            for entry in (*self._entries, *(() if self.last is None else (_Entry(self.last),))):
                self._call(entry, transition)

    def _call(self, entry: _Entry, transition: AlertTransition) -> None:
        started, failed = self._clock.monotonic(), False
        try:
            entry.callback(transition)
        except Exception:  # user code: counted here, logged with its traceback
            failed = True
            self.failures += 1
            logger.exception("an alert callback failed")
        took = self._clock.monotonic() - started
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


def _log(transition: AlertTransition) -> None:
    if transition.kind == "resolved":
        logger.info("%s", transition.message)
    elif transition.severity is Severity.CRITICAL:
        logger.error("%s", transition.message)
    else:
        logger.warning("%s", transition.message)
