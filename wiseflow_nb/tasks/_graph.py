"""Dependencies as values: tasks found in arguments, put in or swapped, and paths between tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from wiseflow_nb.tasks.task import Task

NodeT = TypeVar("NodeT")
#: Of these kinds nothing is a task or holds one.
PLAIN = frozenset({int, float, str, bytes, bool, type(None)})


def referenced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Task[Any]]:
    """Every task among the arguments, also one level deep in a list, tuple or dict, each once."""
    found: list[Task[Any]] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        kind = type(value)
        if kind is Task:
            found.append(value)
        elif kind not in PLAIN:
            found += [item for item in _members(value) if isinstance(item, Task)]
    return found if len(found) < 2 else list(dict.fromkeys(found))


def swapped(
    args: tuple[Any, ...], kwargs: dict[str, Any], swap: Callable[[Task[Any]], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with each task replaced by ``swap(task)``; containers without tasks stay the same objects."""
    kept = kwargs and {name: swapped_value(value, swap) for name, value in kwargs.items()}
    return tuple([swapped_value(value, swap) for value in args]), kept


def find_path(start: NodeT, goal: NodeT, edges: Callable[[NodeT], Iterable[NodeT]]) -> list[NodeT] | None:
    """Return the nodes from ``start`` to ``goal`` along ``edges``, both included, or None.

    Examples
    --------
    >>> find_path(1, 3, {1: [2], 2: [3], 3: []}.__getitem__)
    [1, 2, 3]
    """
    before: dict[int, NodeT | None] = {id(start): None}
    stack = [start]
    while stack:
        node = stack.pop()
        if node is goal:
            path = [node]
            while (previous := before[id(path[-1])]) is not None:
                path.append(previous)
            return path[::-1]
        for following in edges(node):
            if id(following) not in before:
                before[id(following)] = node
                stack.append(following)
    return None


def _members(value: Any) -> Iterator[Any]:
    if type(value) is dict:
        yield from value.values()
    elif type(value) in (list, tuple):
        yield from value
    else:
        yield value


def swapped_value(value: Any, swap: Callable[[Task[Any]], Any]) -> Any:
    """One argument with each task in it replaced."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, Task):
        return swap(value)
    if type(value) not in (list, tuple, dict) or not any(isinstance(item, Task) for item in _members(value)):
        return value
    if type(value) is dict:
        return {key: swap(item) if isinstance(item, Task) else item for key, item in value.items()}
    items = [swap(item) if isinstance(item, Task) else item for item in value]
    return items if type(value) is list else tuple(items)
