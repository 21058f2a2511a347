"""What a dashboard sees of a session, and what a view needs of the session in its own process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from wiseflow_nb.records import (
    AlertTransition,
    CellRecord,
    CommandResult,
    PoolStatus,
    Sample,
    SessionInfo,
    Snapshot,
    TaskRecord,
)

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from wiseflow_nb.resources._history import Moment, Resolution


class SessionView(Protocol):
    """One session, live or ended, in this process or another.

    Reading never writes. A verb never raises for what the other side decided: it answers with a
    ``CommandResult`` whose message can be shown to a person. A view may be used from any thread.
    """

    def snapshot(self, since_rev: int = 0) -> Snapshot:
        """All that is drawn; ``tasks`` only those changed after ``since_rev``.

        With 0, or where more than 1,000 have changed, ``reset`` is set and they are a first picture, the
        same in some milliseconds whatever there is: the 500 tasks that changed last, and of the older
        ones up to 500 that have not ended (those that run first). ``task_counts`` are over all. The
        others come by ``task_records(until_rev=snapshot.older_rev, limit=...)``, page after page.
        """
        ...

    def task_records(self, *, until_rev: int | None = None, limit: int | None = None) -> tuple[TaskRecord, ...]:
        """The tasks by their last change, the newest first.

        Parameters
        ----------
        until_rev
            Only those whose ``rev`` is at most this: the page after one whose last task has ``rev`` 7 is
            that until 6. Default: all.
        limit
            How many at most. Default: all there are, which with a million takes seconds.

        Examples
        --------
        >>> from wiseflow_nb import Session
        >>> with Session() as session:
        ...     done = [session.tasks.submit(abs, number).result(timeout=10) for number in (-1, -2, -3)]
        ...     page = session.view.task_records(limit=2)
        ...     rest = session.view.task_records(until_rev=page[-1].rev - 1)
        >>> [task.task_id for task in (*page, *rest)]
        ['t3', 't2', 't1']
        """
        ...

    def series(
        self, columns: Sequence[str], since_seconds: float, max_points: int = 3600
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Chart data from ``since_seconds`` (epoch) on: times (n,) and one (n,) float64 array a column.

        A column is one of ``SAMPLE_COLUMNS`` or, for a counter ``x_total``, its rate ``x_per_second``.
        A gap is a row of NaN. More than ``max_points`` samples are decimated, minima and maxima kept;
        what is older than the raw samples comes from the finest tier that reaches back so far. The times
        never go back: where the clock was set back, the points of both passes are side by side.
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
            where it names no zone; ``"now"``, ``"today"`` and times without a day are refused), or a
            time before the newest sample such as ``"-15min"``. Default: all there is.
        resolution
            Samples are kept as they are for an hour, in buckets of 10 s for a day and of 60 s for a
            week. ``None``: the finest of these that reaches back to ``since``; ``"raw"``, ``"10s"``
            or ``"60s"``: that one, as far as it reaches; any other span up to 7 days (seconds, or as
            ``"5min"``): rolled up, exactly, from the coarsest that divides it. Where that does not
            reach back to ``since``, from the finest that does: a bucket goes to the span in which it
            begins, and a span below its own becomes that (``attrs`` tell both).
        rates
            Add ``<counter>_per_second`` for every column ``<counter>_total``; NaN in the first row
            there is and across gaps. A counter that is read seldom, as it is dear, has the mean rate
            between two readings in all rows between them.

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
    def dropped_task_rev(self) -> int: ...
    def task_records(self, since_rev: int) -> tuple[TaskRecord, ...]: ...
    def unfinished_tasks(self) -> Sequence[TaskRecord]: ...
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
