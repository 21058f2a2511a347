"""What the page is told, as plain JSON values: pure functions of a snapshot."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from wiseflow_nb.config import Settings, allowed_range, unit_of
from wiseflow_nb.quantities import shown
from wiseflow_nb.records import (
    AlertView,
    CellRecord,
    SessionInfo,
    SessionState,
    Snapshot,
    TaskRecord,
    TaskState,
)

#: The task states by number, as rows carry them.
STATES: tuple[str, ...] = tuple(state.value for state in TaskState)
#: A live session without a heartbeat for longer is drawn as stale.
STALE_SECONDS = 10.0
#: Rows carry this much of an error; the details pane has all of it.
ERROR_CHARACTERS = 120

_STATE_INDEX = {state: index for index, state in enumerate(TaskState)}
_ACTIVE = frozenset({TaskState.RUNNING, TaskState.CANCELLING})

#: The settings of the panel by group: what can change while a session runs.
SETTING_GROUPS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Thresholds",
        (
            ("cpu_threshold", "CPU critical"),
            ("memory_threshold", "Memory critical"),
            ("disk_threshold", "Disk critical"),
            ("warning_threshold_factor", "Warning factor"),
        ),
    ),
    (
        "Alerts",
        (
            ("alert_for_seconds", "Fire after"),
            ("alert_keep_seconds", "Resolve after"),
            ("alert_repeat_seconds", "Repeat every"),
            ("memory_full_within", "Memory full within"),
            ("disk_full_within", "Disk full within"),
        ),
    ),
    (
        "Sampling",
        (("resource_check_interval", "Idle interval"), ("busy_check_interval", "Busy interval")),
    ),
    (
        "Workers",
        (
            ("min_thread_workers", "Least workers"),
            ("max_thread_workers", "Most workers"),
            ("max_concurrent_tasks", "Tasks at once"),
        ),
    ),
)
LIVE_SETTINGS: tuple[str, ...] = tuple(name for _, group in SETTING_GROUPS for name, _ in group)


def number(value: float, digits: int = 3) -> float | None:
    """A float that JSON can carry: rounded, None where not finite."""
    return round(float(value), digits) if math.isfinite(value) else None


def percent(ratio: float) -> str:
    """A ratio of 0-1 as whole percent, one decimal below ten."""
    if not math.isfinite(ratio):
        return "n/a"
    value = ratio * 100.0
    return f"{value:.1f} %" if 0.05 <= value < 9.95 else f"{value:.0f} %"


def human_bytes(value: float) -> str:
    """Bytes in binary units, three figures."""
    if not math.isfinite(value):
        return "n/a"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.1f} {unit}"


def human_seconds(value: float) -> str:
    """A duration in its two largest units."""
    if not math.isfinite(value):
        return "n/a"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def level(ratio: float, thresholds: tuple[float, float] | None) -> str:
    """``ok``, ``warning`` or ``critical`` by the real thresholds, ``none`` where unknown."""
    if not math.isfinite(ratio):
        return "none"
    if thresholds is None:
        return "ok"
    warning, critical = thresholds
    return "critical" if ratio >= critical else "warning" if ratio >= warning else "ok"


def limit_kind(limit_source: str, part: str) -> str:
    """The short source of one limit: ``cgroup2`` of ``memory: cgroup2:/a, cpu: host``."""
    for phrase in limit_source.split(","):
        name, _, source = phrase.strip().partition(":")
        if name.strip() == part:
            return source.strip().partition(":")[0]
    return ""


def stale_seconds(info: SessionInfo, now: float) -> float:
    """Seconds without a heartbeat of a live session that ought to have one, else 0."""
    silent = now - info.last_seen_seconds
    if info.state is not SessionState.LIVE or not silent > STALE_SECONDS:
        return 0.0
    return silent


def why_no_control(info: SessionInfo) -> str:
    """Why the verbs are not offered; empty where they are."""
    if info.state is SessionState.LIVE:
        return ""
    if info.state is SessionState.CRASHED:
        return "This session crashed: what it recorded can be read, nothing can be changed."
    return "This session has ended: what it recorded can be read, nothing can be changed."


def session_part(info: SessionInfo, now: float) -> dict[str, Any]:
    """Who is drawn, and how it stands."""
    stale = stale_seconds(info, now)
    return {
        "id": info.session_id,
        "title": info.title,
        "host": info.host,
        "pid": info.pid,
        "state": info.state.value,
        "stale": f"no heartbeat for {human_seconds(stale)}" if stale else "",
        "started": number(info.started_seconds),
        "ended": number(info.ended_seconds),
        "why": why_no_control(info),
    }


def session_choices(sessions: Iterable[SessionInfo], limit: int = 50) -> list[list[Any]]:
    """``[id, title, host, state, started]`` of the sessions that can be chosen."""
    return [
        [item.session_id, item.title or item.session_id, item.host, item.state.value, number(item.started_seconds, 0)]
        for item in list(sessions)[:limit]
    ]


def cards(snapshot: Snapshot) -> dict[str, dict[str, Any]]:
    """The figures at the top, one part a card. ``value`` is None while there is no reading."""
    sample, source = snapshot.sample, snapshot.info.limit_source
    found: dict[str, dict[str, Any]] = {}
    details = {"cpu": "", "memory": "", "disk": ""}
    ratios = {"cpu": math.nan, "memory": math.nan, "disk": math.nan}
    if sample is not None:
        cores = sample.cpu_limit_cores
        shown = f"{cores:g} core{'' if cores == 1 else 's'}" if math.isfinite(cores) else "cores unknown"
        details["cpu"] = _joined(shown, limit_kind(source, "cpu"))
        details["memory"] = _joined(
            f"{human_bytes(sample.memory_working_set_bytes)} of {human_bytes(sample.memory_limit_bytes)}",
            limit_kind(source, "memory"),
        )
        details["disk"] = _joined(
            f"{human_bytes(sample.filesystem_avail_bytes)} free of {human_bytes(sample.filesystem_size_bytes)}"
        )
        ratios = {
            "cpu": sample.cpu_utilization_ratio,
            "memory": sample.memory_utilization_ratio,
            "disk": sample.filesystem_utilization_ratio,
        }
    for name, ratio in ratios.items():
        thresholds = snapshot.thresholds.get(name)
        found[f"card:{name}"] = {
            "value": None if sample is None else percent(ratio),
            "detail": details[name],
            "ratio": number(ratio),
            "level": level(ratio, thresholds),
            "ticks": [number(item) for item in thresholds or ()],
        }
    found["card:tasks"] = _tasks_card(snapshot)
    found["card:workers"] = _workers_card(snapshot)
    return found


def _joined(*words: str) -> str:
    return " · ".join(word for word in words if word)


def _tasks_card(snapshot: Snapshot) -> dict[str, Any]:
    counts = snapshot.task_counts
    running = counts.get("running", 0) + counts.get("cancelling", 0)
    queued = sum(counts.get(name, 0) for name in ("waiting", "pending", "retry_wait"))
    failed = sum(counts.get(name, 0) for name in ("failed", "timed_out", "lost"))
    most = float(snapshot.settings.get("max_concurrent_tasks") or 0)
    held = snapshot.hold_reason if snapshot.info.state is SessionState.LIVE else ""
    return {
        "value": f"{running:,} running",
        "detail": _joined(f"{queued:,} queued", f"{failed:,} failed", "paused" if snapshot.paused else held),
        "ratio": number(min(1.0, running / most)) if most else None,
        "level": "warning" if snapshot.paused or held else "ok",
        "ticks": [],
    }


def _workers_card(snapshot: Snapshot) -> dict[str, Any]:
    pool = snapshot.pool
    bounds = f"{pool.min_workers}–{pool.max_workers} allowed"
    return {
        "value": f"{pool.busy} / {pool.workers}",
        "detail": _joined(bounds, pool.reason),
        "ratio": number(pool.busy / pool.workers) if pool.workers else 0.0,
        "level": "ok",
        "ticks": [],
    }


def task_row(task: TaskRecord) -> list[Any]:
    """One row of the table, compact: id, name, state number, priority, progress, since, queue, wall, CPU, attempt, of, error.

    ``since`` is the moment from which the page counts on by itself, so that a running task's row
    need not travel each second.
    """
    if task.state in _ACTIVE:
        since = task.started_seconds
    else:
        since = task.ready_seconds if math.isfinite(task.ready_seconds) else task.created_seconds
    return [
        task.task_id,
        task.name,
        _STATE_INDEX[task.state],
        int(task.priority),
        number(task.share_done),
        None if task.state.terminal else number(since, 1),
        number(task.queue_seconds),
        None if task.state in _ACTIVE else number(task.wall_seconds),
        number(task.cpu_seconds),
        task.attempt,
        task.max_attempts,
        (task.error or task.reason).partition("\n")[0][:ERROR_CHARACTERS],
    ]


def alert_parts(alerts: Sequence[AlertView], limit: int = 60) -> dict[str, Any]:
    """The live alerts, newest first, then the past ones; one part an alert, and their order."""
    live = sorted((item for item in alerts if not math.isfinite(item.resolved_seconds)), key=_started, reverse=True)
    past = sorted((item for item in alerts if math.isfinite(item.resolved_seconds)), key=_resolved, reverse=True)
    shown = (live + past)[:limit]
    parts: dict[str, Any] = {"order": [item.alert_id for item in shown], "live": len(live), "past": len(past)}
    for item in shown:
        parts[f"alert:{item.alert_id}"] = {
            "id": item.alert_id,
            "rule": item.rule,
            "resource": item.resource,
            "severity": item.severity.value,
            "state": item.state.value,
            "value": alert_figure(item, item.value),
            "peak": alert_figure(item, item.peak),
            "threshold": alert_figure(item, item.threshold),
            "since": number(item.started_seconds, 1),
            "resolved": number(item.resolved_seconds, 1),
            "message": item.message,
            "acknowledged": item.acknowledged,
        }
    return parts


def _started(alert: AlertView) -> float:
    return alert.started_seconds


def _resolved(alert: AlertView) -> float:
    return alert.resolved_seconds


def alert_figure(alert: AlertView, value: float) -> str:
    """An alert's figure in the unit of its rule."""
    return "n/a" if math.isnan(value) else shown(value, alert.unit)


