"""The two views: of the session in this process, and of any session through its file."""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wiseflow_nb.clock import SYSTEM_CLOCK, Clock
from wiseflow_nb.config import Settings, load_settings
from wiseflow_nb.errors import SessionNotFoundError, WiseflowError
from wiseflow_nb.frames import task_frame
from wiseflow_nb.records import (
    AlertView,
    CommandResult,
    PoolStatus,
    SessionInfo,
    SessionState,
    Snapshot,
    TaskRecord,
    TaskState,
    from_json_dict,
    valid_record,
    valid_text,
)
from wiseflow_nb.store.commands import logged, open_to_send, send, sender, validate, wait_for_log
from wiseflow_nb.store.finding import all_sessions, find_session, newer_text
from wiseflow_nb.store.paths import DATABASE_NAME, database_uri, in_memory, sessions_root
from wiseflow_nb.store.reader import (
    MOST_REV,
    StoreReader,
    after_the_end,
    counts_after_the_end,
    info_from_meta,
    missing_text,
    moment_from,
    thresholds_from,
)

if TYPE_CHECKING:
    import pandas as pd


from wiseflow_nb.view._picture import picture
from wiseflow_nb.view._protocol import LocalSession, SessionView
from wiseflow_nb.view._stored import StoredFrames, alert_views
from wiseflow_nb.view._verbs import Verbs

SHOWN_CELLS = 200
CHANGES_A_TASK = 3


class LocalTasks:
    """The tasks of the session in this process, as ``TaskSource`` wants them, for one look; their texts as the file has them.

    ``stored(limit, until_rev)`` gives those of its file, where the manager keeps the records of the newest only.
    """

    def __init__(self, session: LocalSession, stored: Callable[[int, int], Sequence[TaskRecord]]) -> None:
        self._session, self._stored = session, stored

    def count_changed(self, since_rev: int, most: int) -> int:
        """How many have changed since; above ``most`` some number above it."""
        newest, span = self._session.task_rev(), CHANGES_A_TASK * most
        while True:
            since = max(newest - span, since_rev)
            found = len(self._session.task_records(since))
            if found > most or since == since_rev:
                return found
            span *= 4

    def changed_tasks(self, since_rev: int, limit: int) -> Sequence[TaskRecord]:
        """Oldest change first."""
        return [valid_record(task) for task in self._session.task_records(since_rev)[:limit]]

    def newest_tasks(self, limit: int | None, until_rev: int | None = None) -> Sequence[TaskRecord]:
        """Newest change first."""
        newest = self._session.task_rev()
        until = newest if until_rev is None else until_rev
        # A task changes some three times: so far back there are likely enough, else further.
        span = CHANGES_A_TASK * (newest if limit is None else limit)
        while True:
            since = max(until - span, 0)
            found = [task for task in reversed(self._session.task_records(since)) if task.rev <= until]
            if limit is None or len(found) >= limit or not since:
                return self._with_dropped([valid_record(task) for task in found[:limit]], limit, until)
            span *= 4

    def _with_dropped(self, found: list[TaskRecord], limit: int | None, until: int) -> list[TaskRecord]:
        """What the manager has from a revision down, with those among them that only the file still has."""
        dropped = self._session.dropped_task_rev()
        if not dropped or (limit is not None and len(found) >= limit and found[-1].rev > dropped):
            return found
        most = MOST_REV if limit is None else limit + len(found)
        while True:
            rows = self._stored(most, min(until, dropped))
            # One that is still kept may have changed since it was written.
            gone = [task for task in rows if self._session.task_record(task.task_id) is None]
            if limit is None or len(gone) >= limit or len(rows) < most:
                return sorted([*found, *gone], key=lambda task: -task.rev)[:limit]
            most *= 2

    def unfinished_tasks(self, state: TaskState, limit: int, until_rev: int) -> Sequence[TaskRecord]:
        """Newest change first."""
        known = [task for task in self._unfinished.get(state, ()) if task.rev <= until_rev]
        known.sort(key=lambda task: -task.rev)
        return [valid_record(task) for task in known[:limit]]

    @functools.cached_property
    def _unfinished(self) -> dict[TaskState, list[TaskRecord]]:
        found: dict[TaskState, list[TaskRecord]] = {}
        for task in self._session.unfinished_tasks():
            found.setdefault(task.state, []).append(task)
        return found


