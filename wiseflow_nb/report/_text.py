"""The parts of a report in words, and the whole of it as text. Pure: facts in, lines out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from wiseflow_nb.lines import many, moment, one_line, table
from wiseflow_nb.quantities import UNKNOWN, duration, percent, size
from wiseflow_nb.records import AlertView, CellRecord, SessionState, TaskRecord
from wiseflow_nb.report._diagnose import growth_lines
from wiseflow_nb.report._facts import WINDOW_SECONDS, Facts
from wiseflow_nb.report._growth import growth_of

if TYPE_CHECKING:
    from wiseflow_nb.report._report import Report

SHOWN_TASKS = 20
SHOWN_ALERTS = 20
#: Whether a task or a cell was there at the end is told from this far before it.
RUNNING_CELLS = 5


class Series(NamedTuple):
    """A quantity over the last minutes: first, last, least, most; ratios of 0-1 or bytes."""

    first: float
    last: float
    least: float
    most: float


def who(facts: Facts) -> list[tuple[str, str]]:
    """Who, where, how long: (what, value)."""
    info = facts.info
    lasted = facts.end_seconds - info.started_seconds
    rows = [
        ("session", one_line(info.session_id, 64)),
        ("title", one_line(info.title) or "untitled"),
        ("where", f"{one_line(info.host)}, process {info.pid}"),
        ("started", moment(info.started_seconds)),
    ]
    if facts.live:
        rows.append(("runs for", duration(lasted)))
    else:
        rows.append(("ended", f"{moment(facts.end_seconds)}, after {duration(lasted)}"))
    if info.limit_source:
        rows.append(("limits", one_line(info.limit_source, 160)))
    return rows


def how_known(facts: Facts) -> tuple[str, ...]:
    """How it ended, and how that is known."""
    beat = f"last heartbeat {moment(facts.heartbeat_seconds)}"
    if facts.info.state is SessionState.LIVE:
        age = duration(max(facts.now_seconds - facts.heartbeat_seconds, 0.0))
        return (f"still live: no end mark, and its process or its heartbeat is there ({beat}, {age} ago)",)
    if facts.info.state is SessionState.ENDED:
        return (f"ended in order: it wrote its end mark at {moment(facts.ended_mark_seconds)}", beat)
    after = facts.after_death
    if facts.marked:
        lines = [
            f"crashed: its recorder saw the kernel go and wrote the end mark at {moment(facts.ended_mark_seconds)}"
        ]
    else:
        lines = [f"crashed: there is no end mark, and neither its process nor a heartbeat is there; {beat}"]
    if facts.recorder_lives:
        age = duration(max(facts.now_seconds - facts.heartbeat_seconds, 0.0))
        lines.append(
            f"its recorder (process {facts.recorder_lives}) still runs, and last wrote {age} ago: if that is more than "
            "some seconds, it hangs or was stopped, and writes the end when it goes on"
        )
    alive = facts.last_alive
    if alive is not None:
        lines.append(
            f"last sample with the kernel {moment(alive.time_seconds)}, {many(len(after), 'sample')} without it after that"
        )
    return tuple(lines)


def running_rows(facts: Facts) -> list[tuple[str, str, str, str, str, str]]:
    """What was in flight at the end: kind, name, state, progress, age, note."""
    rows = []
    for task in [task for task in facts.tasks if facts.was_running(task)][:SHOWN_TASKS]:
        state = task.state.value if facts.live else "lost"
        rows.append(
            (
                f"task {one_line(task.task_id, 40)}",
                one_line(task.name),
                state,
                percent(task.progress),
                duration(_age(facts, task)),
                one_line(" ".join(filter(None, [_was(facts, task), task.progress_text])), 80),
            )
        )
    for cell in [cell for cell in facts.cells if _cell_open(cell)][-RUNNING_CELLS:]:
        age = duration(facts.end_seconds - cell.started_seconds)
        state = "running" if facts.live else "unfinished"
        rows.append((f"cell [{cell.number}]", one_line(cell.first_line), state, UNKNOWN, age, ""))
    return rows


def _cell_open(cell: CellRecord) -> bool:
    return not math.isfinite(cell.finished_seconds)


def _age(facts: Facts, task: TaskRecord) -> float:
    since = task.started_seconds if math.isfinite(task.started_seconds) else task.created_seconds
    return max(facts.end_seconds - since, 0.0)


def _was(facts: Facts, task: TaskRecord) -> str:
    if facts.live or task.state.terminal:
        return task.reason
    return f"was {task.state.value.replace('_', ' ')}"


def series(facts: Facts, column: str) -> Series | None:
    """How a column went in the last minutes, while the kernel was there; None where it is not known."""
    values = [
        value
        for sample in facts.samples
        if sample.time_seconds <= facts.end_seconds and math.isfinite(value := getattr(sample, column))
    ]
    return Series(values[0], values[-1], min(values), max(values)) if values else None


def last_minutes(facts: Facts) -> list[tuple[str, str]]:
    """Memory and CPU of the last minutes in numbers: (what, figures)."""
    alive = facts.last_alive
    limit = size(alive.memory_limit_bytes) if alive is not None else UNKNOWN
    rows = []
    for label, column, shown, of in (
        ("memory in use", "memory_working_set_bytes", size, f" of {limit}"),
        ("kernel's processes", "process_memory_rss_bytes", size, ""),
        ("cpu", "cpu_utilization_ratio", percent, " of what it may use"),
        ("disk", "filesystem_utilization_ratio", percent, ""),
    ):
        told = series(facts, column)
        if told is not None:
            rows.append(
                (
                    label,
                    f"{shown(told.first)} -> {shown(told.last)}{of} (least {shown(told.least)}, most {shown(told.most)})",
                )
            )
    return rows


def span_text(facts: Facts) -> str:
    """Which stretch of time the samples at hand cover."""
    count = sum(1 for sample in facts.samples if sample.time_seconds <= facts.end_seconds)
    if not count:
        return f"there is no sample of the last {duration(WINDOW_SECONDS)}"
    return f"last {duration(max(facts.end_seconds - facts.samples[0].time_seconds, 0.0))}, {many(count, 'sample')}"


def alert_rows(facts: Facts) -> list[tuple[str, str, str, str, str]]:
    """Alerts of the last minutes: severity, rule, since, state at the end, message."""
    return [
        (
            alert.severity.value,
            one_line(alert.rule),
            moment(alert.started_seconds),
            _alert_state(facts, alert),
            one_line(alert.message, 160),
        )
        for alert in facts.alerts[:SHOWN_ALERTS]
    ]


def _alert_state(facts: Facts, alert: AlertView) -> str:
    if math.isnan(alert.resolved_seconds):
        return "open" if facts.live else "open at the end"
    return f"over {moment(alert.resolved_seconds)[11:]}"


def oom_counts(facts: Facts) -> tuple[float, float]:
    """The container's OOM kill counter in the first and in the last sample that has it."""
    start = facts.first.container_memory_oom_kills_total if facts.first is not None else math.nan
    counts = [item.container_memory_oom_kills_total for item in facts.samples]
    counts = [count for count in counts if math.isfinite(count)]
    return start, counts[-1] if counts else math.nan