def band_part(snapshot: Snapshot) -> dict[str, list[float]]:
    """The warning and critical levels of the charts, in percent."""
    return {name: [round(pair[0] * 100, 3), round(pair[1] * 100, 3)] for name, pair in snapshot.thresholds.items()}


def mark_part(alerts: Sequence[AlertView], cells: Sequence[CellRecord], since: float) -> dict[str, Any]:
    """What is marked on the time axis: ``[resource, severity, from, to]`` and ``[number, from, to, status]``."""
    return {
        "alerts": [
            [
                item.resource,
                item.severity.value,
                number(item.started_seconds, 1),
                number(item.resolved_seconds, 1),
                item.message,
            ]
            for item in alerts[-40:]
            if not item.resolved_seconds < since
        ],
        "cells": [
            [item.number, number(item.started_seconds, 1), number(item.finished_seconds, 1), item.status]
            for item in cells[-60:]
            if not item.finished_seconds < since
        ],
    }


@functools.cache
def setting_fields() -> list[dict[str, Any]]:
    """The inputs of the settings panel with label, unit, allowed range and default."""
    defaults = Settings().model_dump()
    fields: list[dict[str, Any]] = []
    for group, members in SETTING_GROUPS:
        for name, label in members:
            low, high = allowed_range(name)
            metadata = Settings.model_fields[name].metadata
            fields.append(
                {
                    "name": name,
                    "group": group,
                    "label": label,
                    "help": Settings.model_fields[name].description or "",
                    "unit": "×" if unit_of(name) == "x" else unit_of(name),
                    "low": low,
                    "high": high,
                    "above": any(hasattr(item, "gt") for item in metadata),
                    "below": any(hasattr(item, "lt") for item in metadata),
                    "whole": isinstance(defaults[name], int),
                    "default": defaults[name],
                }
            )
    return fields