class LocalView(StoredFrames, Verbs):
    """The view of the session in this process: state from memory, frames from its file."""

    def __init__(self, session: LocalSession) -> None:
        super().__init__(session.directory)
        self._session = session

    def snapshot(self, since_rev: int = 0) -> Snapshot:
        """All that is drawn; see ``SessionView.snapshot``."""
        session = self._session
        rev = session.task_rev()
        info = session.info
        shown = picture(LocalTasks(session, self._stored_tasks), since_rev)
        return Snapshot(
            info=replace(info, notice="; ".join(filter(None, (info.notice, self._missing())))),
            time_seconds=session.now(),
            rev=rev,
            sample=session.latest(),
            tasks=shown.tasks,
            task_counts={state: count for state, count in session.task_counts().items() if count},
            pool=session.pool_status(),
            alerts=tuple(map(valid_record, alert_views(session.alert_transitions(), session.acknowledged()))),
            cells=tuple(session.cell_records())[-SHOWN_CELLS:],
            settings=session.setting_values(),
            thresholds=session.thresholds(),
            paused=session.paused(),
            shutdown_at_seconds=session.shutdown_at(),
            hold_reason=valid_text(session.hold_reason()),
            reset=shown.reset,
            older_rev=shown.older_rev,
        )

    def _missing(self) -> str:
        """What the record lacks for good: here all is known, but who reads the file sees it, later also from here."""
        try:
            return missing_text(self._store().meta())
        except (WiseflowError, sqlite3.Error):
            return ""  # what is wrong with the file is told by who writes it

    def task_records(self, *, until_rev: int | None = None, limit: int | None = None) -> tuple[TaskRecord, ...]:
        """The tasks, the newest change first; see ``SessionView.task_records``."""
        return tuple(LocalTasks(self._session, self._stored_tasks).newest_tasks(limit, until_rev))

    def _stored_tasks(self, limit: int, until_rev: int) -> Sequence[TaskRecord]:
        self._barrier()
        return self._store().newest_tasks(limit, until_rev)

    def open(self, session_id: str) -> SessionView:
        """A view of another session through its file; the caller closes it."""
        return StoreView(find_session(self._state_dir(), session_id, self._directory.parent))

    def task(self, task_id: str) -> TaskRecord | None:
        """One task with everything known."""
        task = self._session.task_record(task_id)
        if task is None and self._session.dropped_task_rev():
            self._barrier()
            return self._store().task(task_id)
        return None if task is None else valid_record(task)

    def task_history(self) -> pd.DataFrame:
        """Every task: one row each, indexed by its id."""
        return task_frame(reversed(self.task_records()))

    def watch(self, seconds: float = 10.0) -> None:
        """Hold the sampling at the busy interval for so long."""
        self._perform("watch", seconds=seconds)

    def _perform(self, verb: str, **arguments: Any) -> CommandResult:
        try:
            result = self._session.perform(verb, validate(verb, arguments), "this kernel")
        except WiseflowError as error:
            return CommandResult(False, str(error))  # nothing was asked of the session
        if verb != "watch":
            self._session.log_command(logged(verb, arguments, "this kernel", result, self._session.now()))
        return result

    def _barrier(self) -> None:
        self._session.sync()


