"""How records travel to the recorder: tasks and their transitions packed, all others as JSON, their text bounded."""

from __future__ import annotations

import enum
import marshal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from itertools import chain
from operator import attrgetter
from typing import Any

from wiseflow_nb.errors import RecorderError
from wiseflow_nb.recorder.protocol import decode, encode
from wiseflow_nb.records import NAN, TaskRecord, TaskTransition, text_of, to_json_dict
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
_FREE_TEXTS = [
    TASK_COLUMNS.index(name) for name in ("name", "progress_text", "reason", "error", "traceback", "output_tail")
]
_PLAIN = {str, float, int, tuple}
_LISTS = [TASK_COLUMNS.index(name) for name in ("dependencies", "tags")]


def _kinds(record: type[Any], columns: Sequence[str]) -> tuple[type, ...]:
    """What each column holds: ``str``, ``float``, ``int`` or ``tuple``; members of enumerations as their values."""
    known: dict[str, type] = {"str": str, "float": float, "int": int, "Priority": int, "TaskState": str}
    told = {item.name: known.get(str(item.type), tuple) for item in fields(record)}
    return tuple(told[name] for name in columns)


_TASK_KINDS = _kinds(TaskRecord, TASK_COLUMNS)
_TRANSITION_KINDS = _kinds(TaskTransition, TRANSITION_COLUMNS)


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
    left_out = 0
    if tasks or transitions:
        packed, bad = _plain_rows("task", tasks, _PLAIN_TASK, _TASK_KINDS)
        moves, bad_moves = _plain_rows("transition", transitions, _PLAIN_TRANSITION, _TRANSITION_KINDS)
        left_out = bad + bad_moves
        tail = marshal.dumps((packed, moves))
        if len(tail) > MAX_TEXT:  # else no text in it can be too long
            for number, row in enumerate(packed):
                if sum(len(row[place]) for place in _FREE_TEXTS) > MAX_TEXT:
                    packed[number] = tuple(map(_cut, row))
                    tail = b""
            tail = tail or marshal.dumps((packed, moves))
    body = []
    for table, record in rows:
        try:
            body.append(row_of(table, record))
        except Exception:  # noqa: BLE001  an event's data may be anything: copying it calls the user's code
            left_out += 1
    message = {"t": "batch", "seq": seq, "rows": body, "packed": len(tail)}
    try:
        return encode(message) + tail, left_out
    except (TypeError, ValueError, RecursionError):
        kept = [row for row in body if _encodable(row)]
        return encode({**message, "rows": kept}) + tail, left_out + len(body) - len(kept)


def _plain_rows(
    table: str, records: Sequence[Any], getter: Callable[[Any], tuple[Any, ...]], kinds: tuple[type, ...]
) -> tuple[list[tuple[Any, ...]], int]:
    """Return the values of records, each exactly of its column's kind, and how many records are none.

    ``marshal`` asks for exactly that: of whatever else has a buffer, as numpy's texts and numbers do, it
    writes the bytes.
    """
    try:
        rows = list(map(getter, records))
        # All at once where all is as it should be, which is nearly always. (A number in the place of a text
        # becomes one in the file.)
        odd = set(map(type, chain.from_iterable(rows))) - _PLAIN
        lists = _LISTS if table == "task" else []
        if not odd and all(set(map(type, chain.from_iterable(row[at] for row in rows))) <= {str} for at in lists):
            return rows, 0
    except (AttributeError, TypeError):
        pass
    rows, bad = [], 0
    for record in records:
        try:
            values = [item.value if isinstance(item, enum.Enum) else item for item in _GETTERS[table](record)]
        except AttributeError:
            bad += 1
            continue
        rows.append(tuple(map(_as, kinds, values)))
    return rows, bad


def _as(kind: type, value: Any) -> Any:
    """A value as its column's kind: a number that is none becomes NaN or 0, a text that is none its ``str``."""
    if kind is str:
        return text_of(value)
    if kind is tuple:
        return tuple(map(text_of, value)) if isinstance(value, (tuple, list, set)) else ()
    try:
        return float.__float__(float(value)) if kind is float else int.__index__(int(value))
    except Exception:  # noqa: BLE001  the user's own __float__
        return NAN if kind is float else 0


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
        # What is no row of a task is for the writer to judge.
        try:
            if row[0] == "task":
                tasks[row[1][0]] = row
                continue
        except (TypeError, KeyError, IndexError):
            pass
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
