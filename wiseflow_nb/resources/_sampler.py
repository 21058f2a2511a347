"""The sampling loop: an absolute schedule at the cadence that is needed, the probe, the ring, the alert rules.

The same loop runs in the recorder's process, on its thread, and in a monitor that stands alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from wiseflow_nb.clock import Clock
from wiseflow_nb.records import NAN, AlertTransition, AlertView, EventRecord, Limits, Sample
from wiseflow_nb.resources._alerts import AlertEngine
from wiseflow_nb.resources._rules import AlertPlan, AlertRule, builtin_rules
from wiseflow_nb.resources._schedule import Schedule, is_gap

#: After the kernel's death: so often, for so long.
LAST_INTERVAL = 0.1
LAST_SECONDS = 2.0
#: What a probe may fail at.
NO_SAMPLE = "no sample could be taken"
NO_PROCESSES = "the largest processes could not be told"
NO_EVENTS = "what failed in the probe could not be told"

TopProcesses = tuple[tuple[int, str, float, float], ...]


class SampleSource(Protocol):
    """What the loop needs of a probe."""

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


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How often to sample and what to judge. Seconds.

    ``busy_interval`` holds while somebody works or watches, ``idle_interval`` else; one that was set
    explicitly is honoured always. ``rules`` are the user's, beside the built-in ones of ``alerts``;
    ``replaced`` are (name, resource) of built-in ones that a rule judged elsewhere stands in for.
    """

    idle_interval: float = 10.0
    busy_interval: float = 1.0
    interval_is_explicit: bool = False
    alerts: AlertPlan = field(default_factory=lambda: AlertPlan({}))
    rules: tuple[AlertRule, ...] = ()
    disk_path: str = "."
    revision: int = 0
    replaced: tuple[tuple[str, str], ...] = ()

    def interval(self, *, busy: bool, watched: bool) -> float:
        """The interval in force: explicit always, else the shortest that somebody needs.

        Examples
        --------
        >>> plan = SamplingPlan()
        >>> plan.interval(busy=False, watched=False), plan.interval(busy=False, watched=True)
        (10.0, 1.0)
        """
        if self.interval_is_explicit or not (busy or watched):
            return self.idle_interval
        return min(self.busy_interval, self.idle_interval)

    def all_rules(self) -> tuple[AlertRule, ...]:
        """The built-in rules and the user's; one of the user's replaces a built-in one of its name."""
        own = {(rule.name, rule.resource) for rule in self.rules} | set(self.replaced)
        built_in = (rule for rule in builtin_rules(self.alerts) if (rule.name, rule.resource) not in own)
        return (*built_in, *self.rules)


