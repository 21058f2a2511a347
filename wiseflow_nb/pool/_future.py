"""The future of pool work, which is also the queued call and its place in the queue.

Most of what a standard future costs is made before anybody needs it: a condition with its lock and
deque, and two lists. Here the condition is made when somebody blocks, and until then the pool's one
lock stands in for it. Three rules keep that right on any interpreter:

- the state changes, and callbacks are added, only while the pool's lock is held;
- once there is a condition, the state becomes final only while that is held as well, which is what
  ``wait`` and ``as_completed`` rely on; the order is condition, then lock;
- the condition is set once, while the lock is held.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures._base import CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING
from typing import TYPE_CHECKING, Any, TypeVar

from wiseflow_nb.context import TaskContext
from wiseflow_nb.futures import to_asyncio
from wiseflow_nb.pool._work import logger
from wiseflow_nb.records import Priority

if TYPE_CHECKING:
    from wiseflow_nb.pool._crew import Crew

ValueT = TypeVar("ValueT")
_FINAL = frozenset({CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED})


class PoolFuture(Future[ValueT]):
    """The future of pool work; ``cancel()`` takes queued work out of the queue at once.

    It can be awaited, too: that is cheaper than ``asyncio.wrap_future``, since results that come in
    quick succession wake the loop once.
    """

    __slots__ = (
        "_args",
        "_cleanup",
        "_condition_made",
        "_context",
        "_crew",
        "_done_callbacks",
        "_exception",
        "_fn",
        "_kwargs",
        "_name",
        "_number",
        "_priority",
        "_queued_at",
        "_result",
        "_stamp",
        "_state",
        "_submitted_seconds",
        "_waiters",
    )

    _result: ValueT
    _exception: BaseException | None
    _number: int
    _stamp: int
    _queued_at: float
    _submitted_seconds: float

    def __init__(
        self,
        crew: Crew,
        fn: Callable[..., ValueT],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        priority: Priority,
        name: str,
        cleanup: Callable[..., Any] | None,
    ) -> None:
        # Not super().__init__(): it makes what is saved here. The result and the error are written when
        # it ends, its place in the queue when the crew queues it.
        self._crew = crew
        self._fn: Callable[..., ValueT] | None = fn
        self._args = args
        self._kwargs = kwargs or None
        self._priority = priority
        self._name = name
        self._cleanup = cleanup
        self._state = PENDING
        self._context: TaskContext | None = None
        self._condition_made: threading.Condition | None = None
        # Replaced by lists when there is something to keep.
        self._waiters: Any = ()
        self._done_callbacks: Any = ()

    # -- what the standard library reads ------------------------------------------------------

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        made = self._condition_made
        if made is None:
            fresh = threading.Condition()
            with self._crew.lock:
                made = self._condition_made
                if made is None:
                    self._waiters = []
                    self._condition_made = made = fresh
        return made

    # -- asking -------------------------------------------------------------------------------

    def cancelled(self) -> bool:
        """Whether it was cancelled before it ran."""
        return self._state == CANCELLED_AND_NOTIFIED

    def running(self) -> bool:
        """Whether a worker runs it now."""
        return self._state == RUNNING

    def done(self) -> bool:
        """Whether it was cancelled or has ended."""
        return self._state in _FINAL

    def result(self, timeout: float | None = None) -> ValueT:
        """Return what the call returned, or raise what it raised; wait for it if need be.

        Raises
        ------
        TimeoutError
            If it had not ended after ``timeout`` seconds.
        CancelledError
            If it was cancelled.
        """
        if self._state != FINISHED:
            self._wait(timeout)
        error = self._exception
        if error is None:
            return self._result
        try:
            raise error
        finally:
            # The traceback holds this frame: without this, the frame would hold the traceback.
            del self, error

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the call raised, or None; wait for it if need be. Raises as ``result`` does."""
        if self._state != FINISHED:
            self._wait(timeout)
        return self._exception

    def _wait(self, timeout: float | None) -> None:
        with self._condition:
            if self._state not in _FINAL:
                self._condition.wait(timeout)
            state = self._state
        if state == CANCELLED_AND_NOTIFIED:
            raise CancelledError
        if state != FINISHED:
            raise TimeoutError(f"{self._name!r} had not ended after {timeout:g} s")

    def __await__(self) -> Generator[Any, None, ValueT]:
        return to_asyncio(self).__await__()

    # -- changing -----------------------------------------------------------------------------

    def cancel(self) -> bool:
        """Cancel work that has not begun; return whether it will not run.

        Running work is asked to stop with ``pool.cancel_running(future)`` instead.
        """
        crew = self._crew
        with crew.lock:
            made = self._condition_made
            if made is None:
                dropped = crew.drop_queued(self)
        if made is not None:
            with made, crew.lock:
                dropped = crew.drop_queued(self)
                if dropped:
                    for waiter in self._waiters:
                        waiter.add_cancelled(self)
                    made.notify_all()
        if not dropped:
            return self._state == CANCELLED_AND_NOTIFIED
        self._release()
        self._invoke_callbacks()
        return True

    def add_done_callback(self, fn: Callable[[Future[ValueT]], object]) -> None:
        """Call ``fn(future)`` when this ends; at once if it has ended."""
        with self._crew.lock:
            if self._state not in _FINAL:
                if not self._done_callbacks:
                    self._done_callbacks = []
                self._done_callbacks.append(fn)
                return
        self._call(fn)

    def set_running_or_notify_cancel(self) -> bool:
        """Claim it for running; the pool does so itself."""
        with self._crew.lock:
            if self._state == PENDING:
                self._state = RUNNING
                return True
            if self._state == CANCELLED_AND_NOTIFIED:
                return False
        raise RuntimeError(f"a future that is {self._state.lower()} cannot be run; submit the call anew")

    def set_result(self, result: ValueT) -> None:
        """Give it its result; the pool does so itself."""
        self._finish(result, None)

    def set_exception(self, exception: BaseException | None) -> None:
        """Give it its error; the pool does so itself."""
        self._finish(None, exception)

    def _finish(self, value: Any, error: BaseException | None) -> None:
        crew = self._crew
        made = self._condition_made
        if made is None:
            with crew.lock:
                made = self._condition_made
                if made is None:
                    self._end(value, error)
        if made is not None:
            with made, crew.lock:
                self._end(value, error)
                for waiter in self._waiters:
                    if error is None:
                        waiter.add_result(self)
                    else:
                        waiter.add_exception(self)
                made.notify_all()
        self._invoke_callbacks()

    def _end(self, value: Any, error: BaseException | None) -> None:
        if self._state in _FINAL:
            raise InvalidStateError(f"the future has ended already ({self._state.lower()}); it cannot end twice")
        self._result, self._exception = value, error
        self._state = FINISHED

    def _release(self) -> None:
        """Let go of everything that could keep the caller's objects alive."""
        self._fn, self._args, self._kwargs, self._cleanup = None, (), None, None

    def _invoke_callbacks(self) -> None:
        for callback in self._done_callbacks:
            self._call(callback)

    def _call(self, fn: Callable[[Future[ValueT]], object]) -> None:
        try:
            fn(self)
        except Exception:  # noqa: BLE001  user code: logged with its traceback, as the standard library does
            logger.exception("a callback of %r failed", self)

    def task_context(self) -> TaskContext:
        """What ``current_task()`` is while this runs; made when it is first asked for."""
        context = self._context
        if context is None:
            fresh = TaskContext(f"p{self._number}", self._name)
            with self._crew.lock:
                context = self._context
                if context is None:
                    self._context = context = fresh
        return context

    def __repr__(self) -> str:
        return f"<PoolFuture p{self._number} {self._name!r} {self._state.lower()}>"
