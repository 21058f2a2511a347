"""What can be asked for a task, checked in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from wiseflow_nb.errors import UsageError
from wiseflow_nb.pool._process import check_kind
from wiseflow_nb.records import Priority, text_of
from wiseflow_nb.tasks._admission import parse_size
from wiseflow_nb.tasks._retry import Retry
from wiseflow_nb.tasks.task import Task

TRIGGERS = ("all_completed", "all_done")
NO_RETRY = Retry()
KINDS = ("auto", "thread", "async", "process")
#: What a cleanup handler may take, in seconds.
CLEANUP_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """The options of a task.

    ``timeout`` (each attempt), ``deadline`` (from submit) and ``cleanup_budget`` are seconds,
    ``memory`` is bytes.
    """

    name: str = ""
    priority: Priority = Priority.NORMAL
    dependencies: tuple[Task[Any] | str, ...] = ()
    retry: Retry = NO_RETRY
    timeout: float | None = None
    deadline: float | None = None
    cleanup: Callable[..., Any] | None = None
    cleanup_always: bool = False
    cleanup_budget: float = CLEANUP_SECONDS
    tags: tuple[str, ...] = ()
    trigger: str = "all_completed"
    memory: float | None = None
    kind: str = "auto"
    keep_result: bool = True
    idempotent: bool | None = None

    def changed(self, given: Mapping[str, Any]) -> TaskOptions:
        """Return the options with some of them changed.

        Raises
        ------
        UsageError
            If an option is unknown or a value does not fit; it names what is allowed.
        """
        known = [item.name for item in fields(self)]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise UsageError(f"unknown option {', '.join(unknown)}; the options are: {', '.join(known)}")
        return replace(self, **{name: _checked(name, value) for name, value in given.items()})


def _checked(name: str, value: Any) -> Any:
    if name == "priority":
        try:
            return Priority.parse(value)
        except ValueError as error:
            raise UsageError(str(error)) from None
    if name == "retry":
        return Retry.parse(0 if value is None else value)
    if name == "dependencies":
        return tuple(_several(name, value, (Task, str)))
    if name == "tags":
        return tuple(map(text_of, _several(name, value, (str,))))
    if name == "memory" and value is not None:
        return parse_size(value)
    if name in ("cleanup_always", "keep_result") and not isinstance(value, bool):
        raise UsageError(f"{name} {value!r} is neither True nor False; give one of them")
    if name == "cleanup_budget" or (name in ("timeout", "deadline") and value is not None):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise UsageError(
                f"{name} {value!r} is not a time; give seconds above 0{'' if name == 'cleanup_budget' else ', or None'}"
            )
        return float(value)
    if name == "cleanup" and value is not None and not callable(value):
        raise UsageError(f"cleanup {value!r} cannot be called; give a function")
    if name == "trigger" and value not in TRIGGERS:
        raise UsageError(f"trigger {value!r} is unknown; give one of {', '.join(TRIGGERS)}")
    if name == "kind" and value not in KINDS:
        raise UsageError(f"kind {value!r} is not supported; give one of {', '.join(KINDS)}")
    if name == "kind" and value == "process":
        return check_kind(value)
    if name == "idempotent" and not (value is None or isinstance(value, bool)):
        raise UsageError(f"idempotent {value!r} is neither True nor False; give one of them, or None")
    if name == "name":
        return text_of(value)
    return value


def _several(name: str, value: Any, kinds: tuple[type, ...]) -> list[Any]:
    items = [value] if isinstance(value, kinds) else list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(item, kinds) for item in items):
        allowed = " or ".join(kind.__name__ for kind in kinds)
        raise UsageError(f"{name} {value!r} does not fit; give a list of {allowed}")
    return items


def kind_of(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: TaskOptions) -> str:
    """Where a call is to run: ``thread``, ``process`` or ``async``.

    Raises
    ------
    UsageError
        If it cannot be called, or a coroutine object is asked for what it cannot do.
    """
    if inspect.iscoroutine(fn):
        if args or kwargs or options.retry.times or options.kind in ("thread", "process"):
            raise UsageError("a coroutine object takes no arguments, runs once and on a loop; submit its function")
        return "async"
    if not callable(fn):
        raise UsageError(f"{fn!r} cannot be called; give a function or a coroutine")
    if options.kind != "auto":
        return options.kind
    called = getattr(fn, "__call__", None)  # noqa: B004  for instances whose __call__ is asynchronous
    return "async" if inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(called) else "thread"
