"""What every view of a session tells, whatever it reads from: the report, Prometheus text, tables as files."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from wiseflow_nb.errors import UsageError
from wiseflow_nb.frames import EXPORTS, export_frame
from wiseflow_nb.metrics import metrics_text
from wiseflow_nb.records import Snapshot
from wiseflow_nb.report._gather import gather
from wiseflow_nb.report._report import Report


class Telling:
    """The telling half of a view; the view gives the snapshot, the samples, the file and who the machine is."""

    @staticmethod
    def _identify() -> Any:
        """The identity of this process: its ``host``, ``boot_id`` and ``pid_namespace`` are looked at."""
        raise NotImplementedError

    @staticmethod
    def _count_kills(paths: Sequence[str]) -> float:
        """The OOM kills that these files count now."""
        raise NotImplementedError

    @staticmethod
    def _still_runs(identity: Any) -> bool | None:
        """Whether the process of an identity, as the record has it, still runs; None where that cannot be seen."""
        raise NotImplementedError

    def snapshot(self, since_rev: int = 0) -> Snapshot:
        raise NotImplementedError

    def rows(self, since_seconds: float = ..., until_seconds: float = ...) -> Any:
        raise NotImplementedError

    def _store(self) -> Any:
        raise NotImplementedError

    def _barrier(self) -> None:
        raise NotImplementedError

    def report(self) -> Report:
        """How the session stands or ended: what was running, the last minutes, the likeliest cause."""
        self._barrier()
        store, now, here = self._store(), time.time(), self._identify()
        boot = psutil.boot_time()
        facts = gather(
            store,
            self.rows,
            store.info(now),
            now=now,
            host=here.host,
            boot_id=here.boot_id,
            boot_seconds=boot,
            pid_namespace=here.pid_namespace,
            count_kills=self._count_kills,
            still_runs=self._still_runs,
        )
        return Report.of(facts)

    def metrics(self) -> str:
        """How things stand, as Prometheus text; see ``wiseflow_nb.metrics``.

        Raises
        ------
        MissingExtraError
            If prometheus-client is not installed.
        """
        return metrics_text(self.snapshot())

    def export(self, path: str | os.PathLike[str], what: str = "history") -> Path:
        """Write history, tasks, alerts, cells or events to ``path``: Parquet or CSV, by its suffix.

        Raises
        ------
        UsageError
            If there is no such table, or the suffix is neither.
        MissingExtraError
            If Parquet is asked for and pyarrow is not installed.
        """
        if what not in EXPORTS:
            raise UsageError(f"there is no table {what[:64]!r}; give one of {', '.join(EXPORTS)}")
        return export_frame(getattr(self, EXPORTS[what])(), Path(path))
