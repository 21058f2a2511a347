"""The report out of a real record: what it tells, as text and as HTML, whatever names and errors hold."""

from __future__ import annotations

import contextlib
import html.parser
import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wiseflow_nb.lines import cut, one_line, shown_width, table
from wiseflow_nb.records import (
    NAN,
    SAMPLE_COLUMNS,
    AlertState,
    AlertTransition,
    CellRecord,
    EventRecord,
    Sample,
    SessionState,
    Severity,
    TaskRecord,
    TaskState,
    to_json_dict,
)
from wiseflow_nb.report import Report, _gather
from wiseflow_nb.report._gather import LAST_SAMPLES, MOST_SAMPLES, _samples
from wiseflow_nb.report._svg import MOST_POINTS, Bar, Line, picture, thinned
from wiseflow_nb.report._text import missing_lines
from wiseflow_nb.session import Session
from wiseflow_nb.store.identity import identify
from wiseflow_nb.store.paths import DATABASE_NAME
from wiseflow_nb.store.writer import StoreWriter
from wiseflow_nb.view import StoreView

START = 1_700_000_000.0
END = START + 120.0
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\x1b[31mred\x1b]0;title\x07",
    "a\nb\r\tc\x00d\x9b31m",
    "\u202egnp.exe\u2066",
    "'; DROP TABLE tasks; --",
    "表" * 200 + "é🙂\U000e0041",
    "\ud800 broken",
    "x" * 1_000_000,
    "</style></svg><script>alert(2)</script>",
    "&lt;b&gt;",
    "",
)


def sample(at: float, rss: float, kills: float, gap: float = 0.0) -> Sample:
    return Sample(
        time_seconds=at,
        monotonic_seconds=at - START,
        interval_seconds=1.0,
        gap=gap,
        cpu_utilization_ratio=0.5,
        memory_limit_bytes=1e9,
        memory_working_set_bytes=rss if rss == rss else 2e7,
        memory_utilization_ratio=rss / 1e9,
        container_memory_oom_kills_total=kills,
        filesystem_utilization_ratio=0.4,
        process_memory_rss_bytes=rss,
    )