class Sampler:
    """Sample until stopped; other threads only set what the next turn reads.

    Parameters
    ----------
    probe
        Where samples come from. Its ``disk_path``, if it has one, follows the plan.
    keep
        Called first with each sample: the ring.
    plan
        The cadence and the rules.
    clock
        What the schedule goes by.
    on_sample, on_alert, on_event
        Called on the sampling thread; they must return at once.
    on_error
        Called with what could not be done, what the probe raised, and whether that is news (it went well
        the time before); sampling goes on. Default: it is raised.
    resumed
        Another sampler was here before: the first sample ends a gap.
    """

    def __init__(
        self,
        probe: SampleSource,
        keep: Callable[[Sample], object],
        plan: SamplingPlan,
        clock: Clock,
        *,
        on_sample: Callable[[Sample], None],
        on_alert: Callable[[AlertTransition], None],
        on_event: Callable[[EventRecord], None],
        on_error: Callable[[str, BaseException, bool], None] | None = None,
        resumed: bool = False,
    ) -> None:
        self._probe, self._keep, self._plan, self._clock = probe, keep, plan, clock
        self._on_sample, self._on_alert, self._on_event = on_sample, on_alert, on_event
        self._on_error = on_error
        self._failing: set[str] = set()
        self._engine_lock = threading.Lock()
        self._engine = AlertEngine(plan.all_rules())
        self._busy = False
        self._watched_until = -1.0
        self._last_until: float | None = None
        self._wake = threading.Event()
        self._soon: Callable[[], None] | None = None
        self._stop = False
        self._finished = False
        self._schedule: Schedule | None = None
        self._last = self._last_wall = NAN
        self._expected = 0.0
        self._resumed = resumed

    # What others ask for.

    def set_busy(self, busy: bool) -> None:
        """A cell or a task runs (or none does any more)."""
        if busy != self._busy:
            self._busy = busy
            self._wake.set()

    def watch(self, seconds: float) -> None:
        """Somebody looks for so long."""
        now = self._clock.monotonic()
        was = now < self._watched_until
        self._watched_until = max(self._watched_until, now + seconds)
        if not was:
            self._wake.set()

    def configure(self, plan: SamplingPlan) -> None:
        """Take a new plan; samples from now on carry its revision."""
        self._plan = plan
        if hasattr(self._probe, "disk_path"):
            self._probe.disk_path = plan.disk_path
        with self._engine_lock:
            closed = self._engine.replace_rules(plan.all_rules(), self._clock.time())
        for transition in closed:
            self._on_alert(transition)
        self._wake.set()

    def soon(self, change: Callable[[], None]) -> None:
        """Call this on the sampling thread before it does anything else, and at once; only the last that was given.

        So that many changes of the rules in a row cost one new plan, not one each.
        """
        self._soon = change
        self._wake.set()

    def acknowledge(self, alert_id: str) -> bool:
        """Acknowledge an open alert; return whether there is one with that id."""
        with self._engine_lock:
            return self._engine.acknowledge(alert_id)

    def silence(self, alert_id: str, until_seconds: float) -> bool:
        """Silence an open alert until a moment of the wall clock; return whether there is one with that id.

        It lasts as long as it is from now to then, whatever the wall clock is set to meanwhile.
        """
        until = self._clock.monotonic() + (until_seconds - self._clock.time())
        with self._engine_lock:
            return self._engine.silence(alert_id, until)

    def active(self) -> tuple[AlertView, ...]:
        """The alerts that are open."""
        with self._engine_lock:
            return self._engine.active()

    def last_words(self) -> None:
        """The kernel is gone: sample a little longer (the counters of the container), then stop."""
        self._last_until = self._clock.monotonic() + LAST_SECONDS
        self._wake.set()

    def stop(self) -> None:
        """Stop at once."""
        self._stop = True
        self._wake.set()

    # The loop.

    def interval(self, now: float) -> float:
        """The interval in force (seconds)."""
        if self._last_until is not None:
            return min(LAST_INTERVAL, self._plan.idle_interval)
        return self._plan.interval(busy=self._busy, watched=now < self._watched_until)

    def run(self) -> None:
        """Sample until ``stop``; at the end every open alert is resolved."""
        while (left := self.turn()) is not None:
            if left > 0 and self._clock.wait(self._wake, left):
                self._wake.clear()
        self.finish()

    def turn(self) -> float | None:
        """Take the sample that is due, if one is; return the seconds until the next, None at the end."""
        if self._stop:
            return None
        change, self._soon = self._soon, None
        if change is not None:
            change()
        now = self._clock.monotonic()
        interval = self.interval(now)
        schedule = self._schedule
        if schedule is None:
            schedule = self._schedule = Schedule(now, interval)
        # Cheap when nothing changed; else the next tick is at most one new interval away.
        schedule.set_interval(interval, now)
        self._expected = max(self._expected, interval)
        if now < schedule.deadline:
            return schedule.deadline - now
        try:
            self._take(now)
        except BaseException as error:  # noqa: BLE001  a user's probe: told, or raised
            self._failed(NO_SAMPLE, error)
        else:
            self._failing.discard(NO_SAMPLE)
            self._last, self._expected = now, interval
        now = self._clock.monotonic()
        schedule.advance(now)
        if self._last_until is not None and now >= self._last_until:
            return None
        return max(schedule.deadline - now, 0.0)

    def finish(self) -> None:
        """Resolve every open alert; a second call does nothing."""
        with self._engine_lock:
            self._finished = True
            resolved = self._engine.finish(self._clock.time())
        for transition in resolved:
            self._on_alert(transition)

    def _take(self, now: float) -> None:
        wall = self._clock.time()
        measured = now - self._last
        # A monotonic clock may stand still while the machine is suspended; the wall clock tells.
        gap = self._resumed
        if measured == measured:
            gap = is_gap(measured, self._expected) or is_gap(wall - self._last_wall, self._expected)
        sample = self._probe.read(
            time_seconds=wall,
            monotonic_seconds=now,
            interval_seconds=measured,
            gap=gap,
            settings_revision=self._plan.revision,
        )
        raised: list[BaseException] = []

        def top() -> TopProcesses:
            try:
                found = tuple(self._probe.top_processes())
                self._failing.discard(NO_PROCESSES)
                return found
            except BaseException as error:  # noqa: BLE001  as above, when the lock is free again
                raised.append(error)
                return ()

        with self._engine_lock:
            if self._finished:
                return  # the reading hung while the loop was ended; all alerts are resolved by now
            self._last_wall, self._resumed = wall, False
            self._keep(sample)
            transitions = self._engine.observe(sample, top, self._expected)
        self._on_sample(sample)
        for transition in transitions:
            self._on_alert(transition)
        for error in raised:
            self._failed(NO_PROCESSES, error)
        try:
            events = list(self._probe.take_events())
        except BaseException as error:  # noqa: BLE001  as above
            self._failed(NO_EVENTS, error)
        else:
            self._failing.discard(NO_EVENTS)
            for event in events:
                self._on_event(event)

    def _failed(self, what: str, error: BaseException) -> None:
        if self._on_error is None:
            raise error
        first = what not in self._failing
        self._failing.add(what)
        self._on_error(what, error, first)
