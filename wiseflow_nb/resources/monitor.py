"""``ResourceMonitor``: the newest samples, their history, and the alerts with their callbacks."""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import os
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from wiseflow_nb.clock import SYSTEM_CLOCK, Clock
from wiseflow_nb.config import Settings, load_settings
from wiseflow_nb.events import EventBus
from wiseflow_nb.records import (
    NAN,
    SAMPLE_COLUMNS,
    AlertTransition,
    AlertView,
    EventRecord,
    Limits,
    Sample,
    Severity,
    to_json_dict,
)
from wiseflow_nb.resources._alerts import AlertEngine, builtin_rules
from wiseflow_nb.resources._probe import Probe
from wiseflow_nb.resources._ring import RingReader
from wiseflow_nb.resources._schedule import Schedule, is_gap
from wiseflow_nb.sizing import SizingDecision, SizingInput, SizingPast, decide_workers

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from wiseflow_nb.resources._history import Moment

logger = logging.getLogger("wiseflow_nb.alerts")
AlertCallback = Callable[[AlertTransition], None]
KEPT_SAMPLES = 3600
QUEUE_LIMIT = 1000
SLOW_CALLBACK_SECONDS = 1.0


class SampleSource(Protocol):
    """What the monitor needs of a probe."""

    @property
    def limits(self) -> Limits: ...

    def read(
        self,
        *,
        time_seconds: float,
        monotonic_seconds: float,
        interval_seconds: float,
        gap: bool,
        settings_revision: int = 0,
    ) -> Sample: ...

    def top_processes(self, count: int = 3) -> tuple[tuple[int, str, float, float], ...]: ...

    def take_events(self) -> list[EventRecord]: ...

    def close(self) -> None: ...


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
        self._own_probe = probe is None
        self._probe: SampleSource = (
            Probe(os.getpid() if pid is None else pid, self._settings.disk_path) if probe is None else probe
        )
        self._probe_lock = threading.Lock()
        self._ring_path = ring_path
        self._ring: RingReader | None = None
        self._kept: collections.deque[Sample] = collections.deque(maxlen=KEPT_SAMPLES)
        self._engine = AlertEngine(self._rules())
        self._open: dict[str, AlertView] = {}
        self.bus = EventBus() if bus is None else bus
        self._callbacks: tuple[AlertCallback, ...] = ()
        self._callbacks_lock = threading.Lock()
        self.after_callbacks: AlertCallback | None = None
        self.callback_failures = 0
        self.dropped_transitions = 0
        self.sampler_failures = 0
        self._sampler_fails = False
        self._queue: queue.Queue[AlertTransition | None] = queue.Queue(QUEUE_LIMIT)
        self._wake = threading.Event()
        self._running = False
        self._threads: list[threading.Thread] = []
        self._sizing_past = SizingPast()
        self._last_target = 0

    def start(self) -> ResourceMonitor:
        """Start sampling (alone) and delivering; a second call does nothing."""
        if not self._running:
            self._running = True
            self._wake.clear()
            targets = [("wiseflow-alerts", self._dispatch)]
            if self._ring_path is None:
                targets.append(("wiseflow-sampler", self._sample_loop))
            self._threads = [threading.Thread(target=target, name=name, daemon=True) for name, target in targets]
            for thread in self._threads:
                thread.start()
        return self

    def stop(self, timeout: float = 2.0) -> None:
        """Stop sampling, resolve what fires, deliver what waits; a second call does nothing.

        Each step waits ``timeout`` seconds at most: a file system or a callback that hangs is left behind.
        """
        if not self._running:
            return
        self._running = False
        self._wake.set()
        for thread in self._threads[1:]:
            thread.join(timeout)
        if self._ring_path is None:
            for transition in self._engine.finish(self._clock.time()):
                self.deliver(transition)
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout)
        if self._threads[0] is not threading.current_thread():
            self._threads[0].join(timeout)
        if self._probe_lock.acquire(timeout=timeout):
            self._probe.close()
            self._probe_lock.release()
        else:
            logger.warning("a reading still hangs at stop; its thread is left behind")
        if self._ring is not None:
            self._ring.close()
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
    def alerts(self) -> tuple[AlertView, ...]:
        """The alerts that are open now."""
        return tuple(self._open.values())

    def sample_now(self) -> Sample:
        """Read now, on this thread; the reading is returned and not kept."""
        with self._probe_lock:
            return self._probe.read(
                time_seconds=self._clock.time(),
                monotonic_seconds=self._clock.monotonic(),
                interval_seconds=NAN,
                gap=False,
            )

    def latest(self) -> Sample | None:
        """The newest sample that was taken on schedule, or None before the first."""
        if self._ring_path is None:
            return self._kept[-1] if self._kept else None
        ring = self._reader()
        return None if ring is None else ring.latest()

    def rows(self, since_seconds: float = -math.inf) -> np.ndarray:
        """The newest samples (up to 3,600) as an array (n, columns) of float64; a copy."""
        import numpy as np

        if self._ring_path is None:
            rows = np.array(list(self._kept), dtype="float64").reshape(-1, len(SAMPLE_COLUMNS))
        else:
            ring = self._reader()
            rows = np.empty((0, len(SAMPLE_COLUMNS))) if ring is None else ring.read(0)[1]
        return rows[rows[:, 0] >= since_seconds]

    def history(self, *, since: Moment | None = None, until: Moment | None = None, rates: bool = False) -> pd.DataFrame:
        """The newest samples as a DataFrame with a UTC index; ``rates`` adds changes per second.

        ``since`` and ``until`` are seconds since the epoch, texts or dates (UTC without a zone).
        """
        from wiseflow_nb.resources._history import frame

        attrs = {"limit_source": self.limits.limit_source}
        return frame(self.rows(), rates=rates, since=since, until=until, attrs=attrs)

    def add_callback(self, callback: AlertCallback) -> None:
        """Call ``callback(transition)`` for every alert transition, on a thread of the monitor's own."""
        with self._callbacks_lock:
            self._callbacks = (*self._callbacks, callback)

    def remove_callback(self, callback: AlertCallback) -> None:
        """Stop calling a callback; an unknown one is no error."""
        with self._callbacks_lock:
            # Equality, not identity: each look at a bound method gives a new object.
            self._callbacks = tuple(item for item in self._callbacks if item != callback)

    def deliver(self, transition: AlertTransition) -> None:
        """Take an alert transition: it is logged, published, given to the callbacks, in this order."""
        try:
            self._queue.put_nowait(transition)
        except queue.Full:
            self.dropped_transitions += 1

    def apply_settings(self, settings: Settings) -> None:
        """Take new settings, from the next sample on."""
        self._settings = settings
        if self._own_probe and isinstance(self._probe, Probe):
            self._probe.disk_path = settings.disk_path
        if self._ring_path is None:
            with self._probe_lock:
                resolved = self._engine.replace_rules(self._rules(), self._clock.time())
            for transition in resolved:
                self.deliver(transition)
            self._wake.set()

    def calculate_optimal_thread_count(self, pending: int | None = None, workers: int | None = None) -> SizingDecision:
        """Return how many workers the resources allow now (``.target``) and why (``.reason``).

        Parameters
        ----------
        pending
            Work that waits or runs; default: as much as the bounds allow.
        workers
            Workers there are now; default: what the last call answered.
        """
        settings, sample = self._settings, self.latest() or Sample()
        low, high = settings.min_thread_workers, settings.max_thread_workers
        current = workers if workers is not None else (self._last_target or low)
        # The recorder looks at the limits again and again; this process' own look may be old.
        cores = sample.cpu_limit_cores
        decision = decide_workers(
            SizingInput(
                cpu_limit_cores=self.limits.cpu_limit_cores if math.isnan(cores) else cores,
                cpu_utilization_ratio=sample.cpu_utilization_ratio,
                memory_utilization_ratio=sample.memory_utilization_ratio,
                cpu_warning_ratio=settings.warning_ratio("cpu"),
                cpu_critical_ratio=settings.critical_ratio("cpu"),
                memory_warning_ratio=settings.warning_ratio("memory"),
                memory_critical_ratio=settings.critical_ratio("memory"),
                workers=current,
                pending=high if pending is None else pending,
                min_workers=low,
                max_workers=high,
                now_seconds=self._clock.monotonic(),
            ),
            self._sizing_past,
        )
        self._sizing_past = decision.past
        self._last_target = decision.target
        return decision

    def _rules(self) -> tuple[Any, ...]:
        settings = self._settings
        return builtin_rules(
            settings.thresholds(), settings.alert_for_seconds, settings.alert_keep_seconds, settings.alert_clear_factor
        )

    def _reader(self) -> RingReader | None:
        if self._ring is None and self._ring_path is not None:
            # Before the recorder made it, and after it was pruned, there is no ring: no sample yet.
            with contextlib.suppress(OSError, ValueError):
                self._ring = RingReader(self._ring_path)
        return self._ring

    def _sample_loop(self) -> None:
        clock = self._clock
        schedule = Schedule(clock.monotonic(), self._settings.resource_check_interval)
        last, expected = NAN, 0.0
        while self._running:
            now = clock.monotonic()
            interval = self._settings.resource_check_interval
            schedule.set_interval(interval, now)
            expected = max(expected, interval)
            if now < schedule.deadline:
                if clock.wait(self._wake, schedule.deadline - now):
                    self._wake.clear()
                continue
            measured = now - last
            try:
                self._take(now, measured, measured == measured and is_gap(measured, expected))
            except Exception as error:  # a user's probe: told once until it works again
                self.sampler_failures += 1
                if not self._sampler_fails:
                    logger.exception("no sample could be taken; trying on")
                    self._say_failing(error)
            else:
                self._sampler_fails = False
                last, expected = now, interval
            schedule.advance(clock.monotonic())

    def _take(self, now: float, interval: float, gap: bool) -> None:
        with self._probe_lock:
            sample = self._probe.read(
                time_seconds=self._clock.time(), monotonic_seconds=now, interval_seconds=interval, gap=gap
            )
            if not self._running:
                return  # it hung while the monitor stopped; all alerts are resolved by now
            transitions = self._engine.observe(sample, self._probe.top_processes)
            events = self._probe.take_events()
        self._kept.append(sample)
        for transition in transitions:
            self.deliver(transition)
        for event in events:
            self.bus.publish(event)

    def _say_failing(self, error: Exception) -> None:
        self._sampler_fails = True
        message = f"no sample could be taken: {type(error).__name__}: {error}"
        self.bus.publish(EventRecord(self._clock.time(), "sampler_failed", message))

    def _dispatch(self) -> None:
        while (transition := self._queue.get()) is not None:
            self._log(transition)
            self._remember(transition)
            event = EventRecord(transition.time_seconds, "alert", transition.message, to_json_dict(transition))
            self.bus.publish(event)
            for callback in self._callbacks:
                self._call(callback, transition)
            if self.after_callbacks is not None:
                self._call(self.after_callbacks, transition)

    def _log(self, transition: AlertTransition) -> None:
        if transition.kind == "resolved":
            logger.info("%s", transition.message)
        elif transition.severity is Severity.CRITICAL:
            logger.error("%s", transition.message)
        else:
            logger.warning("%s", transition.message)

    def _remember(self, item: AlertTransition) -> None:
        if item.kind == "resolved":
            self._open.pop(item.alert_id, None)
            return
        self._open[item.alert_id] = AlertView(
            alert_id=item.alert_id,
            rule=item.rule,
            resource=item.resource,
            severity=item.severity,
            state=item.to_state,
            value=item.value,
            threshold=item.threshold,
            peak=item.peak,
            started_seconds=item.started_seconds,
            resolved_seconds=NAN,
            message=item.message,
        )

    def _call(self, callback: AlertCallback, transition: AlertTransition) -> None:
        started = self._clock.monotonic()
        try:
            callback(transition)
        except Exception:  # user code: counted here, logged with its traceback
            self.callback_failures += 1
            logger.exception("an alert callback failed")
        took = self._clock.monotonic() - started
        if took > SLOW_CALLBACK_SECONDS:
            logger.warning("an alert callback took %.1f s; later alerts waited for it", took)