def oom_text(facts: Facts) -> str:
    """The same in words."""
    start, end = oom_counts(facts)
    if not math.isfinite(start) and not math.isfinite(end):
        return "unknown, nothing counts them here"
    at = moment(facts.first.time_seconds)[11:] if facts.first is not None else UNKNOWN
    told = [f"{count:.0f}" if math.isfinite(count) else UNKNOWN for count in (start, end)]
    return f"{told[0]} in the first sample ({at}), {told[1]} in the last"


def _gap(facts: Facts, number: int) -> float:
    """How long there was no sample before this one; where who took it did not know, by the one before, if it is of this boot."""
    sample = facts.samples[number]
    if math.isfinite(sample.interval_seconds) or number == 0:
        return sample.interval_seconds
    between = sample.monotonic_seconds - facts.samples[number - 1].monotonic_seconds
    return between if between > 0 else math.nan


def missing_lines(facts: Facts) -> list[str]:
    """Gaps in the samples, what was dropped, and trouble of the recorder's own."""
    lines = []
    gaps = [_gap(facts, number) for number, sample in enumerate(facts.samples) if sample.gap]
    if gaps:
        known = [seconds for seconds in gaps if math.isfinite(seconds)]
        longest = f", the longest {duration(max(known))}" if known else ""
        lines.append(f"{many(len(gaps), 'gap')} in the samples of the last minutes{longest}")
    if facts.dropped_rows:
        since = next((item for item in facts.events if item.kind == "rows_dropped"), None)
        at = f", since {moment(since.time_seconds)[11:]}" if since is not None else ""
        lines.append(f"{many(facts.dropped_rows, 'row')} dropped{at}: more was recorded than could be written")
    # What stands against the recording as a whole, where the record says so: tasks' last states that it lacks, too.
    notice = one_line(str(getattr(facts.info, "notice", "")), 500)
    lines += [notice] if notice else []
    # How many rows were dropped is said above; here is why and when. That the kernel's process cannot be
    # read after its end is no trouble of the recorder's.
    kinds = ("recorder_", "store_", "probe_failed", "state_dir_fallback", "rows_unwritable", "clock_")
    lines += [
        f"{moment(event.time_seconds)[11:]} {one_line(event.message, 160)}"
        for event in facts.events
        if event.kind.startswith(kinds)
        and not (event.kind == "probe_failed" and event.time_seconds > facts.end_seconds)
        and not (event.kind == "store_lost" and not event.data.get("samples"))
    ][-8:]
    return lines or ["no gap, nothing dropped"]


