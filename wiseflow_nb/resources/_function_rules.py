"""Rules whose value comes from a function of the user's: judged in this process, each on a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from wiseflow_nb.clock import Clock
from wiseflow_nb.lines import one_line
from wiseflow_nb.records import NAN, AlertTransition, AlertView, EventRecord, Sample
from wiseflow_nb.resources._alerts import AlertEngine
from wiseflow_nb.resources._rules import AlertRule

logger = logging.getLogger("wiseflow_nb.alerts")
#: A sample to a value, or to a value and a few words about it; NaN is "cannot be told".
Watcher = Callable[[Sample], float | tuple[float, str]]
Key = tuple[str, str]
#: How often is looked for a new sample, in seconds.
LOOK_SECONDS = 1.0
#: A function that runs so long is told of; its rule is unknown until it returns.
HANGING_SECONDS = 30.0


class _Watch:
    """One rule, its function, and the thread that runs it; there is none before the first sample."""

    __slots__ = ("failing", "hangs", "inbox", "rule", "since", "thread", "watcher")

    def __init__(self, rule: AlertRule, watcher: Watcher) -> None:
        self.rule, self.watcher = rule, watcher
        self.failing = self.hangs = False
        #: The sample to judge next, or None: end.
        self.inbox: queue.SimpleQueue[Sample | None] = queue.SimpleQueue()
        #: Since when it runs (monotonic seconds); None while it does not.
        self.since: float | None = None
        self.thread: threading.Thread | None = None

    @property
    def key(self) -> Key:
        return self.rule.name, self.rule.resource

    def anew(self) -> _Watch:
        """The same rule with nothing under way: what still runs is left behind, its answer unheard."""
        self.inbox.put(None)
        return _Watch(self.rule, self.watcher)


class FunctionRules:
    """Judge functions of the newest sample; there are threads only while there is such a rule.

    One thread looks for samples and hands them out. A function that is slow or hangs holds up its own
    rule alone: it gets the next sample when it has returned.

    Parameters
    ----------
    latest
        The newest sample, or None.
    clock
        What durations go by.
    on_alert, on_event
        Called on the threads; they must return at once.
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
        self._watches: dict[Key, _Watch] = {}
        self._engine = AlertEngine()
        #: How often a function raised, and how often one hung.
        self.failures = self.hangs = 0
        self._seen = NAN
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._running = False

    def add(self, rule: AlertRule, watcher: Watcher) -> None:
        """Judge one more; it takes the place of one with its name and resource."""
        watch = _Watch(rule, watcher)
        with self._lock:
            self._end(watch.key)
            self._watches[watch.key] = watch
            self._engine.add_rule(rule, self._clock.time())
        if self._running:
            self._ensure_thread()

    def change(self, rule: AlertRule) -> None:
        """Go by other levels or durations for a rule that is there; its function stays."""
        with self._lock:
            watch = self._watches.get((rule.name, rule.resource))
            if watch is not None:
                watch.rule = rule
                self._judge_by_these_rules()

    def keys(self) -> tuple[Key, ...]:
        """Name and resource of each rule."""
        with self._lock:
            return tuple(self._watches)

    def discard(self, key: Key) -> None:
        """Forget one rule, if it is there; an open alert is resolved."""
        with self._lock:
            if key not in self._watches:
                return
            self._end(key)
            resolved = self._judge_by_these_rules()
        self._tell(resolved)

    def remove(self, name: str) -> bool:
        """Forget the rules of a name; an open alert is resolved. Return whether there was one."""
        with self._lock:
            gone = [key for key in self._watches if key[0] == name]
            for key in gone:
                self._end(key)
            resolved = self._judge_by_these_rules()
        self._tell(resolved)
        return bool(gone)

    def acknowledge(self, alert_id: str) -> bool:
        """Acknowledge an open alert of these rules."""
        with self._lock:
            return self._engine.acknowledge(alert_id)

    def silence(self, alert_id: str, until_seconds: float) -> bool:
        """Silence an open alert of these rules; see ``Sampler.silence``."""
        until = self._clock.monotonic() + (until_seconds - self._clock.time())
        with self._lock:
            return self._engine.silence(alert_id, until)

    def active(self) -> tuple[AlertView, ...]:
        """The open alerts of these rules."""
        with self._lock:
            return self._engine.active()

    def start(self) -> None:
        """Begin to judge."""
        self._running = True
        self._wake.clear()
        if self._watches:
            self._ensure_thread()

    def stop(self, timeout: float) -> None:
        """Stop judging and resolve every open alert; a function that hangs is left behind."""
        self._running = False
        self._wake.set()
        thread, self._thread = self._thread, None
        with self._lock:
            threads = [thread, *(watch.thread for watch in self._watches.values())]
            self._watches = {key: watch.anew() for key, watch in self._watches.items()}
        for one in threads:
            if one is not None and one is not threading.current_thread():
                one.join(timeout)
                # All of them together have so long.
                timeout = 0.0 if one.is_alive() else timeout
        with self._lock:
            resolved = self._engine.finish(self._clock.time())
        self._tell(resolved)

    def after_fork(self) -> None:
        """In a forked child nothing is judged, and every alert was the parent's."""
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._thread, self._running = None, False
        self._watches = {key: _Watch(watch.rule, watch.watcher) for key, watch in self._watches.items()}
        self._engine = AlertEngine(watch.rule for watch in self._watches.values())

    def _end(self, key: Key) -> None:
        gone = self._watches.pop(key, None)
        if gone is not None:
            gone.inbox.put(None)

    def _judge_by_these_rules(self) -> list[AlertTransition]:
        return self._engine.replace_rules([watch.rule for watch in self._watches.values()], self._clock.time())

    def _ensure_thread(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = None
                thread = threading.Thread(target=self._run, name="wiseflow-rules", daemon=True)
                thread.start()
                self._thread = thread

    def _run(self) -> None:
        while self._running and self._watches:
            sample = self._latest()
            fresh = sample is not None and sample.monotonic_seconds != self._seen
            if sample is not None:
                self._seen = sample.monotonic_seconds
            with self._lock:
                hanging = [watch for watch in self._watches.values() if self._looks_hung(watch)]
                idle: list[tuple[_Watch, str]] = []
                if sample is not None and fresh and self._running:
                    told = [(watch, self._hand(watch, sample)) for watch in self._watches.values()]
                    idle = [(watch, why) for watch, why in told if why and self._looks_idle(watch)]
            for watch in hanging:
                self._tell_hang(watch)
            for watch, why in idle:
                self._tell_idle(watch, why)
            self._clock.wait(self._wake, LOOK_SECONDS)

    def _hand(self, watch: _Watch, sample: Sample) -> str:
        """Have a sample judged; return why that cannot be, empty where it can."""
        if watch.since is not None:
            return ""  # it still runs
        if watch.thread is None:
            name = f"wiseflow-rule-{one_line(watch.rule.name)}"
            thread = threading.Thread(target=self._work, args=(watch,), name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads; the next sample is another try
                return str(error)
            watch.thread = thread
        watch.since = self._clock.monotonic()
        watch.inbox.put(sample)
        return ""

    def _work(self, watch: _Watch) -> None:
        while (sample := watch.inbox.get()) is not None:
            value, detail = self._value(watch, sample)
            with self._lock:
                # Removed, replaced or stopped meanwhile: nobody asks any more.
                if self._watches.get(watch.key) is not watch:
                    return
                watch.hangs, watch.since = False, None
                found = self._engine.judge(
                    {watch.key: value},
                    gap=bool(sample.gap),
                    now=sample.monotonic_seconds,
                    wall=sample.time_seconds,
                    details={watch.key: detail},
                )
            self._tell(found)

    def _value(self, watch: _Watch, sample: Sample) -> tuple[float, str]:
        try:
            told = watch.watcher(sample)
            value, detail = told if isinstance(told, tuple) else (told, "")
            value, detail = float(value), str(detail)
        except BaseException as error:
            with self._lock:
                self.failures += 1
            if not watch.failing:
                watch.failing = True
                logger.exception("the function of alert rule %r failed", watch.rule.name)
                message = f"the function of alert rule {watch.rule.name!r} failed: {type(error).__name__}: {error}"
                self._on_event(EventRecord(self._clock.time(), "rule_failed", message))
            return NAN, ""
        watch.failing = False
        return value, detail

    def _looks_hung(self, watch: _Watch) -> bool:
        """Whether it has just become too long; then its rule is unknown."""
        now = self._clock.monotonic()
        if watch.hangs or watch.since is None or now - watch.since < HANGING_SECONDS:
            return False
        watch.hangs = True
        self.hangs += 1
        self._engine.judge({watch.key: NAN}, now=now, wall=self._clock.time())
        return True

    def _looks_idle(self, watch: _Watch) -> bool:
        """Whether it is the first time that it has no thread; its rule is unknown without one."""
        first, watch.failing = not watch.failing, True
        self._engine.judge({watch.key: NAN}, now=self._clock.monotonic(), wall=self._clock.time())
        return first

    def _tell_idle(self, watch: _Watch, why: str) -> None:
        message = f"the function of alert rule {watch.rule.name!r} has no thread ({why}); it is tried with each sample"
        logger.error("%s", message)
        self._on_event(EventRecord(self._clock.time(), "rule_failed", message))

    def _tell_hang(self, watch: _Watch) -> None:
        message = (
            f"the function of alert rule {watch.rule.name!r} has run for {HANGING_SECONDS:g} s; "
            "the rule is judged again when it returns"
        )
        logger.error("%s", message)
        self._on_event(EventRecord(self._clock.time(), "rule_hangs", message))

    def _tell(self, transitions: list[AlertTransition]) -> None:
        for transition in transitions:
            self._on_alert(transition)
