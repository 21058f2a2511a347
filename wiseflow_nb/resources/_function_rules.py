"""Rules whose value comes from a function of the user's: judged in this process, on a thread of their own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from wiseflow_nb.clock import Clock
from wiseflow_nb.records import NAN, AlertTransition, AlertView, EventRecord, Sample
from wiseflow_nb.resources._alerts import AlertEngine
from wiseflow_nb.resources._rules import AlertRule

logger = logging.getLogger("wiseflow_nb.alerts")
#: A sample to a value, or to a value and a few words about it; NaN is "cannot be told".
Watcher = Callable[[Sample], float | tuple[float, str]]
#: How often the thread looks for a new sample, in seconds.
LOOK_SECONDS = 1.0


class FunctionRules:
    """Judge functions of the newest sample; the thread runs only while there is such a rule.

    Parameters
    ----------
    latest
        The newest sample, or None.
    clock
        What durations go by.
    on_alert, on_event
        Called on the thread; they must return at once.
    """

    def __init__(
        self,
        latest: Callable[[], Sample | None],
        clock: Clock,
        on_alert: Callable[[AlertTransition], None],
        on_event: Callable[[EventRecord], None],
    ) -> None:
        self._latest, self._clock = latest, clock
        self._on_alert, self._on_event = on_alert, on_event
        self._lock = threading.Lock()
        self._rules: dict[tuple[str, str], tuple[AlertRule, Watcher]] = {}
        self._engine = AlertEngine()
        self._failing: set[tuple[str, str]] = set()
        self.failures = 0
        self._seen = NAN
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._running = False

    def add(self, rule: AlertRule, watcher: Watcher) -> None:
        """Judge one more; it takes the place of one with its name and resource."""
        with self._lock:
            self._rules[(rule.name, rule.resource)] = (rule, watcher)
            self._engine.replace_rules([item for item, _ in self._rules.values()], self._clock.time())
        if self._running:
            self._ensure_thread()

    def keys(self) -> tuple[tuple[str, str], ...]:
        """Name and resource of each rule."""
        with self._lock:
            return tuple(self._rules)

    def discard(self, key: tuple[str, str]) -> None:
        """Forget one rule, if it is there; an open alert is resolved."""
        with self._lock:
            self._rules.pop(key, None)
            resolved = self._engine.replace_rules([item for item, _ in self._rules.values()], self._clock.time())
        self._tell(resolved)

    def remove(self, name: str) -> bool:
        """Forget the rules of a name; an open alert is resolved. Return whether there was one."""
        with self._lock:
            gone = [key for key in self._rules if key[0] == name]
            for key in gone:
                del self._rules[key]
            resolved = self._engine.replace_rules([item for item, _ in self._rules.values()], self._clock.time())
        self._tell(resolved)
        return bool(gone)

    def acknowledge(self, alert_id: str) -> bool:
        """Acknowledge an open alert of these rules."""
        with self._lock:
            return self._engine.acknowledge(alert_id)

    def silence(self, alert_id: str, until_seconds: float) -> bool:
        """Silence an open alert of these rules."""
        with self._lock:
            return self._engine.silence(alert_id, until_seconds)

    def active(self) -> tuple[AlertView, ...]:
        """The open alerts of these rules."""
        with self._lock:
            return self._engine.active()

    def start(self) -> None:
        """Begin to judge."""
        self._running = True
        self._wake.clear()
        if self._rules:
            self._ensure_thread()

    def stop(self, timeout: float) -> None:
        """Stop judging and resolve every open alert; a function that hangs is left behind."""
        self._running = False
        self._wake.set()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
        with self._lock:
            resolved = self._engine.finish(self._clock.time())
        self._tell(resolved)

    def judge(self, sample: Sample) -> None:
        """Judge one sample: the functions run here, each behind its own guard."""
        with self._lock:
            rules = dict(self._rules)
        values: dict[tuple[str, str], float] = {}
        details: dict[tuple[str, str], str] = {}
        for key, (rule, watcher) in rules.items():
            values[key], details[key] = self._value(key, rule, watcher, sample)
        with self._lock:
            if not self._running:
                return  # a function hung while all was stopped; every alert is resolved by now
            found = self._engine.judge(
                {key: value for key, value in values.items() if key in self._rules},
                gap=bool(sample.gap),
                now=sample.monotonic_seconds,
                wall=sample.time_seconds,
                details=details,
            )
        self._tell(found)

    def _value(self, key: tuple[str, str], rule: AlertRule, watcher: Watcher, sample: Sample) -> tuple[float, str]:
        try:
            told = watcher(sample)
            value, detail = told if isinstance(told, tuple) else (told, "")
            value, detail = float(value), str(detail)
        except BaseException as error:
            self.failures += 1
            if key not in self._failing:
                self._failing.add(key)
                logger.exception("the function of alert rule %r failed", rule.name)
                message = f"the function of alert rule {rule.name!r} failed: {type(error).__name__}: {error}"
                self._on_event(EventRecord(self._clock.time(), "rule_failed", message))
            return NAN, ""
        self._failing.discard(key)
        return value, detail

    def _tell(self, transitions: list[AlertTransition]) -> None:
        for transition in transitions:
            self._on_alert(transition)

    def _ensure_thread(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="wiseflow-rules", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while self._running and self._rules:
            sample = self._latest()
            if sample is not None and sample.monotonic_seconds != self._seen:
                self._seen = sample.monotonic_seconds
                self.judge(sample)
            self._clock.wait(self._wake, LOOK_SECONDS)
