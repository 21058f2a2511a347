"""Records as DataFrames: moments become UTC times named without their unit, durations stay seconds."""

from __future__ import annotations

import enum
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wiseflow_nb.errors import MissingExtraError, UsageError
from wiseflow_nb.records import (
    AlertTransition,
    AlertView,
    CellRecord,
    EventRecord,
    TaskRecord,
    to_json_dict,
    valid_text,
)

if TYPE_CHECKING:
    import pandas as pd

#: What can be exported, and the method of a session or a view that gives it.
EXPORTS = {
    "history": "history",
    "tasks": "task_history",
    "alerts": "alert_history",
    "cells": "cell_history",
    "events": "events",
    "commands": "commands",
}
#: Nanoseconds since the epoch reach to the year 2262.
LAST_MOMENT = 9.2e9
_MOMENTS = frozenset(
    {"created_seconds", "ready_seconds", "started_seconds", "finished_seconds", "time_seconds", "resolved_seconds"}
)


#: Fields whose values are shown as they are.
_PLAIN = frozenset({"str", "Mapping[str, Any]"})


def _frame(cls: type[Any], records: Iterable[Any], index: str) -> pd.DataFrame:
    import pandas as pd

    rows: Sequence[Any] = list(records)
    columns: dict[str, Any] = {}
    for item in fields(cls):
        values = [getattr(row, item.name) for row in rows]
        if item.name in _MOMENTS:
            columns[item.name.removesuffix("_seconds")] = _moments(values)
        elif str(item.type) == "float":
            columns[item.name] = pd.Series(values, dtype="float64")
        elif str(item.type) in _PLAIN:
            columns[item.name] = pd.Series(values, dtype="object")
        else:
            plain = [value.name.lower() if isinstance(value, enum.IntEnum) else _text(value) for value in values]
            columns[item.name] = pd.Series(plain, dtype="int64" if str(item.type) == "int" else "object")
    return pd.DataFrame(columns).set_index(index)


def _moments(values: Iterable[Any]) -> pd.Series:
    """UTC times of seconds since the epoch; NaT for what no calendar has: whoever can write a file can write anything."""
    import pandas as pd

    numbers = [value if type(value) in (int, float) and abs(value) < LAST_MOMENT else None for value in values]
    return pd.to_datetime(pd.Series(numbers, dtype="float64"), unit="s", utc=True)


def _text(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def task_frame(records: Iterable[TaskRecord]) -> pd.DataFrame:
    """One row a task, indexed by ``task_id``."""
    return _frame(TaskRecord, records, "task_id")


def alert_frame(records: Iterable[AlertTransition]) -> pd.DataFrame:
    """One row an alert transition, indexed by ``time``."""
    return _frame(AlertTransition, records, "time")


def cell_frame(records: Iterable[CellRecord]) -> pd.DataFrame:
    """One row a cell execution, indexed by ``started``."""
    return _frame(CellRecord, records, "started")


def event_frame(records: Iterable[EventRecord]) -> pd.DataFrame:
    """One row an event, indexed by ``time``."""
    return _frame(EventRecord, records, "time")


def span_frame(records: Iterable[CellRecord] | Iterable[AlertView]) -> pd.DataFrame:
    """Cells or alerts with their fields as they are, moments in seconds: what a figure marks."""
    import pandas as pd

    return pd.DataFrame([to_json_dict(record) for record in records])


def command_frame(rows: Iterable[Sequence[Any]]) -> pd.DataFrame:
    """One row a command, indexed by ``created``: who, verb, arguments (JSON), status, ok, message, finished."""
    import pandas as pd

    names = ["created", "who", "verb", "arguments", "status", "ok", "message", "finished"]
    frame = pd.DataFrame([tuple(row) for row in rows], columns=names)
    for name in ("created", "finished"):
        frame[name] = _moments(frame[name].tolist())
    known = [bool(value) if type(value) in (bool, int, float) and value in (0, 1) else None for value in frame["ok"]]
    frame["ok"] = pd.Series(known, dtype="boolean")
    return frame.set_index("created")


def finding_frame(findings: Iterable[Any]) -> pd.DataFrame:
    """One row a finding of an audit."""
    import pandas as pd

    rows = [(item.kind, item.subject, item.message, item.value) for item in findings]
    return pd.DataFrame(rows, columns=["kind", "subject", "message", "value"])


def export_frame(frame: pd.DataFrame, path: Path) -> Path:
    """Write a DataFrame as Parquet or CSV, by the path's suffix; return the path.

    The file appears whole or not at all: it is written beside its place and moved there. What is
    neither a number, a moment nor a text (tags, top processes, an event's data) is written as JSON.

    Raises
    ------
    UsageError
        If the suffix is neither.
    MissingExtraError
        If Parquet is asked for and pyarrow is not installed.
    OSError
        If it cannot be written.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise UsageError(f"cannot export to {str(path)!r}: the name must end in .parquet or .csv")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise MissingExtraError(
                'Parquet needs pyarrow: pip install "wiseflow-nb[parquet]", or export to .csv'
            ) from None
    plain = _plain(frame)
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        if path.suffix == ".csv":
            plain.to_csv(part, encoding="utf-8")
        else:
            plain.to_parquet(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy in which every cell is something that both formats have."""
    plain = frame.copy()
    for name in plain.columns:
        if plain[name].dtype == object:
            plain[name] = [_plain_cell(value) for value in plain[name]]
    # Parquet keeps the attributes, as JSON.
    plain.attrs = {str(key): str(value) for key, value in frame.attrs.items()}
    return plain


def _plain_cell(value: Any) -> Any:
    if isinstance(value, (tuple, list, Mapping)):
        value = json.dumps(value, default=str)
    if isinstance(value, str):
        return valid_text(value)
    return value
