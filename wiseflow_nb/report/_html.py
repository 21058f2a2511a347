"""The report as HTML: one block of a notebook's output, or a page of its own. No scripts, nothing from elsewhere.

Every word that came from the record passes ``html.escape``; control characters never get here as such
(``one_line``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from wiseflow_nb.lines import many, moment, one_line
from wiseflow_nb.quantities import percent, size
from wiseflow_nb.report import _text
from wiseflow_nb.report._diagnose import growth_lines
from wiseflow_nb.report._facts import Cause, Facts
from wiseflow_nb.report._svg import Bar, Line, picture

if TYPE_CHECKING:
    from wiseflow_nb.report._report import Report

MOST_BARS = 8

_LIGHT = (
    "--wfr-panel:var(--jp-layout-color1,#fff);--wfr-text:var(--jp-content-font-color1,#1f2430);--wfr-muted:#5f6775;"
    "--wfr-border:rgba(31,36,48,.14);--wfr-soft:rgba(31,36,48,.045);--wfr-line:#2563eb;--wfr-area:rgba(37,99,235,.12);"
    "--wfr-warning:#b45309;--wfr-critical:#dc2626;--wfr-task:#7c3aed;--wfr-cell:#64748b;--wfr-ok:#047857;"
    "--wfr-bad-bg:#fee2e2;--wfr-bad:#b91c1c;--wfr-ok-bg:#d1fae5;--wfr-dim-bg:#e8eaee;--wfr-dim:#4b5563;"
    "--wfr-on-bar:#fff;color-scheme:light;"
)
_DARK = (
    "--wfr-panel:var(--jp-layout-color1,#1b1e24);--wfr-text:var(--jp-content-font-color1,#e4e7ee);--wfr-muted:#a3abba;"
    "--wfr-border:rgba(226,232,240,.16);--wfr-soft:rgba(226,232,240,.06);--wfr-line:#60a5fa;--wfr-area:rgba(96,165,250,.16);"
    "--wfr-warning:#fbbf24;--wfr-critical:#f87171;--wfr-task:#a78bfa;--wfr-cell:#94a3b8;--wfr-ok:#34d399;"
    "--wfr-bad-bg:#5b2020;--wfr-bad:#fecaca;--wfr-ok-bg:#10422f;--wfr-dim-bg:#373d48;--wfr-dim:#cbd5e1;"
    "--wfr-on-bar:#14161b;color-scheme:dark;"
)
_STYLE = (
    f".wfr{{{_LIGHT}}}"
    f'body[data-jp-theme-light="false"] .wfr,body.theme-dark .wfr{{{_DARK}}}'
    # Where the host names no theme, the reader's scheme decides.
    "@media (prefers-color-scheme:dark){body:not([data-jp-theme-light]):not(.theme-light) .wfr"
    f"{{{_DARK}}}}}"
    # Doubled class names: a notebook has rules of its own for tables and lists in its outputs.
    ".wfr{container-type:inline-size;color:var(--wfr-text);max-width:1100px;"
    'font:13px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}'
    ".wfr.wfr *{box-sizing:border-box}.wfr.wfr h3,.wfr.wfr h4,.wfr.wfr p,.wfr.wfr ul,.wfr.wfr dl,.wfr.wfr dd{margin:0;padding:0}"
    ".wfr.wfr h3{font-size:17px;font-weight:700;letter-spacing:-.01em;overflow-wrap:anywhere}"
    ".wfr.wfr h4{font-size:12px;font-weight:650;color:var(--wfr-muted);margin-bottom:6px}"
    ".wfr-head{display:flex;flex-wrap:wrap;align-items:center;gap:4px 10px;margin-bottom:10px}"
    ".wfr-id{color:var(--wfr-muted)}"
    ".wfr-badge{border-radius:999px;padding:1px 9px;font-size:12px;font-weight:600;background:var(--wfr-dim-bg);color:var(--wfr-dim)}"
    ".wfr-badge.bad{background:var(--wfr-bad-bg);color:var(--wfr-bad)}.wfr-badge.good{background:var(--wfr-ok-bg);color:var(--wfr-ok)}"
    ".wfr-grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:12px}"
    ".wfr-panel{background:var(--wfr-panel);border:1px solid var(--wfr-border);border-radius:12px;padding:12px 14px;min-width:0}"
    ".wfr-wide{grid-column:1/-1}"
    ".wfr-cause{border-left:4px solid var(--wfr-dim)}.wfr-cause.bad{border-left-color:var(--wfr-critical)}"
    ".wfr-cause.good{border-left-color:var(--wfr-ok)}"
    ".wfr-sentence{font-size:15px;font-weight:600;overflow-wrap:anywhere}"
    ".wfr-also{margin-top:10px;padding-top:8px;border-top:1px solid var(--wfr-border)}"
    ".wfr.wfr ul{list-style:none;margin-top:6px;display:grid;gap:3px}"
    ".wfr.wfr li{padding-left:14px;position:relative;overflow-wrap:anywhere}"
    '.wfr.wfr li::before{content:"";position:absolute;left:2px;top:.62em;width:5px;height:5px;border-radius:50%;background:var(--wfr-muted)}'
    ".wfr.wfr dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:3px 14px}"
    ".wfr.wfr dt,.wfr.wfr dd{float:none;width:auto;font-weight:400}.wfr.wfr dt{color:var(--wfr-muted)}.wfr.wfr dd{overflow-wrap:anywhere}"
    ".wfr-scroll{overflow-x:auto}"
    ".wfr.wfr table{border-collapse:collapse;width:100%;margin:0;font-size:12.5px;color:inherit;table-layout:auto}"
    ".wfr.wfr th,.wfr.wfr td{text-align:left;padding:4px 12px 4px 0;border:0;border-bottom:1px solid var(--wfr-border);"
    "background:none;vertical-align:top;color:inherit;white-space:nowrap;max-width:none}"
    ".wfr.wfr tbody tr:nth-child(n){background:none}.wfr.wfr tr:last-child td{border-bottom:0}.wfr.wfr thead th{color:var(--wfr-muted);font-weight:500}"
    ".wfr.wfr td.wfr-long{white-space:normal;overflow-wrap:anywhere;min-width:10em}"
    ".wfr-note{color:var(--wfr-muted)}"
    ".wfr-svg{display:block;width:100%;height:auto;margin-top:8px}"
    ".wfr-axis{stroke:var(--wfr-border)}.wfr-area{fill:var(--wfr-area)}"
    ".wfr-line{fill:none;stroke:var(--wfr-line);stroke-width:1.6;stroke-linejoin:round}"
    ".wfr-level{stroke:var(--wfr-muted);stroke-width:1;stroke-dasharray:5 4}"
    ".wfr-level.warning{stroke:var(--wfr-warning)}.wfr-level.critical,.wfr-level.limit{stroke:var(--wfr-critical)}"
    ".wfr-level.limit{stroke-dasharray:none}"
    ".wfr-caption,.wfr-tick,.wfr-name{font-size:11px;fill:var(--wfr-muted)}"
    ".wfr-caption.warning{fill:var(--wfr-warning)}.wfr-caption.critical,.wfr-caption.limit{fill:var(--wfr-critical)}"
    ".wfr-mark{stroke:var(--wfr-text);stroke-width:1;stroke-dasharray:2 3}"
    ".wfr-bar.task{fill:var(--wfr-task)}.wfr-bar.cell{fill:var(--wfr-cell)}.wfr-name{fill:var(--wfr-on-bar)}"
)


def page_html(report: Report) -> str:
    """One whole page with nothing but the report."""
    title = escape(f"{one_line(report.facts.info.title) or 'session'}: report")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>body{{margin:16px}}"
        "@media (prefers-color-scheme:dark){body{background:#111318}}</style></head>"
        f"<body>{report_html(report)}</body></html>"
    )


def report_html(report: Report) -> str:
    """One block, with its style."""
    facts = report.facts
    return (
        f'<div class="wfr"><style>{_STYLE}</style>{_head(facts)}<div class="wfr-grid">'
        + _panel("Likeliest cause" if not facts.live else "How it stands", _causes(report), wide=True)
        + _panel(f"Memory, {_text.span_text(facts)}", _memory(facts))
        + _panel("CPU", _cpu(facts))
        + _panel("Running now" if facts.live else "Running at the end", _running(facts), wide=True)
        + _panel("Alerts of the last minutes", _alerts(facts), wide=True)
        + _panel("Session", _pairs(_text.who(facts)) + _list(_text.how_known(facts)))
        + _panel("The record itself", _record(facts))
        + "</div></div>"
    )


def _head(facts: Facts) -> str:
    info = facts.info
    style = {"crashed": "bad", "live": "good"}.get(info.state.value, "")
    return (
        f'<div class="wfr-head"><h3>{escape(one_line(info.title) or "untitled")}</h3>'
        f'<span class="wfr-badge {style}">{escape(info.state.value)}</span>'
        f'<span class="wfr-id">{escape(one_line(info.session_id, 64))}</span></div>'
    )


def _panel(heading: str, body: str, *, wide: bool = False) -> str:
    # The cause has its own mark at the left.
    return f'<section class="wfr-panel{" wfr-wide" if wide else ""}"><h4>{escape(heading)}</h4>{body}</section>'


def _causes(report: Report) -> str:
    out = []
    for number, cause in enumerate(report.causes):
        style = "wfr-also" if number else ""
        out.append(
            f'<div class="{style}"><p class="wfr-sentence">{escape(cause.sentence)} {_badge(cause)}</p>'
            f"{_list(cause.evidence)}</div>"
        )
    if report.grown and not any("grew by" in line for cause in report.causes for line in cause.evidence):
        out.append(f'<div class="wfr-also"><h4>What grew</h4>{_list(growth_lines(report.grown))}</div>')
    return "".join(out)


def _badge(cause: Cause) -> str:
    style = "good" if cause.kind in ("live", "ended", "idle", "command") else "bad"
    return f'<span class="wfr-badge {style if cause.confidence == "certain" else ""}">{escape(cause.confidence.value)}</span>'


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs) + "</dl>"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], long: Sequence[int]) -> str:
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in headers)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=wfr-long' if at in long else ''}>{escape(cell)}</td>" for at, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wfr-scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _running(facts: Facts) -> str:
    rows = _text.running_rows(facts)
    if not rows:
        return '<p class="wfr-note">Nothing.</p>'
    out = _table(["What", "Name", "State", "Done", "Age", "Note"], rows, long=(1, 5))
    more = facts.tasks_in_flight - sum(1 for row in rows if row[0].startswith("task"))
    return out + (f'<p class="wfr-note">and {many(more, "more task")}</p>' if more > 0 else "")


def _alerts(facts: Facts) -> str:
    rows = _text.alert_rows(facts)
    if not rows:
        return '<p class="wfr-note">None.</p>'
    return _table(["Severity", "Rule", "Since", "State", "Message"], rows, long=(4,))


def _record(facts: Facts) -> str:
    return _pairs([("OOM kills counted", _text.oom_text(facts))]) + _list(_text.missing_lines(facts))


def _memory(facts: Facts) -> str:
    alive = facts.last_alive
    limit = alive.memory_limit_bytes if alive is not None else math.nan
    lines = [Line(limit, "limit", f"limit {size(limit)}")] if math.isfinite(limit) else []
    lines += _thresholds(facts, "memory", limit, size)
    return _numbers(facts, ("memory in use", "kernel's processes")) + _picture(
        facts, "memory_working_set_bytes", lines, "Memory in use in the last minutes"
    )


def _cpu(facts: Facts) -> str:
    lines = [Line(1.0, "limit", "all of it"), *_thresholds(facts, "cpu", 1.0, percent)]
    return _numbers(facts, ("cpu", "disk")) + _picture(facts, "cpu_utilization_ratio", lines, "CPU in the last minutes")


def _thresholds(facts: Facts, name: str, limit: float, shown: Callable[[float], str]) -> list[Line]:
    pair = facts.thresholds.get(name)
    if pair is None or not math.isfinite(limit):
        return []
    return [
        Line(ratio * limit, style, f"{style} {shown(ratio * limit)}")
        for ratio, style in zip(pair, ("warning", "critical"), strict=True)
    ]


def _numbers(facts: Facts, labels: tuple[str, ...]) -> str:
    return _pairs([pair for pair in _text.last_minutes(facts) if pair[0] in labels])


def _picture(facts: Facts, column: str, lines: Sequence[Line], title: str) -> str:
    points: list[tuple[float, float]] = []
    for sample in facts.samples:
        if sample.gap and points:
            points.append((sample.time_seconds, math.nan))
        points.append((sample.time_seconds, getattr(sample, column)))
    if not points:
        return '<p class="wfr-note">There are no samples.</p>'
    begin, end = points[0][0], max(facts.end_seconds, points[-1][0])
    return picture(
        points,
        lines,
        _bars(facts, begin, end),
        begin=begin,
        end=end,
        mark=facts.end_seconds,
        mark_caption=f"{'now' if facts.live else 'end'} {moment(facts.end_seconds)[11:]}",
        title=title,
    )


def _bars(facts: Facts, begin: float, end: float) -> list[Bar]:
    """The tasks and cells that ran over the last minutes, those that were there at the end and the longest first."""
    found: list[tuple[bool, float, Bar]] = []
    for task in facts.tasks:
        if math.isfinite(task.started_seconds):
            until = task.finished_seconds if math.isfinite(task.finished_seconds) else facts.end_seconds
            found.append(
                (
                    facts.was_running(task),
                    until - task.started_seconds,
                    Bar(task.started_seconds, until, one_line(task.name), "task"),
                )
            )
    for cell in facts.cells:
        until = cell.finished_seconds if math.isfinite(cell.finished_seconds) else facts.end_seconds
        label = f"[{cell.number}] {one_line(cell.first_line)}"
        found.append(
            (
                not math.isfinite(cell.finished_seconds),
                until - cell.started_seconds,
                Bar(cell.started_seconds, until, label, "cell"),
            )
        )
    inside = [item for item in found if item[2].end >= begin and item[2].begin <= end]
    inside.sort(key=lambda item: (not item[0], -item[1]))
    return [bar for _, _, bar in inside[:MOST_BARS]]
