"""What one tick of the dashboard does: messages in, one snapshot read, what changed out."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Mapping
from typing import Any

import numpy as np

from wiseflow_nb.clock import Clock
from wiseflow_nb.dashboard import _payload as payload
from wiseflow_nb.dashboard._attention import CellWatch, Inbox
from wiseflow_nb.dashboard._widgets import AlertPanel, LivePlot, Overview, SettingsPanel, TaskTable, WiseflowWidget
from wiseflow_nb.errors import WiseflowError
from wiseflow_nb.records import CommandResult, SessionInfo, SessionState, Snapshot, to_json_dict
from wiseflow_nb.store.commands import refuse_secrets
from wiseflow_nb.view import SessionView

#: What a view may raise without ending the dashboard.
VIEW_ERRORS = (WiseflowError, OSError, sqlite3.Error, ValueError)
RANGES: tuple[int, ...] = (300, 900, 3600, 21_600, 86_400, 604_800)
CHART_COLUMNS: tuple[str, ...] = (
    "cpu_utilization_ratio",
    "memory_utilization_ratio",
    "filesystem_utilization_ratio",
    "disk_read_bytes_per_second",
    "disk_written_bytes_per_second",
    "network_receive_bytes_per_second",
    "network_transmit_bytes_per_second",
)
#: A chart is about 500 pixels wide: more points than this show nothing more.
MAX_POINTS = 2000
#: What a first picture leaves out follows in pages, so many at a tick, until the table has so many tasks more.
PAGE_TASKS = 1000
PAGES_A_TICK = 4
FILL_TASKS = 20_000
WATCH_SECONDS = 5.0
SESSIONS_SECONDS = 5.0
UNASKED_SECONDS = 3.0
#: Re-read this much before the newest point, so that a rate has a sample to start from.
OVERLAP_SECONDS = 30.0
#: A sample so much later than now was taken before the clock was set back: it is drawn when its time comes.
AHEAD_SECONDS = 2.0


class Core:
    """All of the dashboard but its thread: ``tick`` is called by one thread only."""

    def __init__(self, view: SessionView, clock: Clock) -> None:
        self.clock = clock
        self.inbox = Inbox(clock)
        self.cells = CellWatch()
        self.overview = Overview(self.inbox.put)
        self.plot = LivePlot(self.inbox.put)
        self.tasks = TaskTable(self.inbox.put)
        self.alerts = AlertPanel(self.inbox.put)
        self.settings = SettingsPanel(self.inbox.put)
        self.widgets: tuple[WiseflowWidget, ...] = (self.overview, self.plot, self.tasks, self.alerts, self.settings)
        self.displayed = False
        self._own = view
        self._view = view
        self._own_id = ""
        self._snapshot: Snapshot | None = None
        self._sessions: list[SessionInfo] = []
        self._error = self._notice = ""
        self._drawing = True
        self._range = 900
        self._rev = 0
        #: Of the tasks changed until this revision the table has those alone that have not ended; 0: it has all.
        self._older_rev = 0
        self._older_wanted = 0
        self._epoch = 0
        self._last_time = math.nan
        self._appended = 0
        self._full: set[str] = set()
        self._wants_library = False
        self._next_watch = self._next_sessions = self._next_unasked = -math.inf

    # -- one tick ---------------------------------------------------------------------------------

    def tick(self) -> None:
        """Handle what pages sent, then push what changed if somebody looks."""
        for widget, content in self.inbox.drain():
            self._receive(widget, content)
        if self._wants_library:
            self._wants_library = False
            self.plot.send_library()
        if not self._looked_at():
            return
        try:
            self._read_and_push()
        except VIEW_ERRORS as error:
            self._error = f"{type(error).__name__}: {error}"
            self._push_overview()

    def _looked_at(self) -> bool:
        if self.cells.running:
            if self.inbox.heard:
                self.inbox.keep()
                return True
            if not self.displayed:
                return False
            # The page's first word waits behind the running cell: tell it everything unasked, now and then.
            now = self.clock.monotonic()
            if now >= self._next_unasked:
                if math.isinf(self._next_unasked):
                    self._next_unasked = now + UNASKED_SECONDS / 2
                    return False
                self._next_unasked = now + 2 * UNASKED_SECONDS
                self._refresh_all()
                self.plot.send_library()
            return True
        return not self.inbox.silent()

    def _read_and_push(self) -> None:
        now = self.clock.monotonic()
        if self._drawing and now >= self._next_watch:
            self._next_watch = now + WATCH_SECONDS
            self._view.watch()
        if now >= self._next_sessions:
            self._next_sessions = now + SESSIONS_SECONDS
            self._list_sessions()
        full_tasks = "tasks" in self._full
        if not self._drawing and not self._full:
            self._push_overview()
            return
        snapshot = self._view.snapshot(0 if full_tasks else self._rev)
        if self._view is self._own:
            self._own_id = snapshot.info.session_id
        self._snapshot, self._error = snapshot, ""
        self._push_overview()
        self._push_tasks(snapshot, full_tasks)
        self._push_alerts(snapshot)
        self._push_settings(snapshot)
        self._push_plot(snapshot)
        self._full.clear()

    def _list_sessions(self) -> None:
        # The sessions beside this one are extra: without their list this one is drawn all the same.
        try:
            self._sessions, self._notice = self._view.sessions(), ""
        except VIEW_ERRORS as error:
            self._notice = f"The other sessions cannot be listed: {error}"

    def _refresh_all(self) -> None:
        self._full = {widget.name for widget in self.widgets}
        for widget in self.widgets:
            widget.forget()

    # -- what pages send --------------------------------------------------------------------------

    def _receive(self, widget: str, content: Mapping[str, Any]) -> None:
        kind = content.get("type")
        if kind == "refresh":
            self._refresh_all()
        elif kind == "hello":
            self._full.add(widget)
            for item in self.widgets:
                if item.name == widget:
                    item.forget()
        elif kind == "plotly":
            self._wants_library = True
        elif kind == "range":
            seconds = content.get("seconds")
            if seconds in RANGES:
                self._range = int(str(seconds))
                self._full.add("plot")
        elif kind == "drawing":
            self._drawing = bool(content.get("on"))
            if self._drawing:
                self._refresh_all()
        elif kind == "open":
            self._open(str(content.get("id", "")))
        elif kind == "older":
            self._older_wanted = FILL_TASKS
        elif kind == "details":
            self._details(str(content.get("id", "")))
        elif kind == "verb":
            self._answer(widget, content)

    def _open(self, session_id: str) -> None:
        current = self._snapshot.info.session_id if self._snapshot else ""
        if not session_id or session_id == current:
            return
        try:
            opened = self._own if session_id == self._own_id else self._own.open(session_id)
        except VIEW_ERRORS as error:
            self._result("overview", None, CommandResult(False, f"cannot open this session: {error}"))
            self.overview.forget()
            return
        self._leave()
        self._view = opened
        self._snapshot, self._rev, self._error = None, 0, ""
        self._next_watch = -math.inf
        self._refresh_all()

    def _leave(self) -> None:
        if self._view is not self._own:
            try:
                self._view.close()
            except VIEW_ERRORS as error:
                self._error = f"closing the previous session: {error}"
            self._view = self._own

    def _details(self, task_id: str) -> None:
        try:
            task = self._view.task(task_id)
        except VIEW_ERRORS as error:
            self.tasks.send({"type": "details", "id": task_id, "task": None, "error": str(error)})
            return
        self.tasks.send({"type": "details", "id": task_id, "task": None if task is None else to_json_dict(task)})

    def _answer(self, widget: str, content: Mapping[str, Any]) -> None:
        try:
            result = self._do(str(content.get("verb")), list(content.get("args") or ()))
        except VIEW_ERRORS as error:
            result = CommandResult(False, str(error) or type(error).__name__)
        except (TypeError, IndexError) as error:
            result = CommandResult(False, f"not understood: {error}")
        self._result(widget, content.get("request"), result)

    def _result(self, widget: str, request: Any, result: CommandResult) -> None:
        for item in self.widgets:
            if item.name == widget:
                item.send({"type": "result", "request": request, "ok": result.ok, "message": result.message})

    def _do(self, verb: str, args: list[Any]) -> CommandResult:
        if self._snapshot is not None and self._snapshot.info.state is not SessionState.LIVE:
            return CommandResult(False, payload.why_no_control(self._snapshot.info))
        view = self._view
        if verb == "cancel":
            return view.cancel(str(args[0]))
        if verb == "retry":
            return view.retry(str(args[0]))
        if verb == "reprioritise":
            return view.reprioritise(str(args[0]), str(args[1]))
        if verb == "pause":
            return view.pause()
        if verb == "resume":
            return view.resume()
        if verb == "acknowledge":
            return view.acknowledge(str(args[0]))
        if verb == "silence":
            return view.silence(str(args[0]), float(args[1]))
        if verb == "configure":
            changes = dict(args[0])
            refuse_secrets(changes)
            foreign = sorted(set(changes) - set(payload.LIVE_SETTINGS))
            if foreign:
                return CommandResult(False, f"{', '.join(foreign)} cannot be changed here")
            return view.configure(changes)
        return CommandResult(False, f"unknown verb {verb!r}")

    # -- what pages get ---------------------------------------------------------------------------

    def _push_overview(self) -> None:
        parts: dict[str, Any] = {
            "now": round(self.clock.time(), 1),
            "error": self._error,
            "notice": self._notice,
            "range": self._range,
            "drawing": self._drawing,
            "sessions": payload.session_choices(self._sessions),
        }
        snapshot = self._snapshot
        if snapshot is not None:
            parts["session"] = payload.session_part(snapshot.info, self.clock.time())
            parts["paused"] = snapshot.paused
            live = snapshot.info.state is SessionState.LIVE
            parts["shutdown"] = payload.number(snapshot.shutdown_at_seconds) if live else None
            parts.update(payload.cards(snapshot))
        self.overview.push(parts)

    def _push_tasks(self, snapshot: Snapshot, full: bool) -> None:
        rows = [payload.task_row(task) for task in snapshot.tasks]
        self._rev = max(self._rev, snapshot.rev) if not (full or snapshot.reset) else snapshot.rev
        self.tasks.push({"why": payload.why_no_control(snapshot.info), "states": list(payload.STATES)})
        if full or snapshot.reset:
            self._older_rev, self._older_wanted = snapshot.older_rev, FILL_TASKS
            self.tasks.send({"type": "rows", "rows": rows, "all": True, "now": round(self.clock.time(), 1)})
        else:
            if rows:
                self.tasks.send({"type": "rows", "rows": rows, "now": round(self.clock.time(), 1)})
            # Not with a first picture, which is to be drawn first.
            self._push_older()
        self.tasks.push({"total": sum(snapshot.task_counts.values()), "older": self._may_ask_for_older()})

    def _push_older(self) -> None:
        """Send what a first picture left out, some pages of it, the newest first."""
        for _ in range(PAGES_A_TICK):
            if not self._older_rev or self._older_wanted <= 0:
                return
            page = self._view.task_records(until_rev=self._older_rev, limit=PAGE_TASKS)
            self._older_rev = page[-1].rev - 1 if len(page) == PAGE_TASKS else 0
            self._older_wanted -= len(page)
            rows = [payload.task_row(task) for task in page]
            self.tasks.send({"type": "rows", "rows": rows, "older": True, "now": round(self.clock.time(), 1)})

    def _may_ask_for_older(self) -> bool:
        return self._older_rev > 0 and self._older_wanted <= 0

    def _push_alerts(self, snapshot: Snapshot) -> None:
        why = payload.why_no_control(snapshot.info)
        self.alerts.push({"why": why, **payload.alert_parts(snapshot.alerts)})

    def _push_settings(self, snapshot: Snapshot) -> None:
        values = {name: snapshot.settings[name] for name in payload.LIVE_SETTINGS if name in snapshot.settings}
        self.settings.push(
            {"why": payload.why_no_control(snapshot.info), "fields": payload.setting_fields(), "values": values}
        )

    def _push_plot(self, snapshot: Snapshot) -> None:
        end = self._end(snapshot)
        since = end - self._range
        # Where the clock was set back, what was drawn is later than now: what comes would not be after it.
        full = "plot" in self._full or self._appended > MAX_POINTS or self._last_time > end + AHEAD_SECONDS
        marks = payload.mark_part(snapshot.alerts, snapshot.cells, since)
        live = snapshot.info.state is SessionState.LIVE
        self.plot.push({"bands": payload.band_part(snapshot), "marks": marks, "live": live})
        begin = since if full or math.isnan(self._last_time) else max(since, self._last_time - OVERLAP_SECONDS)
        times, columns = self._view.series(CHART_COLUMNS, begin, MAX_POINTS)
        block = as_block(times, columns)
        if live:
            block = block[:, block[0] <= end + AHEAD_SECONDS]
        if full:
            self._epoch += 1
            self._appended = 0
            self._last_time = float(block[0, -1]) if block.shape[1] else math.nan
            self.plot.send_columns("history", self._epoch, block, range=self._range, end=round(end, 3))
            return
        if not math.isnan(self._last_time):
            block = block[:, block[0] > self._last_time]
        if block.shape[1]:
            self._appended += block.shape[1]
            self._last_time = float(block[0, -1])
            self.plot.send_columns("append", self._epoch, block, end=round(end, 3))

    def _end(self, snapshot: Snapshot) -> float:
        info = snapshot.info
        if info.state is SessionState.LIVE:
            return self.clock.time()
        for moment in (info.ended_seconds, info.last_seen_seconds):
            if math.isfinite(moment):
                return moment
        return snapshot.time_seconds

    def close(self) -> None:
        """Leave the session that was chosen, if it is not the one that was given."""
        self.cells.close()
        self._leave()


def as_block(times: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Times and chart columns as one block, shape (8, n); the NaN times of gaps become moments in them."""
    moments = np.asarray(times, dtype=np.float64).copy()
    unknown = np.flatnonzero(np.isnan(moments))
    for index in unknown:
        moments[index] = moments[index - 1] + 0.001 if index else np.nan
    rows = [moments]
    for name in CHART_COLUMNS:
        column = columns.get(name)
        rows.append(np.full(moments.shape, np.nan) if column is None else np.asarray(column, dtype=np.float64))
    block = np.vstack(rows)
    return block[:, ~np.isnan(moments)]
