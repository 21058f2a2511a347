"""A pool seen through fixed options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from wiseflow_nb.pool._work import map_within
from wiseflow_nb.records import Priority

if TYPE_CHECKING:
    from wiseflow_nb.pool.manager import ThreadPoolManager

P = ParamSpec("P")
T = TypeVar("T")


class PoolView(Executor):
    """An executor that submits to a pool with fixed options; it owns nothing and closes nothing."""

    def __init__(
        self,
        pool: ThreadPoolManager,
        priority: Priority,
        name: str,
        cleanup: Callable[..., Any] | None,
        kind: str = "thread",
    ) -> None:
        self._pool, self._priority, self._name, self._cleanup, self._kind = pool, priority, name, cleanup, kind

    @property
    def _max_workers(self) -> int:
        return self._pool._max_workers

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue ``fn(*args, **kwargs)`` with this view's options; return its future."""
        if self._kind == "process":
            run: Callable[..., T] = self._pool.processes.call(fn)
            return self._pool._submit(run, args, kwargs, self._priority, self._name, self._cleanup)
        return self._pool._submit(fn, args, kwargs, self._priority, self._name, self._cleanup)

    def map(
        self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[T]:
        """Submit ``fn`` for each tuple of items with this view's options; see ``ThreadPoolManager.map``."""
        if timeout is None:
            return super().map(fn, *iterables)
        return map_within(self, fn, zip(*iterables, strict=False), timeout)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Do nothing: the pool belongs to whoever made it."""
