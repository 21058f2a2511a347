"""``ResourceMonitor``: the newest samples, their history, and the alerts with their callbacks."""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from types import TracebackType
from typing import TYPE_CHECKING, Any

from wiseflow_nb.clock import SYSTEM_CLOCK, Clock
from wiseflow_nb.config import Settings, load_settings
from wiseflow_nb.errors import UsageError
from wiseflow_nb.events import EventBus
from wiseflow_nb.forks import tell_of_forks
from wiseflow_nb.records import (
    SAMPLE_COLUMNS,
    AlertState,
    AlertTransition,
    AlertView,
    EventRecord,
    Limits,
    Sample,
    Severity,
    alert_view,
)
from wiseflow_nb.resources._announcer import AlertCallback, Announcer, CallbackStats
from wiseflow_nb.resources._by_settings import UserRules, user_rule
from wiseflow_nb.resources._function_rules import FunctionRules, Watcher
from wiseflow_nb.resources._probe import PATIENCE_SECONDS, Probe
from wiseflow_nb.resources._ring import RingReader
from wiseflow_nb.resources._rules import FUNCTION, AlertRule
from wiseflow_nb.resources._sampler import Sampler, SampleSource, SamplingPlan
from wiseflow_nb.resources._shared import SharedProbe
from wiseflow_nb.resources._sizer import Sizer
from wiseflow_nb.sizing import SizingDecision

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from wiseflow_nb.resources._history import Moment, Resolution

logger = logging.getLogger("wiseflow_nb.resources")
KEPT_SAMPLES = 3600
KEPT_TRANSITIONS = 1000
_PACK = struct.Struct(f"{len(SAMPLE_COLUMNS)}d")
#: What another process told so short before its end may not have been committed.
UNSURE_SECONDS = 10.0


