"""What a dashboard sees of a session, and the verbs it may use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from wiseflow_nb.records import CommandResult, SessionInfo, Snapshot, TaskRecord

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


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
        A gap is a row of NaN. More than ``max_points`` samples are decimated, minima and maxima kept.
        """
        ...

    def task(self, task_id: str) -> TaskRecord | None:
        """One task with everything known (traceback and output included)."""
        ...

    def history(self, **options: Any) -> pd.DataFrame: ...

    def task_history(self) -> pd.DataFrame: ...

    def alert_history(self) -> pd.DataFrame: ...

    def cell_history(self) -> pd.DataFrame: ...

    def events(self) -> pd.DataFrame: ...

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
