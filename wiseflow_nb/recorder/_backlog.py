"""What waits to be written to the recorder, and what of it goes first where there is no room."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from wiseflow_nb.records import TaskRecord, TaskTransition

#: Tasks in one batch, and transitions: some megabytes at most.
TASKS_AT_ONCE = 4096
MOVES_AT_ONCE = 2 * TASKS_AT_ONCE
#: What is kept where there is no room: more tasks than the manager keeps once they have ended, of what
#: they went through some megabytes, and of the other tables what is worth the most and is the fewest.
OWED_LIMIT = 200_000
MOVES_LIMIT = 50_000
ROWS_LIMIT = 1000
_KEYED = {"cell": "cell_id", "meta": "key"}


class Backlog:
    """Tasks to be told, by id, at most once each; transitions; and rows of the other tables.

    A task is what gives its newest record when that is asked for. So without room nothing of it is lost
    but what it went through meanwhile: its last state is told when there is room again.

    Examples
    --------
    >>> backlog = Backlog()
    >>> backlog.add([("task", TaskRecord("t1", "load", "pending")), ("task", TaskRecord("t1", "load", "running"))])
    >>> [record.state for record in backlog.portion()[1]], bool(backlog)
    (['running'], False)
    """

    def __init__(self) -> None:
        self._owed: dict[str, Any] = {}
        self._moves: list[TaskTransition] = []
        self._rows: dict[Any, tuple[str, Any]] = {}
        self._number = 0
        #: Rows that were given up since the beginning, and how many of them were last states of tasks.
        self.dropped_rows = self.dropped_tasks = 0

    def __bool__(self) -> bool:
        return bool(self._owed or self._moves or self._rows)

    def add(self, items: Iterable[tuple[str, Any]]) -> None:
        """Take (table, record) pairs; of a task, a cell and a value of the meta table only the newest is kept."""
        owed, move = self._owed, self._moves.append
        for table, record in items:
            if table == "transition":
                move(record)
            elif table == "task":
                task_id = record.task_id
                if task_id in owed:
                    del owed[task_id]  # the one that changed last stands last
                owed[task_id] = record
            elif key := _KEYED.get(table):
                name = record[key] if isinstance(record, dict) else getattr(record, key)
                self._rows.pop((table, name), None)
                self._rows[(table, name)] = (table, record)
            else:
                self._number += 1
                self._rows[self._number] = (table, record)

    def portion(self) -> tuple[list[tuple[str, Any]], list[TaskRecord], list[TaskTransition]]:
        """Return what the next batch takes, and forget it: other rows, records of tasks, transitions."""
        ids = list(islice(self._owed, TASKS_AT_ONCE))
        tasks = [self._owed.pop(task_id) for task_id in ids]
        moves = self._moves[:MOVES_AT_ONCE]
        del self._moves[:MOVES_AT_ONCE]
        rows, self._rows = list(self._rows.values()), {}
        # Of what changes often the record is made here, once a batch.
        return rows, [getattr(item, "record", item) for item in tasks], moves

    def shed(self) -> int:
        """There is no room: give up the oldest of what is over the bounds; return how many rows that were."""
        lost = max(0, len(self._moves) - MOVES_LIMIT)
        del self._moves[:lost]
        self.dropped_tasks += max(0, len(self._owed) - OWED_LIMIT)
        for waiting, most in ((self._owed, OWED_LIMIT), (self._rows, ROWS_LIMIT)):
            for key in list(islice(waiting, max(0, len(waiting) - most))):
                del waiting[key]
                lost += 1
        self.dropped_rows += lost
        return lost