class ResourceMonitor:
    """Watch the resources that this process really has.

    Alone it samples on a thread of its own. With ``ring_path`` it follows the ring that a recorder
    writes, and alerts are handed to ``deliver``.

    Parameters
    ----------
    settings
        Default ``load_settings()``.
    pid
        The process to watch; default this one.
    probe
        Where samples come from; default a ``Probe`` of ``pid``.

    Notes
    -----
    In a forked child a monitor is stopped and knows no samples and no alerts: those were the parent's.
    It can be used and started there, and watches the child (with ``pid``, that process as before).
    One that follows a recorder's ring still shows what that records: the process that started it.

    Examples
    --------
    >>> with ResourceMonitor() as monitor:
    ...     sample = monitor.sample_now()
    >>> sample.memory_limit_bytes > 0
    True
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        pid: int | None = None,
        probe: SampleSource | None = None,
        clock: Clock = SYSTEM_CLOCK,
        ring_path: str | None = None,
        bus: EventBus | None = None,
    ) -> None:
        self._settings = load_settings() if settings is None else settings
        self._clock = clock
        make: Callable[[], Probe] = lambda: Probe(  # noqa: E731
            os.getpid() if pid is None else pid, self._settings.disk_path, patience=PATIENCE_SECONDS
        )
        self._probe = SharedProbe(make(), make) if probe is None else SharedProbe(probe, None)
        self._ring_path = ring_path
        self._ring: RingReader | None = None
        # Packed: a row of float objects takes four times as much.
        self._kept: collections.deque[bytes] = collections.deque(maxlen=KEPT_SAMPLES)
        self._newest: Sample | None = None
        self._transitions: collections.deque[AlertTransition] = collections.deque(maxlen=KEPT_TRANSITIONS)
        self._open: dict[str, AlertView] = {}
        self._lock = threading.Lock()  # over the two
        self.bus = EventBus() if bus is None else bus
        self._announcer = Announcer(self.bus, clock)
        # What the user gave; those with a function are judged in this process.
        self._rules = UserRules()
        self._plan_lock = threading.Lock()  # a plan is made and taken at once
        self._functions = FunctionRules(self.latest, clock, self._own_alert, self._own_event)
        #: Told of the alerts of rules with a function, before they are announced.
        self.on_own_alert: Callable[[AlertTransition], None] | None = None
        #: Told of what goes wrong with them, before it is published.
        self.on_own_event: Callable[[EventRecord], None] | None = None
        #: Told when the rules change, where another process judges them.
        self.on_rules_change: Callable[[], None] | None = None
        #: How often the probe raised.
        self.sampler_failures = 0
        self._sampler: Sampler | None = None
        self._busy = False
        self._running = False
        self._thread: threading.Thread | None = None
        self._sizer = Sizer()
        tell_of_forks(self)

    def after_fork(self) -> None:
        """Forget the parent's threads, locks, samples and alerts: this is its forked child."""
        self._probe.after_fork()
        self._functions.after_fork()
        self._rules.after_fork()
        self._announcer.after_fork()
        self._lock, self._plan_lock = threading.Lock(), threading.Lock()
        self._running, self._thread, self._sampler = False, None, None
        self._kept = collections.deque(maxlen=KEPT_SAMPLES)
        self._transitions = collections.deque(maxlen=KEPT_TRANSITIONS)
        self._newest, self._open = None, {}

    def start(self) -> ResourceMonitor:
        """Start sampling (alone; after a stop the first sample ends a gap) and delivering; a second call does nothing."""
        if not self._running:
            self._running = True
            self._announcer.start()
            if self._ring_path is None:
                sampler = self._sampler = Sampler(
                    self._probe,
                    self._keep,
                    self.plan(),
                    self._clock,
                    on_sample=lambda sample: None,
                    on_alert=self.deliver,
                    on_event=self.bus.publish,
                    on_error=self._failed,
                    # Nobody looked since the last stop.
                    resumed=self._newest is not None,
                )
                sampler.set_busy(self._busy)
                self._thread = threading.Thread(target=sampler.run, name="wiseflow-sampler", daemon=True)
                self._thread.start()
            self._functions.start()
        return self

    def stop(self, timeout: float = 2.0) -> None:
        """Stop sampling, resolve what fires, deliver what waits; a second call does nothing.

        Each step waits ``timeout`` seconds at most: a file system or a callback that hangs is left behind.
        """
        if not self._running:
            return
        self._running = False
        self._functions.stop(timeout)
        sampler, self._sampler = self._sampler, None
        if sampler is not None and self._thread is not None:
            sampler.stop()
            self._thread.join(timeout)
            self._thread = None
            sampler.finish()
        self._announcer.stop(timeout)
        if self._probe.lock.acquire(timeout=timeout):
            try:
                self._probe.close()
            except BaseException as error:  # noqa: BLE001  a user's probe
                self._failed("the probe cannot be closed", error, True)
            finally:
                self._probe.lock.release()
        else:
            logger.warning("a reading still hangs at stop; its thread is left behind")
        # Not closed: another thread may be reading it. It goes with its last user.
        self._ring = None

    def __enter__(self) -> ResourceMonitor:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def limits(self) -> Limits:
        """The effective limits and where they come from."""
        return self._probe.limits

    @property
    def probe_path(self) -> str:
        """Which way readings of this process come: ``linux files`` (fast), ``psutil``, or ``custom`` (a given probe)."""
        return self._probe.path

    @property
    def alerts(self) -> tuple[AlertView, ...]:
        """The alerts that are open now."""
        with self._lock:
            return tuple(self._open.values())

    def plan(self, revision: int = 0) -> SamplingPlan:
        """How often is sampled and what is judged, by the settings and the rules that were added."""
        return self._rules.plan(self._settings, self._functions.keys(), revision)

    def set_busy(self, busy: bool) -> None:
        """Alone: work runs (or none does any more), so sample at the busy interval (or the idle one)."""
        self._busy = busy
        if self._sampler is not None:
            self._sampler.set_busy(busy)

    def watch(self, seconds: float = 10.0) -> None:
        """Alone: somebody looks for so long, so sample at the busy interval."""
        if self._sampler is not None:
            self._sampler.watch(seconds)

    def sample_now(self) -> Sample:
        """Read now, on this thread; the reading is returned and not kept.

        Its rates are those since the newest reading, a scheduled one or another of these (NaN at the very
        first, and within 0.01 s, which the kernel counts CPU time in: over no time there is no rate). Scheduled samples are the same however often this is called, unless the probe is your own.
        """
        return self._probe.read_now(self._clock.time(), self._clock.monotonic(), rest=self._thread is None)

    def latest(self) -> Sample | None:
        """The newest sample that was taken on schedule, or None before the first."""
        if self._ring_path is None:
            return self._newest
        ring = self._reader()
        return None if ring is None else ring.latest()

    def rows(self, since_seconds: float = -math.inf) -> np.ndarray:
        """The newest samples (up to 3,600) as an array (n, columns) of float64; a copy."""
        import numpy as np

        if self._ring_path is None:
            rows = np.frombuffer(b"".join(list(self._kept)), dtype="float64").reshape(-1, len(SAMPLE_COLUMNS))
        else:
            ring = self._reader()
            rows = np.empty((0, len(SAMPLE_COLUMNS))) if ring is None else ring.read(0)[1]
        return rows[rows[:, 0] >= since_seconds]

    def history(
        self,
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        resolution: Resolution | None = None,
        rates: bool = False,
    ) -> pd.DataFrame:
        """The newest samples (up to 3,600) as a DataFrame with a UTC index; a copy.

        Parameters
        ----------
        since, until
            Seconds since the epoch, texts or dates (UTC without a zone); ``"-15min"`` is before the newest.
            ``"now"`` and ``"today"`` are refused: the day and the zone would be the reader's.
        resolution
            ``"raw"`` (default), or seconds that a row is to span: then with ``<column>_min`` and ``_max``.
        rates
            Add ``<counter>_per_second`` for each counter.

        Notes
        -----
        ``attrs`` tell ``host``, ``limit_source``, ``version``, ``probe_path``, ``resolution_seconds`` and ``tier``.
        The index never goes back; where the clock was set back, ``monotonic_seconds`` tells the order of
        the samples.

        Raises
        ------
        UsageError
            If a moment or the resolution is none.
        """
        import wiseflow_nb
        from wiseflow_nb.resources._history import raw_history

        attrs = {
            "host": socket.gethostname(),
            "limit_source": self.limits.limit_source,
            "version": wiseflow_nb.__version__,
            "probe_path": self.probe_path,
        }
        return raw_history(self.rows(), since=since, until=until, resolution=resolution, rates=rates, attrs=attrs)

    def summary(self, **options: Any) -> pd.DataFrame:
        """One row a column: min, mean, p95, max, last, seconds over its thresholds; ``options`` go to ``history``."""
        from wiseflow_nb.resources._analysis import summary

        return summary(self.history(**{"rates": True, **options}), self._settings.thresholds())

    def busiest(self, n: int = 10, *, by: str = "cpu_utilization_ratio", **options: Any) -> pd.DataFrame:
        """The ``n`` minutes in which a column was highest; ``options`` go to ``history``."""
        from wiseflow_nb.resources._analysis import busiest

        return busiest(self.history(**{"rates": True, **options}), n, by=by)

    def transitions(self) -> list[AlertTransition]:
        """The newest 1,000 alert transitions, oldest first."""
        with self._lock:
            return list(self._transitions)

    def alert_history(self) -> pd.DataFrame:
        """The newest 1,000 alert transitions: one row each, indexed by time (UTC)."""
        from wiseflow_nb.frames import alert_frame

        return alert_frame(self.transitions())

    def add_callback(self, callback: AlertCallback) -> None:
        """Call ``callback(transition)`` for every alert transition, on a thread of the monitor's own.

        A callback that raises is counted and logged, and the others are called all the same; one that
        is slow delays later alerts, not the sampling. Silenced transitions call nobody.
        """
        self._announcer.add(callback)

    def remove_callback(self, callback: AlertCallback) -> None:
        """Stop calling a callback; an unknown one is no error."""
        self._announcer.remove(callback)

    def callback_stats(self) -> tuple[CallbackStats, ...]:
        """Calls, failures and seconds of each callback."""
        return self._announcer.stats()

    @property
    def callback_failures(self) -> int:
        """How often a callback raised."""
        return self._announcer.failures

    @property
    def rule_failures(self) -> int:
        """How often the function of a rule raised."""
        return self._functions.failures

    @property
    def rule_hangs(self) -> int:
        """How often the function of a rule ran for more than 30 s; the other rules went on."""
        return self._functions.hangs

    @property
    def dropped_transitions(self) -> int:
        """Transitions that nobody was told of: the queue of 1,000 was full."""
        return self._announcer.dropped

    @property
    def after_callbacks(self) -> AlertCallback | None:
        """What is called with a transition after all callbacks."""
        return self._announcer.last

    @after_callbacks.setter
    def after_callbacks(self, callback: AlertCallback | None) -> None:
        self._announcer.last = callback

    def add_rule(
        self,
        name: str,
        watch: str | Watcher,
        *,
        warning: float,
        critical: float | None = None,
        resource: str = "",
        for_seconds: float | None = None,
        keep_seconds: float | None = None,
        clear_factor: float | None = None,
        repeat_seconds: float | None = None,
        unit: str = "",
        below: bool = False,
        phrase: str = "",
    ) -> AlertRule:
        """Add an alert rule; one with the same name and resource is replaced, a built-in one too.

        Parameters
        ----------
        name
            One word or phrase.
        watch
            A column of the samples, a rate such as ``network_receive_bytes_per_second``, one of the
            derived values (``memory_seconds_to_limit``, ...; see ``AlertRule``), or a function of the
            newest ``Sample`` that returns a number, or a number and a few words for the message. A
            column is judged on every sample by the recorder, also while this process is busy; a
            function runs here, on a thread of the rule's own, once a second at most; one that hangs
            is an event, and its rule is unknown until it returns.
        warning, critical
            From here on it is one, in the unit of the value; without ``critical`` it never gets worse
            than a warning.
        resource
            What it is about; default the name.
        for_seconds, keep_seconds, clear_factor, repeat_seconds
            Default: as the settings say (``ALERT_...``), also when they change later.
        unit
            What people read; default by the column's name.
        below
            The condition is "at or below".
        phrase
            The message's beginning, with ``{value}`` in it.

        Raises
        ------
        UsageError
            Names what does not fit; nothing was changed.

        Examples
        --------
        >>> monitor = ResourceMonitor()
        >>> monitor.add_rule("many files", "process_open_fds", warning=500, critical=900).unit
        'fds'
        >>> monitor.remove_rule("many files")
        True
        """
        column = watch if isinstance(watch, str) else FUNCTION
        if not isinstance(watch, str) and not callable(watch):
            raise UsageError(f"rule {name!r}: {watch!r} is neither a column's name nor a function; give one of them")
        made = user_rule(
            self._settings,
            name,
            column,
            warning=warning,
            critical=critical,
            resource=resource,
            unit=unit,
            below=below,
            phrase=phrase,
            for_seconds=for_seconds,
            keep_seconds=keep_seconds,
            clear_factor=clear_factor,
            repeat_seconds=repeat_seconds,
        )
        rule = made.rule
        self._rules.add(made)
        if isinstance(watch, str):
            self._functions.discard((rule.name, rule.resource))
        else:
            self._functions.add(rule, watch)
        # A rule with a function, too, takes the place of one that is judged elsewhere.
        self._rules_changed()
        return rule

    def remove_rule(self, name: str) -> bool:
        """Forget an added rule; its open alert is resolved. Return whether there was one of that name."""
        gone = self._rules.remove(name)
        self._functions.remove(name)
        if gone:
            self._rules_changed()
        return gone

    def acknowledge(self, alert_id: str) -> bool:
        """Mark an open alert that is judged in this process as seen: it is not repeated."""
        sampler = self._sampler
        seen = self._functions.acknowledge(alert_id) or (sampler is not None and sampler.acknowledge(alert_id))
        if seen:
            self.mark_acknowledged(alert_id)
        return seen

    def mark_acknowledged(self, alert_id: str) -> None:
        """Show an open alert as seen, wherever it is judged; one that has ended stays as it was."""
        with self._lock:
            if (view := self._open.get(alert_id)) is not None:
                self._open[alert_id] = replace(view, acknowledged=True)

    def silence(self, alert_id: str, seconds: float) -> bool:
        """Tell nobody of an open alert's ups and downs for so long (0: tell again); its end is always told.

        Raises
        ------
        UsageError
            If ``seconds`` is no finite number, or below 0.
        """
        given: Any = seconds
        if isinstance(given, bool) or not isinstance(given, Real) or not 0 <= float(given) < math.inf:
            raise UsageError(f"an alert cannot be silenced for {given!r} seconds; give a finite number from 0 on")
        until, sampler = self._clock.time() + float(given), self._sampler
        return self._functions.silence(alert_id, until) or (sampler is not None and sampler.silence(alert_id, until))

    def deliver(self, transition: AlertTransition) -> None:
        """Take an alert transition: it is logged, published, given to the callbacks, in this order."""
        self._remember(transition)
        self._announcer.deliver(transition)

    def close_alerts(self, reason: str) -> None:
        """End every open alert that another process judged, because it does so no more."""
        own = {view.alert_id for view in self._functions.active()}
        now = self._clock.time()
        known = self.transitions()
        last = {item.alert_id: item for item in known}
        if self.on_own_alert is not None:
            for item in known:
                # What it told last may not be on record; what is stays as it is.
                if now - item.time_seconds < UNSURE_SECONDS:
                    self.on_own_alert(item)
        for alert_id in [view.alert_id for view in self.alerts if view.alert_id not in own]:
            before = last[alert_id]
            self._own_alert(
                replace(
                    before,
                    kind="resolved",
                    from_state=before.to_state,
                    to_state=AlertState.UNKNOWN,
                    severity=Severity.NONE,
                    time_seconds=now,
                    message=f"{before.rule} is not known any more: {reason}",
                    top_processes=(),
                    silenced=False,
                )
            )

    def apply_settings(self, settings: Settings) -> None:
        """Take new settings, from the next sample on."""
        self._settings = settings
        self._probe.follow(settings.disk_path)
        for rule in self._rules.follow(settings):
            self._functions.change(rule)
        self._take_plan()

    def _rules_changed(self) -> None:
        if self._sampler is not None:
            self._sampler.soon(self._take_plan)
        if self.on_rules_change is not None:
            self.on_rules_change()

    def _take_plan(self) -> None:
        with self._plan_lock:
            if (sampler := self._sampler) is not None:
                sampler.configure(self.plan())

    def _own_alert(self, transition: AlertTransition) -> None:
        if self.on_own_alert is not None:
            self.on_own_alert(transition)
        self.deliver(transition)

    def calculate_optimal_thread_count(self, pending: int | None = None, workers: int | None = None) -> SizingDecision:
        """Return how many workers the resources allow now (``.target``) and why (``.reason``).

        Parameters
        ----------
        pending
            Work that waits or runs; default: as much as the bounds allow.
        workers
            Workers there are now; default: what the last call answered.
        """
        sample = self.latest() or Sample()
        if math.isnan(sample.cpu_limit_cores):
            # The recorder looks at the limits again and again; this process' own look may be old.
            sample = sample._replace(cpu_limit_cores=self.limits.cpu_limit_cores)
        return self._sizer.decide(self._settings, sample, pending, workers, self._clock.monotonic())

    def _reader(self) -> RingReader | None:
        # Any thread may put another one there meanwhile, or none.
        ring = self._ring
        if ring is not None and ring.was_replaced():
            # Deleted, and made again by the recorder. Another thread may still copy from the old one.
            ring = self._ring = None
        if ring is None and self._ring_path is not None:
            # Before the recorder made it, and after it was pruned, there is no ring: no sample yet.
            with contextlib.suppress(OSError, ValueError):
                ring = self._ring = RingReader(self._ring_path)
        return ring

    def _keep(self, sample: Sample) -> None:
        self._kept.append(_PACK.pack(*sample))
        self._newest = sample

    def _own_event(self, event: EventRecord) -> None:
        if self.on_own_event is not None:
            self.on_own_event(event)
        self.bus.publish(event)

    def _failed(self, what: str, error: BaseException, first: bool) -> None:
        self.sampler_failures += 1
        if first:
            # A user's probe: told once until it works again.
            logger.error("%s; trying on", what, exc_info=error)
            message = f"{what}: {type(error).__name__}: {error}"
            self.bus.publish(EventRecord(self._clock.time(), "sampler_failed", message))

    def _remember(self, item: AlertTransition) -> None:
        with self._lock:
            self._transitions.append(item)
            before = self._open.pop(item.alert_id, None)
            if item.kind != "resolved":
                seen = before is not None and before.acknowledged
                self._open[item.alert_id] = alert_view(item, acknowledged=seen)
