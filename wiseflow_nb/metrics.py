"""How a session stands as Prometheus text, for a node exporter's text files or a route of one's own.

Each column of the samples is ``wiseflow_<column>``: a counter where it only grows (``_total``), else a
gauge. The labels are ``session_id`` and ``host``; tasks have their state besides, alerts their
severity. What is not available is left out. Names of tasks, users or files are never labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from wiseflow_nb.errors import MissingExtraError
from wiseflow_nb.records import COUNTER_COLUMNS, SessionState, Severity, Snapshot, TaskState

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

PREFIX = "wiseflow_"
_POOL = {
    "workers": "Threads of the pool.",
    "busy": "Threads of the pool that run work now.",
    "queued": "Work that waits for a thread of the pool.",
    "min_workers": "Least threads of the pool.",
    "max_workers": "Most threads of the pool.",
    "target": "Threads that the resources allow the pool.",
}
_POOL_COUNTERS = {"completed": "Work of the pool that ended well.", "failed": "Work of the pool that raised."}
_HELP = {
    "time_seconds": "When the sample was taken, seconds since the epoch.",
    "gap": "1 after a pause of the sampling (a suspended machine, a starved sampler).",
    "cpu_limit_cores": "Cores that the process may use: the least of all limits.",
    "cpu_utilization_ratio": "Share of the CPU limit in use, 0 to 1.",
    "memory_limit_bytes": "Memory that the process may use: the least of all limits.",
    "memory_working_set_bytes": "Memory in use at the level that the limit binds, without inactive file cache.",
    "memory_available_bytes": "Memory left below the limit.",
    "memory_utilization_ratio": "Share of the memory limit in use, 0 to 1.",
    "container_memory_oom_kills_total": "Processes of the container that the OOM killer has ended.",
    "filesystem_utilization_ratio": "Share of the watched file system in use, 0 to 1.",
    "process_memory_rss_bytes": "Resident memory of the kernel's process tree.",
    "process_cpu_seconds_total": "CPU time of the kernel's process tree.",
    "process_count": "Processes of the kernel's tree.",
    "recorder_cpu_seconds_total": "CPU time of the flight recorder itself.",
    "recorder_memory_rss_bytes": "Resident memory of the flight recorder itself.",
}
_UNITS = ("seconds", "bytes", "ratio", "cores")


def metrics_text(snapshot: Snapshot) -> str:
    """Return a snapshot in the Prometheus text format.

    Raises
    ------
    MissingExtraError
        If prometheus-client is not installed.

    Examples
    --------
    >>> print(session.metrics())  # doctest: +SKIP
    # HELP wiseflow_up 1 while the session is live, 0 after its end.
    # TYPE wiseflow_up gauge
    wiseflow_up{host="here",session_id="20260101-000000-abcdef"} 1.0
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError:
        raise MissingExtraError(
            'Prometheus text needs prometheus-client: pip install "wiseflow-nb[prometheus]"'
        ) from None
    # One registry a call: nothing is registered for the whole process, and no default collector is in it.
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(tuple(_families(snapshot))))
    return generate_latest(registry).decode("utf-8")


class _Once:
    """What a registry asks for its metrics."""

    def __init__(self, families: tuple[Metric, ...]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def help_of(column: str) -> str:
    """What a column means, in one sentence; of those that need no words, their name in words.

    Examples
    --------
    >>> help_of("disk_read_bytes_total"), help_of("system_load1")
    ('Disk read, total, in bytes.', 'System load1.')
    """
    if column in _HELP:
        return _HELP[column]
    total = column.endswith("_total")
    name = column.removesuffix("_total")
    unit = next((unit for unit in _UNITS if name.endswith(f"_{unit}")), "")
    words = name.removesuffix(f"_{unit}").replace("_", " ").capitalize()
    return words + (", total" if total else "") + (f", in {unit}" if unit in ("seconds", "bytes") else "") + "."


def _families(snapshot: Snapshot) -> Iterator[Metric]:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

    labels = {"session_id": _label(snapshot.info.session_id), "host": _label(snapshot.info.host)}
    names, values = tuple(labels), tuple(labels.values())

    def one(name: str, text: str, value: Any, *, counter: bool = False) -> Metric:
        # The counter's family adds `_total` to the name of its samples.
        family: Any = CounterMetricFamily if counter else GaugeMetricFamily
        made: Metric = family(PREFIX + name.removesuffix("_total") if counter else PREFIX + name, text, labels=names)
        made.add_metric(values, float(value))  # type: ignore[attr-defined]
        return made

    def several(name: str, text: str, label: str, counts: Iterable[tuple[str, int]]) -> Metric:
        made = GaugeMetricFamily(PREFIX + name, text, labels=(*names, label))
        for key, count in counts:
            made.add_metric((*values, key), float(count))
        return made

    live = snapshot.info.state is SessionState.LIVE
    yield one("up", "1 while the session is live, 0 after its end.", live)
    if math.isfinite(snapshot.info.started_seconds):
        yield one(
            "session_started_seconds",
            "When the session started, seconds since the epoch.",
            snapshot.info.started_seconds,
        )
    if snapshot.sample is not None:
        for column, value in snapshot.sample._asdict().items():
            if math.isfinite(value):
                yield one(column, help_of(column), value, counter=column in COUNTER_COLUMNS)
    yield several(
        "tasks",
        "Tasks by state.",
        "state",
        ((state.value, snapshot.task_counts.get(state.value, 0)) for state in TaskState),
    )
    for name, text in _POOL.items():
        yield one(f"pool_{name}", text, getattr(snapshot.pool, name))
    for name, text in _POOL_COUNTERS.items():
        yield one(f"pool_{name}_total", text, getattr(snapshot.pool, name), counter=True)
    yield one("paused", "1 while no new task starts.", snapshot.paused)
    firing = [alert.severity for alert in snapshot.alerts if live and not math.isfinite(alert.resolved_seconds)]
    yield several(
        "alerts_firing",
        "Alerts that are open now, by severity.",
        "severity",
        ((level.value, firing.count(level)) for level in (Severity.WARNING, Severity.CRITICAL)),
    )


def _label(text: str) -> str:
    """A label that UTF-8 can hold; quotes and line breaks are escaped by the writer."""
    return text[:200].encode("utf-8", "replace").decode("utf-8")
