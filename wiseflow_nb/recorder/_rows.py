"""How records travel to the recorder: tasks and their transitions packed, all others as JSON, their text bounded."""

from __future__ import annotations

import marshal
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any

from wiseflow_nb.errors import RecorderError
from wiseflow_nb.recorder.protocol import decode, encode
from wiseflow_nb.records import TaskRecord, TaskTransition, to_json_dict
from wiseflow_nb.store.schema import TASK_COLUMNS, TRANSITION_COLUMNS
from wiseflow_nb.store.writer import MAX_TEXT

#: Tables whose records travel as lists: a dict of thirty names costs five times as much.
_GETTERS: dict[str, Callable[[Any], Sequence[Any]]] = {
    "task": attrgetter(*TASK_COLUMNS),
    "transition": attrgetter(*TRANSITION_COLUMNS),
}
#: The same with plain values for the members of enumerations: what ``marshal`` has words for.
_PLAIN_TASK: Callable[[TaskRecord], tuple[Any, ...]] = attrgetter(
    *(f"{name}._value_" if name in ("state", "priority") else name for name in TASK_COLUMNS)
)
_PLAIN_TRANSITION: Callable[[TaskTransition], tuple[Any, ...]] = attrgetter(
    *(f"{name}._value_" if name == "to_state" else name for name in TRANSITION_COLUMNS)
)
_FREE_TEXTS = attrgetter("name", "progress_text", "reason", "error", "traceback", "output_tail")


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


def batch_line(
    seq: int,
    others: Iterable[tuple[str, Any]],
    tasks: Sequence[TaskRecord] = (),
    transitions: Sequence[TaskTransition] = (),
) -> tuple[bytes, int]:
    """Return the bytes of a batch, and how many rows were left out since JSON has no word for them.

    A line of JSON with all rows but those of tasks and transitions, of which there are most: they follow
    it, packed, as many bytes as the line says. Both ends are one interpreter, and it costs a tenth.
    """
    rows, tail = list(others), b""
    if tasks or transitions:
        try:
            tail = _packed(tasks, transitions)
            if len(tail) > MAX_TEXT:  # else no text in it can be too long
                long = [task for task in tasks if sum(map(len, _FREE_TEXTS(task))) > MAX_TEXT]
                if long:
                    rows += [("task", task) for task in long]
                    tail = _packed([task for task in tasks if task not in long], transitions)
        except (AttributeError, ValueError):
            # A name, perhaps, of a class that was made from ``str``.
            rows += [*(("task", task) for task in tasks), *(("transition", move) for move in transitions)]
            tail = b""
    body = [row_of(*row) for row in rows]
    message = {"t": "batch", "seq": seq, "rows": body, "packed": len(tail)}
    try:
        return encode(message) + tail, 0
    except (TypeError, ValueError, RecursionError):
        kept = [row for row in body if _encodable(row)]
        return encode({**message, "rows": kept}) + tail, len(body) - len(kept)


def _packed(tasks: Sequence[TaskRecord], transitions: Sequence[TaskTransition]) -> bytes:
    return marshal.dumps((list(map(_PLAIN_TASK, tasks)), list(map(_PLAIN_TRANSITION, transitions))))


def unpacked(tail: bytes) -> list[Any]:
    """Return the rows that were packed.

    Raises
    ------
    RecorderError
        If they are none.
    """
    try:
        tasks, transitions = marshal.loads(tail)
        return [*(("task", row) for row in tasks), *(("transition", row) for row in transitions)]
    except (ValueError, EOFError, TypeError) as error:
        raise RecorderError("what follows a batch on the recorder's pipe are not its rows") from error


def rows_of(batch: bytes) -> list[Any]:
    """Return all rows of what ``batch_line`` gave.

    Examples
    --------
    >>> rows_of(batch_line(1, [("meta", {"key": "paused", "value": "true"})])[0])
    [['meta', {'key': 'paused', 'value': 'true'}]]
    """
    line, _, tail = batch.partition(b"\n")
    rows: list[Any] = decode(line)["rows"]
    return [*rows, *unpacked(tail)] if tail else rows


def newest_rows(rows: Iterable[Sequence[Any]]) -> list[Sequence[Any]]:
    """Return the rows without those of tasks that a later one replaces: of many short batches one commit is made.

    Examples
    --------
    >>> newest_rows([["task", ["t1", 1]], ["event", [2]], ["task", ["t1", 3]]])
    [['event', [2]], ['task', ['t1', 3]]]
    """
    tasks: dict[Any, Sequence[Any]] = {}
    others: list[Sequence[Any]] = []
    for row in rows:
        if row[0] == "task":
            tasks[row[1][0]] = row
        else:
            others.append(row)
    return [*others, *tasks.values()]


def _encodable(row: list[Any]) -> bool:
    try:
        encode({"t": "row", "row": row})
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _cut(value: Any) -> Any:
    return f"{value[: MAX_TEXT - 1]}…" if isinstance(value, str) and len(value) > MAX_TEXT else value
