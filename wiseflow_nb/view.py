"""What a dashboard sees of a session, and the verbs it may use."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from wiseflow_nb.clock import SYSTEM_CLOCK, Clock
from wiseflow_nb.config import Settings, load_settings
from wiseflow_nb.errors import SessionNotFoundError, WiseflowError
from wiseflow_nb.frames import alert_frame, cell_frame, command_frame, event_frame, span_frame, task_frame
from wiseflow_nb.records import (
    NAN,
    SAMPLE_COLUMNS,
    AlertTransition,
    AlertView,
    CellRecord,
    CommandResult,
    EventRecord,
    PoolStatus,
    Sample,
    SessionInfo,
    SessionState,
    Snapshot,
    TaskRecord,
    alert_view,
    from_json_dict,
)
from wiseflow_nb.resources._ring import RingReader
from wiseflow_nb.store.commands import logged, send, sender, validate
from wiseflow_nb.store.finding import all_sessions
from wiseflow_nb.store.paths import DATABASE_NAME, RING_NAME, database_uri, sessions_root
from wiseflow_nb.store.reader import (
    StoreReader,
    after_the_end,
    counts_after_the_end,
    fit_columns,
    info_from_meta,
    list_sessions,
    session_directory,
    thresholds_from,
)

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from wiseflow_nb.resources._archive import Archive
    from wiseflow_nb.resources._history import Moment, Resolution

SHOWN_ALERTS = 200
SHOWN_CELLS = 200


class SessionView(Protocol):
    """One session, live or ended, in this process or another.

    Reading never writes. A verb never raises for what the other side decided: it answers with a
    ``CommandResult`` whose message can be shown to a person. A view may be used from any thread.
    """

    def snapshot(self, since_rev: int = 0) -> Snapshot:
        """All that is drawn; ``tasks`` only those changed after ``since_rev`` (0: all)."""
        ...

    def series(
        self, columns: Sequence[str], since_seconds: float, max_points: int = 3600
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Chart data from ``since_seconds`` (epoch) on: times (n,) and one (n,) float64 array a column.

        A column is one of ``SAMPLE_COLUMNS`` or, for a counter ``x_total``, its rate ``x_per_second``.
        A gap is a row of NaN. More than ``max_points`` samples are decimated, minima and maxima kept;
        what is older than the raw samples comes from the finest tier that reaches back so far.
        """
        ...

    def task(self, task_id: str) -> TaskRecord | None:
        """One task with everything known (traceback and output included)."""
        ...

    def history(
        self,
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        resolution: Resolution | None = None,
        rates: bool = False,
    ) -> pd.DataFrame:
        """The samples as a DataFrame with a UTC index named ``time``: a copy that later samples never change.

        All rows have one resolution. A gap (a suspended machine, a starved sampler) is a row of NaN.

        Parameters
        ----------
        since, until
            First and last moment, both included: seconds since the epoch, a date or its text (UTC
            where it names no zone), or a time before the newest sample such as ``"-15min"``.
            Default: all there is.
        resolution
            Samples are kept as they are for an hour, in buckets of 10 s for a day and of 60 s for a
            week. ``None``: the finest of these that reaches back to ``since``; ``"raw"``, ``"10s"``
            or ``"60s"``: that one, as far as it reaches; any other span up to 7 days (seconds, or as
            ``"5min"``): rolled up, exactly, from the coarsest that divides it.
        rates
            Add ``<counter>_per_second`` for every column ``<counter>_total``; NaN in the first row
            there is and across gaps.

        Returns
        -------
        DataFrame
            The columns of the schema in base units. In buckets gauges are means, with
            ``<column>_min`` and ``<column>_max``; counters are as at the bucket's end;
            ``interval_seconds`` is the time covered; ``sample_count`` the samples. ``attrs``:
            ``session_id``, ``host``, ``limit_source``, ``version``, ``resolution_seconds`` (0 for
            raw), ``tier``.

        Raises
        ------
        UsageError
            If a moment or the resolution is none.

        Examples
        --------
        >>> from wiseflow_nb import Session
        >>> with Session() as session:
        ...     frame = session.history(since="-15min", resolution="10s", rates=True)
        >>> frame.index.name, frame.attrs["tier"]
        ('time', '10s')
        """
        ...

    def summary(self, **options: Any) -> pd.DataFrame:
        """One row a column: min, mean, p95, max, last, seconds over the thresholds; ``options`` as of ``history``."""
        ...

    def busiest(self, n: int = 10, *, by: str = "cpu_utilization_ratio", **options: Any) -> pd.DataFrame:
        """The ``n`` minutes with the highest mean of ``by``, and what ran in them; ``options`` as of ``history``."""
        ...

    def task_history(self) -> pd.DataFrame: ...

    def alert_history(self) -> pd.DataFrame: ...

    def cell_history(self) -> pd.DataFrame: ...

    def events(self) -> pd.DataFrame: ...

    def commands(self) -> pd.DataFrame:
        """Who asked what and when, and what came of it: one row a command, indexed by time."""
        ...

    def sessions(self) -> list[SessionInfo]:
        """Every session of this user, live ones first, newest first."""
        ...

    def open(self, session_id: str) -> SessionView:
        """A view of another session; the caller closes it."""
        ...

    def watch(self, seconds: float = 10.0) -> None:
        """Hold the sampling at the busy interval for so long: somebody is looking."""
        ...

    def cancel(self, task_id: str) -> CommandResult: ...

    def retry(self, task_id: str) -> CommandResult: ...

    def reprioritise(self, task_id: str, priority: str) -> CommandResult: ...

    def pause(self) -> CommandResult: ...

    def resume(self) -> CommandResult: ...

    def resize(self, min_workers: int, max_workers: int) -> CommandResult: ...

    def configure(self, changes: Mapping[str, Any]) -> CommandResult: ...

    def acknowledge(self, alert_id: str) -> CommandResult: ...

    def silence(self, alert_id: str, seconds: float) -> CommandResult: ...

    def shutdown(self, mode: str = "cancel_pending") -> CommandResult: ...

    def close(self) -> None: ...