def report_text(report: Report, width: int = 0) -> str:
    """The whole report as text, for ``print`` and for terminals."""
    facts = report.facts
    parts: list[str] = []
    labels = who(facts)
    left = max(len(label) for label, _ in labels)
    parts.append("\n".join(f"{label:{left}}  {value}" for label, value in labels))
    parts.append(
        "\n".join(("how it ended" if not facts.live else "how it stands", *(f"  {line}" for line in how_known(facts))))
    )
    for number, cause in enumerate(report.causes):
        heading = ("likeliest cause" if number == 0 else "besides") if not facts.live else "cause"
        lines = [f"{heading} ({cause.confidence})", f"  {cause.sentence}"]
        lines += [f"  - {line}" for line in cause.evidence]
        parts.append("\n".join(lines))
    if report.grown and not any("grew by" in line for cause in report.causes for line in cause.evidence):
        parts.append("\n".join(("what grew", *(f"  {line}" for line in growth_lines(growth_of(facts))))))
    heading = "running now" if facts.live else "running at the end"
    running = running_rows(facts)
    shown = (
        _indented(table(["what", "name", "state", "done", "age", "note"], running, width)) if running else "  nothing"
    )
    tasks_shown = sum(1 for row in running if row[0].startswith("task"))
    if facts.tasks_in_flight > tasks_shown:
        shown += f"\n  and {many(facts.tasks_in_flight - tasks_shown, 'more task')}"
    parts.append(f"{heading}\n{shown}")
    minutes = [f"  {label}: {figures}" for label, figures in last_minutes(facts)]
    parts.append("\n".join((f"memory and cpu ({span_text(facts)})", *(minutes or ["  unknown"]))))
    alerts = [
        f"  {severity}: {message} ({rule}, since {since}, {state})"
        for severity, rule, since, state, message in alert_rows(facts)
    ]
    parts.append("\n".join(("alerts of the last minutes", *(alerts or ["  none"]))))
    parts.append(f"OOM kills counted: {oom_text(facts)}")
    parts.append("\n".join(("the record itself", *(f"  {line}" for line in missing_lines(facts)))))
    return "\n\n".join(parts)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
