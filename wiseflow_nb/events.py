"""A small synchronous event bus: records in, callbacks out, in order of subscription.

It has no thread. Whoever publishes runs the subscribers, each behind its own guard: a failing one
is counted and logged, and the others still hear the event.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from wiseflow_nb.records import EventRecord

logger = logging.getLogger("wiseflow_nb.events")
Subscriber = Callable[[EventRecord], None]


class EventBus:
    """Publish ``EventRecord`` to subscribers.

    Examples
    --------
    >>> bus, seen = EventBus(), []
    >>> unsubscribe = bus.subscribe(seen.append)
    >>> bus.publish(EventRecord(0.0, "note", "hello"))
    >>> unsubscribe(); bus.publish(EventRecord(1.0, "note", "unheard"))
    >>> [event.message for event in seen]
    ['hello']
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscribers: tuple[Subscriber, ...] = ()
        self.failures = 0

    def after_fork(self) -> None:
        """In a forked child: a thread that is not there may have held the lock."""
        self._lock = threading.Lock()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Add a subscriber; call what is returned to remove it (calling twice does no harm)."""
        with self._lock:
            self._subscribers = (*self._subscribers, subscriber)

        def unsubscribe() -> None:
            with self._lock:
                self._subscribers = tuple(item for item in self._subscribers if item is not subscriber)

        return unsubscribe

    def publish(self, event: EventRecord) -> None:
        """Hand the event to every subscriber, in order, on this thread."""
        for subscriber in self._subscribers:
            try:
                subscriber(event)
            except BaseException:
                with self._lock:
                    self.failures += 1
                logger.exception("an event subscriber failed on %r", event.kind)