class LocalSession(Protocol):
    """What ``LocalView`` needs of the session in this process."""

    @property
    def info(self) -> SessionInfo: ...
    @property
    def directory(self) -> Path: ...
    def now(self) -> float: ...
    def latest(self) -> Sample | None: ...
    def task_rev(self) -> int: ...
    def task_records(self, since_rev: int) -> tuple[TaskRecord, ...]: ...
    def task_record(self, task_id: str) -> TaskRecord | None: ...
    def task_counts(self) -> dict[str, int]: ...
    def pool_status(self) -> PoolStatus: ...
    def paused(self) -> bool: ...
    def shutdown_at(self) -> float: ...
    def hold_reason(self) -> str: ...
    def alert_transitions(self) -> Sequence[AlertTransition]: ...
    def acknowledged(self) -> frozenset[str]: ...
    def cell_records(self) -> Sequence[CellRecord]: ...
    def setting_values(self) -> dict[str, Any]: ...
    def thresholds(self) -> dict[str, tuple[float, float]]: ...
    def sync(self) -> bool: ...
    def perform(self, verb: str, arguments: dict[str, Any], who: str) -> CommandResult: ...
    def log_command(self, row: Mapping[str, Any]) -> None: ...


class _StoredFrames:
    """The reading half that both views share: frames and chart data come from the file and the ring."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._reader_lock = threading.Lock()
        self._reader: StoreReader | None = None
        self._retired: list[StoreReader] = []
        self._ring: RingReader | None = None

    def _store(self) -> StoreReader:
        with self._reader_lock:
            if self._reader is not None and self._reader.was_replaced():
                # Deleted, and put back by the recorder; another thread may still read the old one.
                self._retired.append(self._reader)
                self._reader = None
            if self._reader is None:
                self._reader = StoreReader(self._directory)
            return self._reader

    def _ring_reader(self) -> RingReader | None:
        with self._reader_lock:
            if self._ring is not None and self._ring.was_replaced():
                self._ring = None
            if self._ring is None:
                # A ring that is not there yet (or not any more) is no sample yet, not an error.
                with contextlib.suppress(OSError, ValueError, WiseflowError):
                    self._ring = RingReader(str(self._directory / RING_NAME))
            return self._ring

    def _barrier(self) -> None:
        """Before frames are read: let what is on its way arrive."""

    def _latest(self) -> Sample | None:
        ring = self._ring_reader()
        return None if ring is None else ring.latest()

    def _archive(self) -> Archive:
        import numpy as np

        from wiseflow_nb.resources._archive import Archive

        ring = self._ring_reader()
        newest = ring.read(0)[1] if ring is not None else np.empty((0, len(SAMPLE_COLUMNS)))
        return Archive(self._store(), fit_columns(newest, len(SAMPLE_COLUMNS)))

    def _thresholds(self) -> Mapping[str, tuple[float, float]]:
        return thresholds_from(self._store().meta())

    def rows(self, since_seconds: float = -1e18, until_seconds: float = 1e18) -> np.ndarray:
        """The raw samples within [since, until]: older ones from the store, the newest from the ring."""
        return self._archive().rows(since_seconds, until_seconds)

    def series(
        self, columns: Sequence[str], since_seconds: float, max_points: int = 3600
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Chart data; see ``SessionView.series``."""
        return self._archive().series(columns, since_seconds, max_points)

    def history(
        self,
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        resolution: Resolution | None = None,
        rates: bool = False,
    ) -> pd.DataFrame:
        """The samples as a DataFrame; see ``SessionView.history``."""
        info = self._store().info(time.time())
        attrs = {
            "session_id": info.session_id,
            "host": info.host,
            "limit_source": info.limit_source,
            "version": wiseflow_version(),
        }
        return self._archive().history(since=since, until=until, resolution=resolution, rates=rates, attrs=attrs)

    def summary(self, **options: Any) -> pd.DataFrame:
        """One row a column; see ``SessionView.summary``."""
        from wiseflow_nb.resources._analysis import summary

        return summary(self.history(**{"rates": True, **options}), self._thresholds())

    def busiest(self, n: int = 10, *, by: str = "cpu_utilization_ratio", **options: Any) -> pd.DataFrame:
        """The busiest minutes; see ``SessionView.busiest``."""
        from wiseflow_nb.resources._analysis import busiest

        history = self.history(**{"rates": True, **options})
        return busiest(history, n, by=by, cells=self.cell_history(), tasks=self.task_history())

    def plot(self, *, theme: str = "light", **options: Any) -> Any:
        """The history as a themed ``plotly.graph_objects.Figure`` (light or dark); ``options`` go to ``history``."""
        # What draws is on a floor above; it is named here and loaded when somebody asks for a picture.
        import importlib

        figures = importlib.import_module("wiseflow_nb.dashboard._figures")
        history = self.history(**{"rates": True, **options})
        self._barrier()
        cells, alerts = self._store().cells(), alert_views(self._store().alerts(), frozenset())
        return figures.figure(
            history, self._thresholds(), cells=span_frame(cells), alerts=span_frame(alerts), theme=theme
        )

    def task_history(self) -> pd.DataFrame:
        raise NotImplementedError

    def alert_history(self) -> pd.DataFrame:
        """Every alert transition: one row each, indexed by time."""
        self._barrier()
        return alert_frame(self._store().alerts(1_000_000))

    def cell_history(self) -> pd.DataFrame:
        """Every cell execution: one row each, indexed by its start."""
        self._barrier()
        return cell_frame(self._store().cells())

    def events(self) -> pd.DataFrame:
        """Every event: one row each, indexed by time."""
        self._barrier()
        rows = self._store().query("SELECT time_seconds, kind, message, data FROM events ORDER BY id")
        return event_frame(EventRecord(row[0], row[1], row[2], json.loads(row[3] or "{}")) for row in rows)

    def commands(self) -> pd.DataFrame:
        """Every command but the leases of those who watch: who asked what and when, and what came of it."""
        self._barrier()
        return command_frame(self._store().commands())

    def sessions(self) -> list[SessionInfo]:
        """Every session of this user, live ones first, newest first."""
        return list_sessions(self._directory.parent, time.time())

    def open(self, session_id: str) -> SessionView:
        """A view of another session through its file; the caller closes it."""
        return StoreView(session_directory(self._directory.parent, session_id))

    def close(self) -> None:
        """Close the file and the ring."""
        with self._reader_lock:
            for reader in (*self._retired, self._reader):
                if reader is not None:
                    reader.close()
            self._retired = []
            if self._ring is not None:
                self._ring.close()
            self._reader = self._ring = None


