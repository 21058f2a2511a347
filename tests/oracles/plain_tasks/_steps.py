"""The CPU time of one coroutine, read around each of its steps."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Generator
from typing import Any


class StepTimer:
    """Await something and add up the CPU time of its steps: the thread's own, between suspensions."""

    __slots__ = ("_awaitable", "cpu_ns")

    def __init__(self, awaitable: Awaitable[Any]) -> None:
        self._awaitable = awaitable
        self.cpu_ns = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        inner: Any = self._awaitable.__await__()
        value: Any = None
        error: BaseException | None = None
        while True:
            started = time.thread_time_ns()
            try:
                if error is not None:
                    thrown, error = error, None
                    waited = inner.throw(thrown)
                elif value is None:
                    waited = next(inner)
                else:
                    waited = inner.send(value)
            except StopIteration as stop:
                return stop.value
            finally:
                self.cpu_ns += time.thread_time_ns() - started
            try:
                value = yield waited
            except GeneratorExit:
                inner.close()
                raise
            except BaseException as caught:
                error = caught