def test_the_counter_is_read_for_the_report_only_where_it_is_the_same_and_nobody_was_left(tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text("oom 3\noom_kill 2\noom_group_kill 0\n")
    unmarked = {"ended_seconds": None, "crashed": None, "kill_files": [str(tmp_path / "memory.events")]}

    def counted(name: str, **meta: Any) -> float:
        view = StoreView(written(tmp_path / name, **{**unmarked, **meta}))
        try:
            return view.report().facts.oom_kills_now
        finally:
            view.close()

    away = {**identify().to_dict(), "pid": 2**22 + 1, "host": "elsewhere"}
    assert counted("unmarked") == 2
    assert math.isnan(counted("marked", ended_seconds=END))
    assert math.isnan(counted("away", identity=away))
    assert math.isnan(counted("odd", kill_files={"path": 7}))
    assert math.isnan(counted("gone", kill_files=[str(tmp_path / "nowhere")]))


def written(directory: Path, name: str = "grow", **meta: Any) -> Path:
    """A session's file as a recorder leaves it when the OOM killer took the kernel."""
    directory.mkdir(mode=0o700, exist_ok=True)
    writer = StoreWriter(directory / DATABASE_NAME)
    identity = {**identify().to_dict(), "pid": 2**22 + 1}
    values = {
        "title": name,
        "identity": identity,
        "started_seconds": START,
        "heartbeat": END + 2,
        "ended_seconds": END + 2,
        "end_reason": "the kernel vanished",
        "crashed": True,
        "recorder_pid": 2**22 + 2,
        "limit_source": f"memory: {name}",
        "thresholds": {"cpu": [0.72, 0.9], "memory": [0.68, 0.85], "disk": [0.72, 0.9]},
        **meta,
    }
    for key, value in values.items():
        writer.meta(key, value)
    for second in range(120):
        writer.sample(sample(START + second, 1e8 + max(second - 100, 0) * 4.5e7, 0.0, gap=float(second == 50)))
    writer.sample(sample(END, 9.9e8, 0.0))
    writer.sample(sample(END + 1, NAN, 1.0))
    writer.write_blocks(partial=True)
    tasks = [
        TaskRecord(
            "t1", name, TaskState.RUNNING, started_seconds=START + 100, created_seconds=START, progress=0.25, rev=1
        ),
        TaskRecord("t2", "waits", TaskState.PENDING, created_seconds=START + 90, progress_text=name, rev=2),
        TaskRecord("t3", "early", TaskState.COMPLETED, started_seconds=START, finished_seconds=START + 99, rev=3),
        TaskRecord(
            "t4", "failed", TaskState.FAILED, started_seconds=START, finished_seconds=END - 1, error=name, rev=4
        ),
    ]
    cells = [
        CellRecord("c1", 1, "import pandas", START, START + 1, 1.0, status="ok"),
        CellRecord("c2", 2, name, START + 99.5),
    ]
    fired = AlertTransition(
        "a1", name or "r", "memory", "fired", AlertState.OK, AlertState.FIRING, Severity.CRITICAL, 0.9, 0.85, 0.95,
        END - 10, END - 10, f"memory is high: {name}",
    )  # fmt: skip
    closed = replace(
        fired, kind="resolved", from_state=AlertState.FIRING, to_state=AlertState.UNKNOWN, severity=Severity.NONE,
        time_seconds=END + 2, message="memory high is over",
    )  # fmt: skip
    events = [
        EventRecord(START + 50, "recorder_restarted", f"the recorder was replaced {name}"),
        EventRecord(END + 1, "probe_failed", "processes cannot be read"),
    ]
    rows = [("task", item) for item in tasks] + [("cell", item) for item in cells]
    rows += [("alert", item) for item in (fired, closed)] + [("event", item) for item in events]
    writer.apply([(kind, to_json_dict(item)) for kind, item in rows])
    writer.close()
    return directory


@pytest.fixture
def view(tmp_path: Path) -> Iterator[StoreView]:
    made = StoreView(written(tmp_path / "20260101-000000-abcdef"))
    yield made
    made.close()


def test_a_report_tells_cause_work_figures_alerts_and_gaps(view: StoreView) -> None:
    report = view.report()
    facts = report.facts
    assert facts.info.state is SessionState.CRASHED
    assert facts.end_seconds == END
    assert report.cause.kind == "oom"
    assert "task 'grow' (t1) grew" in report.cause.sentence
    assert report.grown[0].key == "t1"
    assert [task.task_id for task in facts.tasks if facts.was_running(task)] == ["t1", "t2"]
    assert [cell.number for cell in facts.cells] == [1, 2]
    text = str(report)
    for words in (
        "limit 1.0 GB",
        "20260101-000000-abcdef",
        "crashed: its recorder saw the kernel go",
        "OOM kills counted: 0 in the first sample",
        "critical: memory is high: grow (grow, since",
        "open at the end",
        "1 gap in the samples",
        "the recorder was replaced grow",
        "memory in use: 100 MB -> 990 MB of 1.0 GB",
        "cpu: 50 %",
    ):
        assert words in text
    assert "processes cannot be read" not in text
    lost = next(line for line in text.splitlines() if line.startswith("  task t1"))
    assert re.split(r" {2,}", lost.strip()) == ["task t1", "grow", "lost", "25 %", "20.0 s", "was running"]
    assert re.search(r"cell \[2\] +grow +unfinished", text)
    assert repr(report).startswith("<Report 20260101-000000-abcdef crashed: The OOM killer")


def test_what_was_dropped_is_said_once_with_what_it_means(tmp_path: Path) -> None:
    def told(name: str, **meta: Any) -> list[str]:
        with contextlib.closing(StoreView(written(tmp_path / name, **meta))) as view:
            return [line for line in str(view.report()).splitlines() if "dropped" in line or "last state" in line]

    assert told("none") == []
    assert told("moves", dropped_rows=7, dropped_tasks=0) == [
        "  7 rows dropped: more was recorded than could be written"
    ]
    rows = told("tasks", dropped_rows=7, lost_rows=2, dropped_tasks=3)
    assert rows[0].startswith("  9 rows dropped")
    (said,) = rows[1:]
    assert said.startswith("  of 3 tasks the last state is not on record")
    assert said.endswith("or are not there, and its counts of tasks are wrong")
    assert "of 7 tasks" in told("given up", lost_rows=20, lost_tasks=4, dropped_tasks=3)[1]
    # Anybody can write the file.
    assert told("odd", dropped_rows=NAN, lost_rows=[1], dropped_tasks=True) == []
    assert told("odder", dropped_rows=-1, lost_rows="7", dropped_tasks=1e300) == []


def test_a_gap_whose_length_nobody_measured_is_as_long_as_the_samples_are_apart(view: StoreView) -> None:
    facts = view.report().facts
    before, after = sample(END - 20, 1e8, 0.0), sample(END - 3, 1e8, 0.0, gap=1.0)._replace(interval_seconds=NAN)
    (line, *_) = missing_lines(replace(facts, samples=(before, after)))
    assert line == "1 gap in the samples of the last minutes, the longest 17.0 s"
    (line, *_) = missing_lines(replace(facts, samples=(after,)))
    assert line == "1 gap in the samples of the last minutes"


def test_events_are_in_order_of_time_whoever_wrote_them_first(tmp_path: Path) -> None:
    directory = written(tmp_path / "two")
    with contextlib.closing(StoreWriter(directory / DATABASE_NAME)) as writer:
        late = EventRecord(END - 30, "recorder_silent", "told late")
        writer.apply([("event", to_json_dict(late))])
        writer.commit()
    with contextlib.closing(StoreView(directory)) as view:
        assert view.events().kind.tolist() == ["recorder_restarted", "recorder_silent", "probe_failed"]
        facts = view.report().facts
        assert [event.kind for event in facts.events] == ["recorder_restarted", "recorder_silent", "probe_failed"]


def test_a_report_is_json(view: StoreView) -> None:
    told = json.loads(json.dumps(view.report().to_dict(), allow_nan=False))
    assert told["oom_kills"] == {"start": 0.0, "end": 1.0}
    assert told["causes"][0]["confidence"] == "certain"
    assert [task["task_id"] for task in told["running"]] == ["t1", "t2"]
    assert told["last_sample"]["process_memory_rss_bytes"] == 9.9e8
    assert set(told) == {
        "session", "end_seconds", "end_reason", "heartbeat_seconds", "causes", "grown", "running", "running_count",
        "cells", "alerts", "oom_kills", "last_sample", "gaps", "dropped_rows",
    }  # fmt: skip


class Page(html.parser.HTMLParser):
    """Every tag, attribute and text of a page; unbalanced tags are an error."""

    VOID = frozenset({"meta", "line", "polyline", "polygon", "rect", "img", "br"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


TAGS = {
    "div", "style", "section", "h3", "h4", "p", "span", "ul", "li", "dl", "dt", "dd", "table", "thead", "tbody", "tr",
    "th", "td", "svg", "title", "line", "polyline", "polygon", "text", "g", "rect",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name[:12]))
def test_hostile_names_are_text_everywhere(tmp_path: Path, name: str) -> None:
    view = StoreView(written(tmp_path / "20260101-000000-abcdef", name))
    report = view.report()
    view.close()
    source = report._repr_html_()
    page = Page(source)
    assert page.tags <= TAGS
    assert not [
        attribute for attribute in page.attributes if attribute[0].startswith("on") or attribute[0] in ("href", "src")
    ]
    assert len(source) < 60_000
    text = str(report)
    assert len(text) < 10_000
    for shown in (text, source, "".join(page.words)):
        assert [letter for letter in shown if not letter.isprintable() and letter != "\n"] == []
        shown.encode("utf-8")
    words = "".join(page.words)
    assert one_line(name) in words
    assert "OOM killer" in words


def test_the_html_needs_nothing_from_elsewhere(view: StoreView) -> None:
    for source in (view.report()._repr_html_(), view.report().to_html()):
        assert "http" not in source
        assert "@import" not in source
        assert "url(" not in source
        assert "<script" not in source
        assert "--jp-layout-color1" in source
        assert "prefers-color-scheme:dark" in source
        assert source.count("<svg") == 2
        assert "limit 1.0 GB" in source
        assert "critical 850 MB" in source
    assert Page(view.report().to_html()).tags <= TAGS | {"html", "head", "body", "meta"}


def test_a_live_session_reports_too() -> None:
    with Session(title="live", resource_check_interval=0.05) as session:
        task = session.tasks.options(name="quick").submit(sum, [1, 2])
        assert task.result(timeout=10) == 3
        deadline = time.monotonic() + 20
        while not session.report().facts.samples:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        report = session.report()
        assert report.cause.kind == "live"
        assert "still live" in str(report)
        assert "how it stands" in str(report)
        assert [item.name for item in report.facts.tasks] == ["quick"]
        Page(report._repr_html_())
        view = StoreView(session.directory)
    ended = view.report()
    view.close()
    assert ended.cause.sentence == "It ended in order: closed."
    assert "ended in order" in str(ended)


def test_a_record_without_anything_reports(tmp_path: Path) -> None:
    directory = tmp_path / "20260101-000000-abcdef"
    directory.mkdir(mode=0o700)
    StoreWriter(directory / DATABASE_NAME).close()
    view = StoreView(directory)
    report = view.report()
    view.close()
    assert report.cause.kind in ("vanished", "recorder")
    assert "there is no sample" in str(report)
    Page(report._repr_html_())


def test_a_report_asks_for_what_it_shows_and_walks_over_no_table_of_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = written(tmp_path / "many")
    writer = StoreWriter(directory / DATABASE_NAME)
    ended, old = {"finished_seconds": END - 10.0}, {"finished_seconds": END - 86_400.0}
    tasks = [
        TaskRecord("stuck", "stuck", TaskState.RUNNING, rev=1),
        *(TaskRecord(f"old{number}", "old", TaskState.COMPLETED, rev=10 + number, **old) for number in range(40)),
        *(TaskRecord(f"ended{number}", "ended", TaskState.FAILED, rev=100 + number, **ended) for number in range(5)),
        *(TaskRecord(f"later{number}", "later", TaskState.PENDING, rev=200 + number) for number in range(20)),
    ]
    writer.connection.execute("DELETE FROM tasks")
    writer.apply([["task", to_json_dict(task)] for task in tasks])
    writer.close()
    view = StoreView(directory)
    store, asked = view._store(), []
    query = store.query
    monkeypatch.setattr(store, "query", lambda text, values=(): (asked.append(text), query(text, values))[1])
    monkeypatch.setattr(_gather, "MOST_TASKS", 30)
    facts = view.report().facts
    shown = [task.task_id for task in facts.tasks]
    assert shown[0] == "stuck"
    assert shown[1:21] == [f"later{number}" for number in reversed(range(20))]
    assert shown[21:] == [f"ended{number}" for number in reversed(range(5))]
    assert facts.tasks_in_flight == 21
    assert facts.task_counts["completed"] == 40
    plans = [str(query(f"EXPLAIN QUERY PLAN {text}", (None,) * text.count("?"))) for text in asked]
    assert not [plan for plan in plans if re.search(r"SCAN tasks(?! USING INDEX tasks_by_rev)", plan)]
    # Newer ones that have not begun are passed, but not for ever.
    monkeypatch.setattr(_gather, "MOST_TASKS", 22)
    assert [task.task_id for task in view.report().facts.tasks][21:] == ["ended4"]
    monkeypatch.setattr(_gather, "MOST_LOOKED", 0)
    assert len(view.report().facts.tasks) == 21
    view.close()


def test_many_samples_are_thinned_and_the_last_ones_kept() -> None:
    import numpy as np

    rows = np.zeros((MOST_SAMPLES * 3, len(SAMPLE_COLUMNS)))
    rows[:, 0] = np.arange(len(rows))
    times = [item.time_seconds for item in _samples(rows)]
    assert len(times) <= MOST_SAMPLES
    assert times == sorted(set(times))
    assert times[-LAST_SAMPLES:] == rows[-LAST_SAMPLES:, 0].tolist()


def test_the_picture_keeps_peaks_and_gaps() -> None:
    points = [(float(at), 1.0) for at in range(10_000)]
    points[5000] = (5000.0, 9.0)
    points[7000] = (7000.0, NAN)
    few = thinned(points)
    assert len(few) <= MOST_POINTS
    assert (5000.0, 9.0) in few
    assert [value for _, value in few if math.isnan(value)]
    drawn = picture(
        points, [Line(10.0, "limit", "limit <10>")], [Bar(0, 10_000, "a<b" * 9, "task"), Bar(0, 5, "c", "cell")],
        begin=0.0, end=10_000.0, mark=9_000.0, mark_caption="end", title="t",
    )  # fmt: skip
    assert drawn.count("<polyline") == 2
    assert "limit &lt;10&gt;" in drawn
    tops = set(re.findall(r'<rect class="wfr-bar \w+" x="[\d.]+" y="([\d.]+)"', drawn))
    assert len(tops) == 2


def test_a_table_fits_the_terminal() -> None:
    rows = [["t1", "n" * 50, "running", "e" * 60], ["t2", "表" * 30, "done", ""]]
    for width in (60, 80, 100):
        lines = table(["task", "name", "state", "why"], rows, width).splitlines()
        assert max(shown_width(line) for line in lines) <= width
    assert "…" not in table(["task", "name", "state", "why"], [["t1", "n" * 50, "running", "e" * 60]])
    assert cut("表表表", 5) == "表表…"
    assert shown_width(cut("表表表", 4)) <= 4


def test_the_report_is_frozen(view: StoreView) -> None:
    report = view.report()
    with pytest.raises(AttributeError):
        report.causes = ()  # type: ignore[misc]
    assert Report.of(report.facts) == report
