"""A manager seen through fixed options: a view that submits, and a decorated function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from wiseflow_nb.tasks._options import TaskOptions
from wiseflow_nb.tasks.task import Task

if TYPE_CHECKING:
    from wiseflow_nb.tasks.manager import TaskManager

P = ParamSpec("P")
T = TypeVar("T")


class TaskView:
    """Submits to a manager with fixed options; it owns nothing."""

    def __init__(self, manager: TaskManager, options: TaskOptions) -> None:
        self._manager, self._options = manager, options

    @overload
    def submit(self, fn: Callable[P, Coroutine[Any, Any, T]], /, *args: Any, **kwargs: Any) -> Task[T]: ...
    @overload
    def submit(self, fn: Callable[P, T], /, *args: Any, **kwargs: Any) -> Task[T]: ...
    @overload
    def submit(self, fn: Coroutine[Any, Any, T], /) -> Task[T]: ...
    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Task[Any]:
        """Submit a call with this view's options; see ``TaskManager.submit``."""
        return self._manager._submit(fn, args, kwargs, self._options)

    def map(self, fn: Callable[..., Any], /, *iterables: Iterable[Any]) -> list[Task[Any]]:
        """Submit ``fn`` once for each item (or tuple of items); return the tasks in order."""
        return [self._manager._submit(fn, items, {}, self._options) for items in zip(*iterables, strict=False)]


class TaskFunction(Generic[P]):
    """A function whose calls are submitted; ``fn`` is the plain one."""

    def __init__(self, view: TaskView, fn: Callable[P, Any]) -> None:
        self._view = view
        self.fn = fn
        functools.update_wrapper(self, fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Task[Any]:
        return self._view.submit(self.fn, *args, **kwargs)
