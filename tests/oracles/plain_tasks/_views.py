"""A manager seen through fixed options: a view that submits, and a decorated function."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from tests.oracles.plain_tasks._options import TaskOptions
from tests.oracles.plain_tasks.task import Task
from wiseflow_nb.errors import UsageError

if TYPE_CHECKING:
    from tests.oracles.plain_tasks.manager import TaskManager

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

    @overload
    def map(
        self, fn: Callable[..., Any], /, *iterables: Iterable[Any], outstanding: None = None
    ) -> list[Task[Any]]: ...
    @overload
    def map(self, fn: Callable[..., Any], /, *iterables: Iterable[Any], outstanding: int) -> TaskResults: ...
    @overload
    def map(
        self, fn: Callable[..., Any], /, *iterables: Iterable[Any], outstanding: int | None
    ) -> list[Task[Any]] | TaskResults: ...
    def map(
        self, fn: Callable[..., Any], /, *iterables: Iterable[Any], outstanding: int | None = None
    ) -> list[Task[Any]] | TaskResults:
        """Submit ``fn`` once for each item (or tuple of items); see ``TaskManager.map``."""
        calls = zip(*iterables, strict=False)
        if outstanding is None:
            return [self._manager._submit(fn, items, {}, self._options) for items in calls]
        if isinstance(outstanding, bool) or not isinstance(outstanding, int) or outstanding < 1:
            raise UsageError(f"outstanding {outstanding!r} lets nothing run; give 1 or more, or None for all at once")
        return TaskResults((self._manager._submit(fn, items, {}, self._options) for items in calls), outstanding)


class TaskResults:
    """The results of many tasks in order, submitted as they are taken; iterate with ``for`` or ``async for``.

    A task that failed raises here when its turn comes; those after it can still be taken. ``close``
    (or leaving the ``with`` block) cancels what is outstanding and submits no more.
    """

    def __init__(self, submitted: Iterator[Task[Any]], outstanding: int) -> None:
        self._submitted = submitted
        self._outstanding = outstanding
        self._ahead: deque[Task[Any]] = deque()
        self._fill()

    def _fill(self) -> None:
        while len(self._ahead) < self._outstanding and (task := next(self._submitted, None)) is not None:
            self._ahead.append(task)

    def __iter__(self) -> TaskResults:
        return self

    def __next__(self) -> Any:
        if not self._ahead:
            raise StopIteration
        task = self._ahead.popleft()
        try:
            return task.result()
        finally:
            self._fill()

    def __aiter__(self) -> TaskResults:
        return self

    async def __anext__(self) -> Any:
        if not self._ahead:
            raise StopAsyncIteration
        task = self._ahead.popleft()
        try:
            return await task
        finally:
            self._fill()

    def close(self) -> None:
        """Cancel what is outstanding and submit no more."""
        self._submitted = iter(())
        while self._ahead:
            self._ahead.pop().cancel("its results are not wanted any more")

    def __enter__(self) -> TaskResults:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class TaskFunction(Generic[P]):
    """A function whose calls are submitted; ``fn`` is the plain one."""

    def __init__(self, view: TaskView, fn: Callable[P, Any]) -> None:
        self._view = view
        self.fn = fn
        functools.update_wrapper(self, fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Task[Any]:
        return self._view.submit(self.fn, *args, **kwargs)
