"""A manager seen through fixed options: a view that submits, and a decorated function."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from wiseflow_nb.errors import UsageError
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
        return TaskResults(lambda items: self._manager._submit(fn, items, {}, self._options), calls, outstanding)


class TaskResults:
    """The results of many tasks in order, submitted as they are taken; iterate with ``for`` or ``async for``.

    A task that failed raises here when its turn comes; those after it can still be taken. What an
    iterable raises, or the manager if it was shut down, comes after the results of all that had been
    submitted, and is the end. ``close`` (or leaving the ``with`` block) cancels what is outstanding
    and submits no more.
    """

    def __init__(
        self, submit: Callable[[tuple[Any, ...]], Task[Any]], calls: Iterator[tuple[Any, ...]], outstanding: int
    ) -> None:
        self._submit = submit
        self._calls: Iterator[tuple[Any, ...]] = calls
        self._outstanding = outstanding
        self._ahead: deque[Task[Any]] = deque()
        self._failure: Exception | None = None
        self._fill()

    def _fill(self) -> None:
        try:
            while len(self._ahead) < self._outstanding:
                self._ahead.append(self._submit(next(self._calls)))
        except StopIteration:
            self._calls = iter(())
        except Exception as error:  # noqa: BLE001  the caller's iterables, or a closed manager: raised in its turn
            self._calls, self._failure = iter(()), error

    def _head(self) -> Task[Any] | None:
        # The next whose result is due; it stays there until it has ended, whatever interrupts the wait.
        if self._ahead:
            return self._ahead[0]
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return None

    def _taken(self, task: Task[Any]) -> None:
        if task.done() and self._ahead and self._ahead[0] is task:
            self._ahead.popleft()
            try:
                self._fill()
            except BaseException:  # an interrupt in the caller's iterable: the result is not lost for it
                self._ahead.appendleft(task)
                raise

    def __iter__(self) -> TaskResults:
        return self

    def __next__(self) -> Any:
        task = self._head()
        if task is None:
            raise StopIteration
        try:
            return task.result()
        finally:
            self._taken(task)

    def __aiter__(self) -> TaskResults:
        return self

    async def __anext__(self) -> Any:
        task = self._head()
        if task is None:
            raise StopAsyncIteration
        try:
            return await task
        finally:
            self._taken(task)

    def close(self) -> None:
        """Cancel what is outstanding and submit no more."""
        self._calls, self._failure = iter(()), None
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
