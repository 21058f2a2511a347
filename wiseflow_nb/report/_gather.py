"""Read a session's facts out of its record: a few bounded queries, whatever the session's length."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from wiseflow_nb.records import (
    NAN,
    AlertState,
    AlertTransition,
    AlertView,
    CellRecord,
    EventRecord,
    Sample,
    SessionInfo,
    SessionState,
    TaskRecord,
    TaskState,
    alert_view,
)
from wiseflow_nb.report._facts import WINDOW_SECONDS, Facts, Shutdown

#: A window holds so many samples at most; of more, every n-th and the last ones are taken.
MOST_SAMPLES = 6000
MOST_TASKS = 2000
#: So many tasks are looked at, at most, for those that ended in the window: newer ones may not have begun.
MOST_LOOKED = 50_000
#: Events of the window are looked for among the last so many.
MOST_EVENTS, LAST_EVENTS = 500, 10_000
MOST_REV = 2**63 - 1
LAST_SAMPLES = 200
#: After the end mark nothing is sampled; a clock that was set back may say otherwise.
AFTER_SECONDS = 60.0
#: A session that ends in order closes its alerts a moment before its end mark.
CLOSING_SECONDS = 5.0


class Record(Protocol):
    """What is needed of a session's file."""

    def query(self, statement: str, arguments: Sequence[Any] = ()) -> list[tuple[Any, ...]]: ...

    def meta(self) -> dict[str, Any]: ...

    def task(self, task_id: str) -> TaskRecord | None: ...

    def unfinished_tasks(self, state: TaskState, limit: int) -> list[TaskRecord]: ...

    def cells(self, limit: int = ...) -> list[CellRecord]: ...

    def alerts(self, limit: int = ...) -> list[AlertTransition]: ...

    def acknowledged(self) -> frozenset[str]: ...

    def task_counts(self) -> dict[str, int]: ...


def gather(
    record: Record,
    rows: Callable[[float, float], Any],
    info: SessionInfo,
    *,
    now: float,
    host: str,
    boot_id: str,
    boot_seconds: float,
    pid_namespace: str = "",
    count_kills: Callable[[Sequence[str]], float] | None = None,
    still_runs: Callable[[Any], bool | None] | None = None,
) -> Facts:
    """Return the facts.

    Parameters
    ----------
    record
        The session's file.
    rows
        ``rows(since, until)``: the samples in between, shape (n, columns).
    info
        Who the session is and how it stands.
    now
        Seconds since the epoch.
    host, boot_id, boot_seconds
        Of the machine that reads: its name, its boot and when that was (seconds since the epoch).
    pid_namespace
        That of the process that reads: in another one the same path can be another group.
    count_kills
        ``count_kills(paths)``: the OOM kills that these files count now. Asked where the recorder went
        with the kernel, and nobody was left to count. Default: not asked.
    still_runs
        ``still_runs(identity)``: whether that process runs, None where it cannot be seen. Asked of the
        recorder of a crashed session that has no end mark. Default: not asked.
    """
    meta = record.meta()
    heartbeat = _number(meta.get("heartbeat"))
    end = (
        now if info.state is SessionState.LIVE else _newest(info.ended_seconds, heartbeat, info.last_seen_seconds, now)
    )
    begin = end - WINDOW_SECONDS
    samples = _samples(rows(begin, end + AFTER_SECONDS))
    identity, counts = meta.get("identity", {}), record.task_counts()
    facts = Facts(
        info=info,
        now_seconds=now,
        ended_mark_seconds=_number(meta.get("ended_seconds")),
        end_reason=str(meta.get("end_reason") or ""),
        heartbeat_seconds=heartbeat,
        boot_id=str(identity.get("boot_id", "")),
        host_now=host,
        boot_id_now=boot_id,
        boot_seconds_now=boot_seconds,
        recorder_on_thread="recorder_pid" in meta and meta["recorder_pid"] == identity.get("pid"),
        first=_first(rows, info.started_seconds, samples),
        samples=samples,
        tasks=_tasks(record, begin),
        tasks_in_flight=sum(counts.get(state.value, 0) for state in (*_IN_FLIGHT, TaskState.LOST)),
        cells=tuple(
            cell
            for cell in record.cells(200)
            if not math.isfinite(cell.finished_seconds) or cell.finished_seconds >= begin
        ),
        events=_events(record, begin),
        shutdowns=_shutdowns(record),
        thresholds={str(name): (float(pair[0]), float(pair[1])) for name, pair in meta.get("thresholds", {}).items()},
        dropped_rows=sum(_count(meta.get(key)) for key in ("dropped_rows", "lost_rows")),
        dropped_tasks=sum(_count(meta.get(key)) for key in ("dropped_tasks", "lost_tasks")),
        task_counts=counts,
    )
    here = facts.host_now == info.host and facts.boot_id_now == facts.boot_id
    same = here and pid_namespace == identity.get("pid_namespace")
    if facts.crashed and not facts.marked and still_runs is not None and still_runs(meta.get("recorder")):
        facts = replace(facts, recorder_lives=_pid(meta["recorder"]))
    if same and facts.crashed and not facts.marked and count_kills is not None:
        facts = replace(facts, oom_kills_now=count_kills(_paths(meta.get("kill_files"))))
    return replace(facts, alerts=_alerts(record, facts, begin))