class _Verbs:
    """The verbs of a view, each one command."""

    def _perform(self, verb: str, **arguments: Any) -> CommandResult:
        raise NotImplementedError

    def cancel(self, task_id: str) -> CommandResult:
        """Cancel a task."""
        return self._perform("cancel", task_id=task_id)

    def retry(self, task_id: str) -> CommandResult:
        """Run a finished task again, as a new one."""
        return self._perform("retry", task_id=task_id)

    def reprioritise(self, task_id: str, priority: str) -> CommandResult:
        """Give a task another class: low, normal, high or critical."""
        return self._perform("reprioritise", task_id=task_id, priority=priority)

    def pause(self) -> CommandResult:
        """Start no new task until ``resume``."""
        return self._perform("pause")

    def resume(self) -> CommandResult:
        """Start tasks again."""
        return self._perform("resume")

    def resize(self, min_workers: int, max_workers: int) -> CommandResult:
        """Set the pool's bounds."""
        return self._perform("resize", min_workers=min_workers, max_workers=max_workers)

    def configure(self, changes: Mapping[str, Any]) -> CommandResult:
        """Change settings, all or none."""
        return self._perform("configure", changes=dict(changes))

    def acknowledge(self, alert_id: str) -> CommandResult:
        """Mark an open alert as seen."""
        return self._perform("acknowledge", alert_id=alert_id)

    def silence(self, alert_id: str, seconds: float) -> CommandResult:
        """Keep an open alert quiet for so long."""
        return self._perform("silence", alert_id=alert_id, seconds=seconds)

    def shutdown(self, mode: str = "cancel_pending") -> CommandResult:
        """End the session's work: drain, cancel_pending or now."""
        return self._perform("shutdown", mode=mode)


