"""A cell's code run as a task, on a copy of the notebook's names."""

from __future__ import annotations

import linecache
from collections.abc import Mapping
from types import CodeType
from typing import Any


class CellResult(dict[str, Any]):
    """The names that a task's code bound, with their values."""


class CellCode:
    """Compiled code and the names it sees; calling it runs the code once.

    The rule: the code sees the notebook's names as they were when the task was submitted, then the
    names handed back by the tasks it comes after. It works on a copy, so what it binds is not seen
    by the notebook; objects themselves are shared, not copied, so changing one in place is seen by
    both. What comes back is a dict of the names that the code bound to a new object, without those
    that start with an underscore.
    """

    def __init__(self, source: str, name: str, names: Mapping[str, Any]) -> None:
        self.__name__ = name
        filename = f"<task {name}>"
        self._code: CodeType = compile(source, filename, "exec")
        self._names = dict(names)
        # Tracebacks show the task's own lines; an entry without a modification time is kept.
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)

    def __call__(self, *results: Any) -> CellResult:
        """Run the code; ``results`` are those of the tasks it comes after."""
        names = dict(self._names)
        for result in results:
            if isinstance(result, CellResult):
                names.update(result)
        before = dict(names)
        exec(self._code, names)
        return CellResult(
            (key, value)
            for key, value in names.items()
            if not key.startswith("_") and (key not in before or before[key] is not value)
        )