def _pid(identity: Any) -> int:
    return int(identity["pid"])


def _paths(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _alerts(record: Record, facts: Facts, begin: float) -> tuple[AlertView, ...]:
    """The alerts that were open in the last minutes, as they stood at the end."""
    acknowledged = record.acknowledged()
    views: dict[str, AlertView] = {}
    for item in record.alerts(1000):
        # At the end of a session the recorder closes what is open: that is no recovery.
        closing = item.kind == "resolved" and item.to_state is AlertState.UNKNOWN
        if closing and not facts.live and item.time_seconds >= facts.end_seconds - CLOSING_SECONDS:
            continue
        known = views.get(item.alert_id)
        views[item.alert_id] = alert_view(item, known, acknowledged=item.alert_id in acknowledged)
    near = [view for view in views.values() if not view.resolved_seconds < begin]
    return tuple(sorted(near, key=lambda view: (not math.isnan(view.resolved_seconds), -view.started_seconds)))


def _number(value: Any, default: float = NAN) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else default


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _newest(ended: float, *others: float) -> float:
    if math.isfinite(ended):
        return ended
    return next((value for value in others if math.isfinite(value)), NAN)


def _samples(rows: Any) -> tuple[Sample, ...]:
    if len(rows) > MOST_SAMPLES:
        step = len(rows) // (MOST_SAMPLES - LAST_SAMPLES) + 1
        kept = [*range(0, len(rows) - LAST_SAMPLES, step), *range(len(rows) - LAST_SAMPLES, len(rows))]
        rows = rows[kept]
    return tuple(Sample(*row) for row in rows.tolist())


def _first(rows: Callable[[float, float], Any], started: float, samples: tuple[Sample, ...]) -> Sample | None:
    """The session's first sample, or the oldest at hand where that is no longer kept."""
    early: Any = rows(started - 1.0, started + 60.0) if math.isfinite(started) else ()
    if len(early):
        return Sample(*early[0].tolist())
    return samples[0] if samples else None


#: In which order those that have not ended are shown, where there are more than fit.
_IN_FLIGHT = (
    TaskState.RUNNING,
    TaskState.CANCELLING,
    TaskState.RETRY_WAIT,
    TaskState.PENDING,
    TaskState.WAITING,
)


def _tasks(record: Record, begin: float) -> tuple[TaskRecord, ...]:
    """Those in flight (running ones first) and those that ended in the last minutes, the last first."""
    found: list[TaskRecord] = []
    for state in _IN_FLIGHT:
        if len(found) < MOST_TASKS:
            found += record.unfinished_tasks(state, MOST_TASKS - len(found))
    until, looked = MOST_REV, 0
    while len(found) < MOST_TASKS and looked < MOST_LOOKED:
        # By their last change: so they end, but for a clock that was set.
        rows = record.query(
            "SELECT rev, task_id, finished_seconds FROM tasks WHERE rev <= ? ORDER BY rev DESC LIMIT ?",
            (until, MOST_TASKS),
        )
        ended = [(task_id, moment) for _, task_id, moment in rows if isinstance(moment, float)]
        late = [task_id for task_id, moment in ended if moment >= begin]
        tasks = (record.task(str(task_id)) for task_id in late[: MOST_TASKS - len(found)])
        found += [task for task in tasks if task is not None and task.state.terminal]
        if len(rows) < MOST_TASKS or (ended and not late):
            break
        until, looked = rows[-1][0] - 1, looked + len(rows)
    return tuple(found)


def _events(record: Record, begin: float) -> tuple[EventRecord, ...]:
    rows = record.query(
        "SELECT time_seconds, kind, message, data FROM (SELECT * FROM events ORDER BY id DESC LIMIT ?) "
        "WHERE time_seconds >= ? ORDER BY id DESC LIMIT ?",
        (LAST_EVENTS, begin, MOST_EVENTS),
    )
    found = [EventRecord(_number(row[0]), str(row[1]), str(row[2] or ""), _mapping(row[3])) for row in reversed(rows)]
    # They come from two processes: what waited longer is written later.
    return tuple(sorted(found, key=lambda event: event.time_seconds))


def _mapping(text: Any) -> Mapping[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, TypeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _shutdowns(record: Record) -> tuple[Shutdown, ...]:
    # As bytes: whoever can write the table can also write text that is none.
    rows = record.query(
        "SELECT coalesce(finished_seconds, created_seconds), CAST(substr(who, 1, 300) AS BLOB), "
        "CAST(substr(arguments, 1, 2000) AS BLOB) FROM commands WHERE verb = 'shutdown' AND ok = 1 "
        "ORDER BY id DESC LIMIT 5"
    )
    return tuple(
        Shutdown(_number(row[0]), _decoded(row[1]), str(_mapping(_decoded(row[2])).get("mode", "")))
        for row in reversed(rows)
    )


def _decoded(value: Any) -> str:
    return bytes(value or b"").decode("utf-8", "replace")
