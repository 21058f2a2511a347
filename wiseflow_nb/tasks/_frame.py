"""The tasks as a DataFrame that is patched, not built: one array a column, only changed rows are written."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from wiseflow_nb.records import TaskRecord

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

_NAMES = tuple(item.name for item in fields(TaskRecord))
_TIMES = frozenset({"created_seconds", "ready_seconds", "started_seconds", "finished_seconds"})
_NUMBERS = {"float": "float64", "int": "int64"}
_DTYPES = {
    item.name: "datetime64[ns]" if item.name in _TIMES else _NUMBERS.get(str(item.type), "object")
    for item in fields(TaskRecord)
}
_FIRST_SIZE = 64


class TaskFrame:
    """Columns that follow the records. No lock of its own."""

    def __init__(self) -> None:
        #: The revision up to which the columns tell the truth.
        self.rev = 0
        self._rows: dict[str, int] = {}
        self._columns: dict[str, np.ndarray[Any, Any]] = {}

    def patched(
        self, changed: Sequence[TaskRecord], new: Sequence[str], known: Container[str], count: int
    ) -> pd.DataFrame:
        """Write the changed records and return a frame of its own.

        Parameters
        ----------
        changed
            Records that changed after ``rev``, in order of change.
        new
            The ids among them that were not there before, in order of creation.
        known, count
            The ids of the tasks that there are, and how many: the others were dropped.
        """
        import numpy as np

        for task_id in new:
            self._rows[task_id] = len(self._rows)
        self._fit(np)
        if changed:
            rows = [self._rows[record.task_id] for record in changed]
            for name, column in self._columns.items():
                column[rows] = _values(name, changed, np)
            self.rev = max(record.rev for record in changed)
        if len(self._rows) > count:
            kept = [row for task_id, row in self._rows.items() if task_id in known]
            self._columns = {name: column[kept] for name, column in self._columns.items()}
            self._rows = {task_id: row for row, task_id in enumerate(self._columns["task_id"])}
        return self._copy()

    def __len__(self) -> int:
        return len(self._rows)

    def has(self, task_id: str) -> bool:
        """Whether the task has a row."""
        return task_id in self._rows

    def _fit(self, np: Any) -> None:
        size = len(next(iter(self._columns.values()), ()))
        if len(self._rows) > size or not self._columns:
            larger = max(_FIRST_SIZE, len(self._rows), 2 * size)
            for name in _NAMES:
                column = np.empty(larger, dtype=_DTYPES[name])
                column[:size] = self._columns.get(name, column[:0])
                self._columns[name] = column

    def _copy(self) -> pd.DataFrame:
        import pandas as pd

        count = len(self._rows)
        columns: dict[str, Any] = {}
        for name in _NAMES[1:]:
            values = self._columns[name][:count].copy()
            if name in _TIMES:
                columns[name.removesuffix("_seconds")] = pd.DatetimeIndex(values, tz="UTC", copy=False)
            else:
                # With the type given, text is left as it is: looking at every value costs more than all the rest.
                columns[name] = pd.Series(values, dtype=values.dtype, copy=False)
        index = pd.Index(self._columns["task_id"][:count].copy(), dtype=object, name="task_id")
        return pd.DataFrame(columns, copy=False).set_axis(index)


def _values(name: str, records: Sequence[TaskRecord], np: Any) -> Any:
    if name == "state":
        found: list[Any] = [record.state.value for record in records]
    elif name == "priority":
        found = [record.priority.name.lower() for record in records]
    else:
        found = [getattr(record, name) for record in records]
    if name in _TIMES:
        # To the microsecond, which is what seconds since 1970 hold in a float; NaN becomes NaT.
        seconds = np.array(found, dtype="float64")
        known = ~np.isnan(seconds)
        values = np.full(len(found), np.datetime64("NaT", "ns"))
        values[known] = np.round(seconds[known] * 1e6).astype("int64").astype("datetime64[us]")
        return values
    values = np.empty(len(found), dtype=_DTYPES[name])
    values[:] = found
    return values
