"""What leaks: a pure look at facts. Each finding names its subject, a figure, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from wiseflow_nb.quantities import duration, size
from wiseflow_nb.records import NAN
from wiseflow_nb.resources._signals import rising

#: A thread or process is given so long before it counts as left behind.
PATIENCE_SECONDS = 60.0
#: A trend is judged over at least so long, and at so many points.
TREND_LEAST_SECONDS = 600.0
TREND_POINTS = 60
#: It matters when it rose by this share of where it began, and by this much at least.
RISE_SHARE = 0.1
LEAST_DESCRIPTORS = 20.0
LEAST_BYTES = 50e6


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """One thing that leaks. ``value`` is in the unit that the message names."""

    kind: str
    subject: str
    message: str
    value: float = NAN


@dataclass(frozen=True, slots=True)
class Series:
    """A column over time, equally long: seconds and values."""

    times: Sequence[float] = ()
    values: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class AuditFacts:
    """What is known when an audit is made. Durations are seconds.

    ``stuck_tasks`` are (id, name, seconds since it was asked to stop), ``orphans`` (pid, name,
    seconds since it was first seen without its parent), ``zombies`` (pid, name, seconds likewise).
    """

    cleanup_failures: int = 0
    callback_failures: int = 0
    abandoned_tasks: tuple[tuple[str, str], ...] = ()
    stuck_tasks: tuple[tuple[str, str, float], ...] = ()
    workers: int = 0
    most_workers: int = 0
    orphans: tuple[tuple[int, str, float], ...] = ()
    zombies: tuple[tuple[int, str, float], ...] = ()
    descriptors: Series = field(default_factory=Series)
    memory: Series = field(default_factory=Series)


def find_leaks(facts: AuditFacts) -> tuple[AuditFinding, ...]:
    """Return what leaks, by kind.

    Examples
    --------
    >>> [finding.kind for finding in find_leaks(AuditFacts(workers=9, most_workers=8))]
    ['surplus workers']
    """
    found = []
    if facts.cleanup_failures:
        found.append(
            AuditFinding(
                "cleanup",
                "handlers",
                f"{facts.cleanup_failures} cleanup handlers failed; what they should have released may still be held "
                "(see the tasks' errors)",
                float(facts.cleanup_failures),
            )
        )
    if facts.callback_failures:
        message = f"callbacks of tasks raised {facts.callback_failures} times; what they should have done is not done"
        found.append(AuditFinding("callback", "callbacks", f"{message} (see the log)", float(facts.callback_failures)))
    for task_id, name in facts.abandoned_tasks:
        found.append(
            AuditFinding("cleanup", task_id, f"task {name!r} was abandoned while it ran: its cleanup never ran")
        )
    for task_id, name, seconds in facts.stuck_tasks:
        if seconds >= PATIENCE_SECONDS:
            message = f"task {name!r} was asked to stop {duration(seconds)} ago and still holds its worker"
            found.append(AuditFinding("stuck thread", task_id, f"{message}; let it check_cancelled()", seconds))
    if facts.workers > facts.most_workers > 0:
        message = f"{facts.workers} workers live, {facts.most_workers} are allowed"
        found.append(AuditFinding("surplus workers", "pool", message, float(facts.workers)))
    for kind, processes, remedy in (
        ("orphan process", facts.orphans, "its parent has ended without it; end it if nobody needs it"),
        ("zombie process", facts.zombies, "it has ended and nobody has taken its exit status; join it"),
    ):
        for pid, name, seconds in processes:
            if seconds >= PATIENCE_SECONDS:
                message = f"process {pid} ({name}) for {duration(seconds)}: {remedy}"
                found.append(AuditFinding(kind, str(pid), message, seconds))
    rise = _rise(facts.descriptors, LEAST_DESCRIPTORS)
    if rise > 0:
        message = f"open descriptors rise by {rise:.0f} an hour; close files and connections"
        found.append(AuditFinding("descriptors rising", "kernel", message, rise))
    rise = _rise(facts.memory, LEAST_BYTES)
    if rise > 0:
        message = f"memory rises by {size(rise)} an hour; look for results and frames that are kept"
        found.append(AuditFinding("memory rising", "kernel", message, rise))
    return tuple(found)


def _rise(series: Series, least: float) -> float:
    """Units per hour if the series rises beyond doubt and by enough to matter, else 0.0."""
    pairs = [(at, value) for at, value in zip(series.times, series.values, strict=True) if value == value]
    if len(pairs) < 2 or pairs[-1][0] - pairs[0][0] < TREND_LEAST_SECONDS:
        return 0.0
    step = max(1, len(pairs) // TREND_POINTS)
    # From the newest backwards, so that the newest is always among them.
    chosen = pairs[::-1][::step][::-1]
    slope = rising([at for at, _ in chosen], [value for _, value in chosen])
    rose = slope * (chosen[-1][0] - chosen[0][0])
    return slope * 3600.0 if rose > max(least, RISE_SHARE * chosen[0][1]) else 0.0