class LocalView(_StoredFrames, _Verbs):
    """The view of the session in this process: state from memory, frames from its file."""

    def __init__(self, session: LocalSession) -> None:
        super().__init__(session.directory)
        self._session = session

    def snapshot(self, since_rev: int = 0) -> Snapshot:
        """All that is drawn; see ``SessionView.snapshot``."""
        session = self._session
        rev = session.task_rev()
        return Snapshot(
            info=session.info,
            time_seconds=session.now(),
            rev=rev,
            sample=session.latest(),
            tasks=session.task_records(since_rev),
            task_counts={state: count for state, count in session.task_counts().items() if count},
            pool=session.pool_status(),
            alerts=alert_views(session.alert_transitions(), session.acknowledged()),
            cells=tuple(session.cell_records())[-SHOWN_CELLS:],
            settings=session.setting_values(),
            thresholds=session.thresholds(),
            paused=session.paused(),
            shutdown_at_seconds=session.shutdown_at(),
            hold_reason=session.hold_reason(),
            reset=since_rev == 0,
        )

    def task(self, task_id: str) -> TaskRecord | None:
        """One task with everything known."""
        return self._session.task_record(task_id)

    def task_history(self) -> pd.DataFrame:
        """Every task: one row each, indexed by its id."""
        return task_frame(self._session.task_records(0))

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


class StoreView(_StoredFrames, _Verbs):
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
        self._folded: tuple[Any, tuple[AlertView, ...]] | None = None
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
        tasks = store.tasks(0 if reset else since_rev)
        counts = store.task_counts()
        if info.state is not SessionState.LIVE:
            tasks = [after_the_end(task) for task in tasks]
            counts = counts_after_the_end(counts)
        return Snapshot(
            info=info,
            time_seconds=now,
            rev=max([since_rev, *(task.rev for task in tasks)]),
            sample=self._latest(),
            tasks=tuple(tasks),
            task_counts=counts,
            pool=from_json_dict(PoolStatus, meta.get("pool", {})),
            alerts=self._alerts(store),
            cells=tuple(store.cells(SHOWN_CELLS)),
            settings=dict(meta.get("settings", {})),
            thresholds=thresholds_from(meta),
            paused=bool(meta.get("paused", False)),
            shutdown_at_seconds=float(meta.get("shutdown_at") or NAN),
            hold_reason=str(meta.get("hold_reason") or ""),
            reset=reset,
        )

    def _alerts(self, store: StoreReader) -> tuple[AlertView, ...]:
        transitions, acknowledged = store.alerts(), store.acknowledged()
        # Folded anew only when there is something new; the newest one is the very object it was.
        key = (id(store), len(transitions), transitions[-1] if transitions else None, acknowledged)
        folded = self._folded
        if folded is None or folded[0] != key:
            folded = self._folded = (key, alert_views(transitions, acknowledged))
        return folded[1]

    def task(self, task_id: str) -> TaskRecord | None:
        """One task with everything known."""
        task = self._store().task(task_id)
        if task is None or self.info.state is SessionState.LIVE:
            return task
        return after_the_end(task)

    def task_history(self) -> pd.DataFrame:
        """Every task: one row each, indexed by its id; what was in flight at the end reads lost."""
        tasks = self._store().tasks(0, 10_000_000)
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
            uri = database_uri(self._directory / DATABASE_NAME, "rw")
            with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None, timeout=2.0)) as connection:
                now = self._clock.time()
                return send(connection, verb, arguments, who=sender(), now=now, timeout=self._timeout)
        except (WiseflowError, sqlite3.Error) as error:
            return CommandResult(False, str(error))


def alert_views(transitions: Iterable[AlertTransition], acknowledged: frozenset[str]) -> tuple[AlertView, ...]:
    """Fold transitions (oldest first) into one row an alert: open ones first, newest first."""
    views: dict[str, AlertView] = {}
    for item in transitions:
        views[item.alert_id] = alert_view(item, views.get(item.alert_id), acknowledged=item.alert_id in acknowledged)
    ordered = sorted(views.values(), key=lambda view: (not math.isnan(view.resolved_seconds), -view.started_seconds))
    return tuple(ordered[:SHOWN_ALERTS])


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
    raise SessionNotFoundError(f"no session is recorded in {where}; load the extension in a notebook first")


def wiseflow_version() -> str:
    """The version of this package."""
    import wiseflow_nb

    return str(wiseflow_nb.__version__)
