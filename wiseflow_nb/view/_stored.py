"""The reading half that both views share: frames, chart data and reports, from the file and the ring."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wiseflow_nb.config import load_settings
from wiseflow_nb.errors import ConfigurationError, WiseflowError
from wiseflow_nb.frames import alert_frame, cell_frame, command_frame, event_frame, span_frame
from wiseflow_nb.records import (
    SAMPLE_COLUMNS,
    AlertTransition,
    AlertView,
    EventRecord,
    Sample,
    SessionInfo,
    alert_view,
)
from wiseflow_nb.report import Telling
from wiseflow_nb.resources._container import count_kills
from wiseflow_nb.resources._ring import RingReader
from wiseflow_nb.store.finding import Over, all_sessions
from wiseflow_nb.store.identity import identify, still_runs
from wiseflow_nb.store.paths import RING_NAME
from wiseflow_nb.store.reader import (
    StoreReader,
    fit_columns,
    info_from_meta,
    thresholds_from,
)

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from wiseflow_nb.resources._archive import Archive
    from wiseflow_nb.resources._history import Moment, Resolution


SHOWN_ALERTS = 200


class StoredFrames(Telling):
    """The reading half that both views share: frames and chart data come from the file and the ring."""

    _identify = staticmethod(identify)
    _count_kills = staticmethod(count_kills)
    _still_runs = staticmethod(still_runs)

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._reader_lock = threading.Lock()
        self._reader: StoreReader | None = None
        self._retired: list[StoreReader] = []
        self._ring: RingReader | None = None
        self._over: Over = {}

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
        meta = self._store().meta()
        info = info_from_meta(meta, self._directory, time.time())
        attrs = {
            "session_id": info.session_id,
            "host": info.host,
            "limit_source": info.limit_source,
            "version": wiseflow_version(),
            "probe_path": str(meta.get("probe_path", "")),
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
        """Every event: one row each, indexed by time, in order of time."""
        self._barrier()
        # Not as they were written: they come from two processes, and what waited longer is written later.
        rows = self._store().query("SELECT time_seconds, kind, message, data FROM events ORDER BY time_seconds, id")
        # The decoder's own function: what ``loads`` does around it takes longer than a short text.
        decode = json.JSONDecoder().raw_decode
        return event_frame(EventRecord(row[0], row[1], row[2], decode(row[3] or "{}")[0]) for row in rows)

    def commands(self) -> pd.DataFrame:
        """Every command but the leases of those who watch: who asked what and when, and what came of it."""
        self._barrier()
        return command_frame(self._store().commands())

    def sessions(self) -> list[SessionInfo]:
        """Every session of this user, live ones first, newest first."""
        return all_sessions(self._state_dir(), time.time(), self._directory.parent, over=self._over)

    @staticmethod
    def _state_dir() -> str:
        """The setting in force, as ``wiseflow_nb.sessions()`` has it; where it cannot be read, the usual places."""
        try:
            return load_settings().state_dir
        except ConfigurationError:
            return ""

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


def alert_views(transitions: Iterable[AlertTransition], acknowledged: frozenset[str]) -> tuple[AlertView, ...]:
    """Fold transitions (oldest first) into one row an alert: open ones first, newest first."""
    views: dict[str, AlertView] = {}
    for item in transitions:
        views[item.alert_id] = alert_view(item, views.get(item.alert_id), acknowledged=item.alert_id in acknowledged)
    ordered = sorted(views.values(), key=lambda view: (not math.isnan(view.resolved_seconds), -view.started_seconds))
    return tuple(ordered[:SHOWN_ALERTS])


def wiseflow_version() -> str:
    """The version of this package."""
    import wiseflow_nb

    return str(wiseflow_nb.__version__)
