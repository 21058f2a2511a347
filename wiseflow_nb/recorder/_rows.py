"""How records travel to the recorder: as lists where there are many of them, their text bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

from wiseflow_nb.recorder.protocol import encode
from wiseflow_nb.records import to_json_dict
from wiseflow_nb.store.schema import TASK_COLUMNS, TRANSITION_COLUMNS
from wiseflow_nb.store.writer import MAX_TEXT

#: Tables whose records travel as lists: a dict of thirty names costs five times as much.
_GETTERS: dict[str, Callable[[Any], Sequence[Any]]] = {
    "task": attrgetter(*TASK_COLUMNS),
    "transition": attrgetter(*TRANSITION_COLUMNS),
}


def row_of(table: str, record: Any) -> list[Any]:
    """Return ``[table, values]``; a text is cut to what the store keeps of it.

    Examples
    --------
    >>> row_of("meta", {"key": "paused", "value": "true"})
    ['meta', {'key': 'paused', 'value': 'true'}]
    """
    getter = _GETTERS.get(table)
    if getter is None or isinstance(record, dict):
        values = record if isinstance(record, dict) else to_json_dict(record)
        return [table, {key: _cut(value) for key, value in values.items()}]
    return [table, [_cut(value) if isinstance(value, str) else value for value in getter(record)]]


def batch_line(seq: int, rows: Iterable[tuple[str, Any]]) -> tuple[bytes, int]:
    """Return the line of a batch, and how many rows were left out since JSON has no word for them."""
    body = [row_of(*row) for row in rows]
    try:
        return encode({"t": "batch", "seq": seq, "rows": body}), 0
    except (TypeError, ValueError, RecursionError):
        kept = [row for row in body if _encodable(row)]
        return encode({"t": "batch", "seq": seq, "rows": kept}), len(body) - len(kept)


def _encodable(row: list[Any]) -> bool:
    try:
        encode({"t": "row", "row": row})
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _cut(value: Any) -> Any:
    return f"{value[: MAX_TEXT - 1]}…" if isinstance(value, str) and len(value) > MAX_TEXT else value
