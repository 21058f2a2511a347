"""What a session answers through its view."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wiseflow_nb.report import Report
from wiseflow_nb.view._views import LocalView

if TYPE_CHECKING:
    import pandas as pd


class ByView:
    """The frames, the report and the figures of what has a ``view``."""

    view: LocalView

    def history(self, **options: Any) -> pd.DataFrame:
        """The samples: one row each with a UTC index; ``since=``, ``until=``, ``resolution=``, ``rates=``.

        Without a resolution it is the finest that reaches back to ``since``: raw for the last hour, 10 s
        for a day, 60 s for a week. See ``SessionView.history``.
        """
        return self.view.history(**options)

    def summary(self, **options: Any) -> pd.DataFrame:
        """One row a column: min, mean, p95, max, last, seconds over its thresholds; ``options`` go to ``history``."""
        return self.view.summary(**options)

    def busiest(self, n: int = 10, *, by: str = "cpu_utilization_ratio", **options: Any) -> pd.DataFrame:
        """The ``n`` minutes in which a column was highest, with the cells and tasks that ran in them."""
        return self.view.busiest(n, by=by, **options)

    def task_history(self) -> pd.DataFrame:
        """The tasks: one row each, indexed by id."""
        return self.view.task_history()

    def alert_history(self) -> pd.DataFrame:
        """The alert transitions: one row each, indexed by time."""
        return self.view.alert_history()

    def cell_history(self) -> pd.DataFrame:
        """The cell executions: one row each, indexed by their start."""
        return self.view.cell_history()

    def events(self) -> pd.DataFrame:
        """The events: one row each, indexed by time."""
        return self.view.events()

    def commands(self) -> pd.DataFrame:
        """The commands that dashboards and this kernel gave: who, when, what, and what came of it."""
        return self.view.commands()

    def report(self) -> Report:
        """How the session stands: what runs, the last minutes, alerts; shows itself in a notebook."""
        return self.view.report()

    def metrics(self) -> str:
        """How things stand, as Prometheus text (extra ``prometheus``)."""
        return self.view.metrics()

    def plot(self, *, theme: str = "light", **options: Any) -> Any:
        """The history as a themed ``plotly.graph_objects.Figure`` (light or dark); ``options`` go to ``history``.

        Thresholds are bands; cells and alerts are marked on the time axis.
        """
        return self.view.plot(theme=theme, **options)

    def export(self, path: str | os.PathLike[str], what: str = "history") -> Path:
        """Write history, tasks, alerts, cells or events: Parquet for ``.parquet`` (extra), CSV for ``.csv``.

        Raises
        ------
        UsageError, MissingExtraError
            If the suffix is neither or there is no such table; if Parquet needs pyarrow.
        """
        return self.view.export(path, what)