class StoreView(StoredFrames, Verbs):
    """The view of any session through its file; verbs travel through its commands table.

    Raises
    ------
    SessionNotFoundError, StoreError
        If there is no such session or it cannot be read.
    """

    def __init__(self, directory: Path, *, clock: Clock = SYSTEM_CLOCK, command_timeout: float = 5.0) -> None:
        super().__init__(directory)
        self._clock = clock
        self._timeout = command_timeout
        self._seen: SessionState | None = None
        #: Alerts as they were last put together, and of what.
        self._alerts: tuple[object, tuple[AlertView, ...]] = (None, ())
        self._store()

    @property
    def info(self) -> SessionInfo:
        """Who the session is and how it stands now."""
        return self._store().info(self._clock.time())

    def snapshot(self, since_rev: int = 0) -> Snapshot:
        """All that is drawn; see ``SessionView.snapshot``."""
        store = self._store()
        now = self._clock.time()
        meta = store.meta()
        info = info_from_meta(meta, self._directory, now)
        # Its end turns what was in flight into LOST: every row may read differently.
        reset = since_rev == 0 or (self._seen is not None and self._seen is not info.state)
        self._seen = info.state
        shown = picture(store, 0 if reset else since_rev)
        tasks = shown.tasks
        counts = store.task_counts()
        if info.state is not SessionState.LIVE:
            tasks = tuple(after_the_end(task) for task in tasks)
            counts = counts_after_the_end(counts)
        return Snapshot(
            info=info,
            time_seconds=now,
            rev=max([since_rev, *(task.rev for task in tasks)]),
            sample=self._latest(),
            tasks=tasks,
            task_counts=counts,
            pool=_pool_status(meta.get("pool", {})),
            alerts=self._alert_views(store),
            cells=tuple(store.cells(SHOWN_CELLS)),
            settings=dict(meta.get("settings", {})),
            thresholds=thresholds_from(meta),
            paused=bool(meta.get("paused", False)),
            shutdown_at_seconds=moment_from(meta.get("shutdown_at")),
            hold_reason=str(meta.get("hold_reason") or ""),
            reset=shown.reset,
            older_rev=shown.older_rev,
        )

    def _alert_views(self, store: StoreReader) -> tuple[AlertView, ...]:
        # Few looks find anything new, and the store gives the very same transitions again.
        parts = store.alerts(), store.acknowledged()
        if self._alerts[0] != parts:
            self._alerts = parts, alert_views(*parts)
        return self._alerts[1]

    def task_records(self, *, until_rev: int | None = None, limit: int | None = None) -> tuple[TaskRecord, ...]:
        """The tasks, the newest change first; see ``SessionView.task_records``."""
        most = MOST_REV
        tasks = self._store().newest_tasks(most if limit is None else limit, most if until_rev is None else until_rev)
        return tuple(tasks if self.info.state is SessionState.LIVE else map(after_the_end, tasks))

    def open(self, session_id: str) -> SessionView:
        """A view of another session through its file; the caller closes it."""
        return StoreView(find_session(self._state_dir(), session_id, self._directory.parent))

    def task(self, task_id: str) -> TaskRecord | None:
        """One task with everything known."""
        task = self._store().task(task_id)
        if task is None or self.info.state is SessionState.LIVE:
            return task
        return after_the_end(task)

    def unfinished_named(self, name: str) -> Sequence[str]:
        """The ids of the tasks of that name that have not ended, the oldest change first."""
        return self._store().unfinished_named(name)

    def task_history(self) -> pd.DataFrame:
        """Every task: one row each, indexed by its id; what was in flight at the end reads lost."""
        tasks = self._store().changed_tasks(0, MOST_REV)
        if self.info.state is not SessionState.LIVE:
            tasks = [after_the_end(task) for task in tasks]
        return task_frame(tasks)

    def watch(self, seconds: float = 10.0) -> None:
        """Hold the sampling at the busy interval for so long."""
        if self.info.state is SessionState.LIVE:
            self._perform("watch", seconds=seconds)

    def _perform(self, verb: str, **arguments: Any) -> CommandResult:
        state = self.info.state
        if state is not SessionState.LIVE:
            return CommandResult(False, f"the session has {state}: it takes no commands any more")
        try:
            path = self._directory / DATABASE_NAME
            if not in_memory(path):
                wait_for_log(path, self._timeout)
            with contextlib.closing(open_to_send(database_uri(path, "rw"))) as connection:
                now = self._clock.time()
                return send(connection, verb, arguments, who=sender(), now=now, timeout=self._timeout)
        except (WiseflowError, sqlite3.Error) as error:
            return CommandResult(False, str(error))


def _pool_status(value: dict[str, Any]) -> PoolStatus:
    try:
        return from_json_dict(PoolStatus, value)
    except (TypeError, ValueError):
        return PoolStatus()  # a damaged row


def default_view(settings: Settings | None = None) -> SessionView:
    """What a standalone dashboard opens: the newest live session that is not the server's own, else that one.

    The server's own session is named by the environment variable ``WISEFLOW_SESSION``.

    Raises
    ------
    SessionNotFoundError
        If there is no session at all.
    """
    settings = load_settings() if settings is None else settings
    own = os.environ.get("WISEFLOW_SESSION", "")
    found = all_sessions(settings.state_dir, time.time())
    live = [info for info in found if info.state is SessionState.LIVE and info.session_id != own]
    for info in [*live, *(item for item in found if item.session_id == own), *found]:
        return StoreView(Path(info.path))
    where = sessions_root(settings.state_dir)[0]
    newer = newer_text(settings.state_dir)
    raise SessionNotFoundError(
        f"no session is recorded in {where}; " + (newer or "load the extension in a notebook first")
    )
