"""Records as plain text, for the command line and the magics. Pure: values in, text out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from wiseflow_nb.config import Settings, is_secret, unit_of
from wiseflow_nb.lines import moment, one_line, table
from wiseflow_nb.quantities import duration, percent, size
from wiseflow_nb.records import CellRecord, SessionInfo, Snapshot, TaskRecord, to_json_dict


def status_text(snapshot: Snapshot) -> str:
    """A session at one moment, in a few lines."""
    info, pool = snapshot.info, snapshot.pool
    lines = [f"session {info.session_id} ({info.state}), {one_line(info.title) or 'untitled'}, pid {info.pid}"]
    sample = snapshot.sample
    if sample is not None:
        limits = f" of {sample.cpu_limit_cores:g} cores" if math.isfinite(sample.cpu_limit_cores) else ""
        lines.append(
            f"cpu {percent(sample.cpu_utilization_ratio)}{limits}, "
            f"memory {size(sample.memory_working_set_bytes)} of {size(sample.memory_limit_bytes)} "
            f"({percent(sample.memory_utilization_ratio)}), disk {percent(sample.filesystem_utilization_ratio)}"
        )
    if info.limit_source:
        lines.append(f"limits: {one_line(info.limit_source, 160)}")
    counts = ", ".join(f"{count} {state}" for state, count in snapshot.task_counts.items() if count) or "none"
    lines.append(f"tasks: {counts}" + (" (paused)" if snapshot.paused else ""))
    lines.append(f"workers: {pool.busy} busy of {pool.workers} ({pool.min_workers}-{pool.max_workers})")
    firing = [alert for alert in snapshot.alerts if not math.isfinite(alert.resolved_seconds)]
    lines.extend(f"alert: {alert.severity} {one_line(alert.message, 160)}" for alert in firing)
    return "\n".join(lines)


def status_dict(snapshot: Snapshot) -> dict[str, Any]:
    """The same in plain values that ``json`` can write; times in seconds since the epoch, ratios of 0-1."""
    sample = snapshot.sample
    return {
        "session": to_json_dict(snapshot.info),
        "time_seconds": snapshot.time_seconds,
        "sample": None
        if sample is None
        else {name: value if math.isfinite(value) else None for name, value in sample._asdict().items()},
        "task_counts": dict(snapshot.task_counts),
        "tasks": [to_json_dict(record) for record in snapshot.tasks if not record.state.terminal],
        "pool": to_json_dict(snapshot.pool),
        "alerts": [to_json_dict(alert) for alert in snapshot.alerts if not math.isfinite(alert.resolved_seconds)],
        "thresholds": {name: list(pair) for name, pair in snapshot.thresholds.items()},
        "paused": snapshot.paused,
    }


def tasks_text(records: Iterable[TaskRecord], width: int = 0, paint: Callable[[str], str] = str) -> str:
    """Tasks as a table, newest last."""
    rows = [
        [
            record.task_id,
            record.name,
            str(record.state),
            record.priority.name.lower(),
            percent(record.share_done),
            duration(record.queue_seconds),
            duration(record.wall_seconds),
            duration(record.cpu_seconds),
            f"{record.attempt}/{record.max_attempts}",
            record.error or record.reason,
        ]
        for record in records
    ]
    if not rows:
        return "no tasks"
    headers = ["task", "name", "state", "priority", "done", "queued", "wall", "cpu", "attempt", "why"]
    return table(headers, rows, width, paint)


def sessions_text(infos: Iterable[SessionInfo], width: int = 0, paint: Callable[[str], str] = str) -> str:
    """Sessions as a table."""
    rows = [
        [info.session_id, str(info.state), info.title, info.host, str(info.pid), moment(info.started_seconds)]
        for info in infos
    ]
    headers = ["session", "state", "title", "host", "pid", "started"]
    return table(headers, rows, width, paint) if rows else "no sessions"


def settings_rows(settings: Settings) -> list[tuple[str, str, str, str]]:
    """Every setting: name, value (secrets hidden), unit, source."""
    rows = []
    for name, value in settings.model_dump().items():
        shown = ("(hidden)" if value else "") if is_secret(name) else str(value)
        rows.append((name.upper(), shown, unit_of(name), settings.source(name)))
    return rows


def settings_text(settings: Settings, width: int = 0) -> str:
    """Every setting with its value, unit and source, as a table."""
    return table(["setting", "value", "unit", "source"], settings_rows(settings), width)


def cell_text(record: CellRecord) -> str:
    """What a cell cost, in one line."""
    share = ""
    if math.isfinite(record.cpu_seconds) and record.wall_seconds >= 0.01:
        share = f" ({record.cpu_seconds / record.wall_seconds * 100:.0f} % of a core)"
    gap = f", largest gap {duration(record.largest_gap_seconds)}" if math.isfinite(record.largest_gap_seconds) else ""
    return (
        f"wall {duration(record.wall_seconds)}, cpu {duration(record.cpu_seconds)}{share}, "
        f"memory {size(record.rss_before_bytes)} -> {size(record.rss_after_bytes)} "
        f"(peak {size(record.rss_peak_bytes)}){gap}"
    )
