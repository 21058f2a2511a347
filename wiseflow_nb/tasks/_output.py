"""The output of a task: what its code writes to stdout and logs is passed on, and its end is kept.

``sys.stdout`` is one for the whole process, so what is written has to be told apart by who writes:
a thin proxy asks the context variable of the running task. It is there only while tasks are, and
whatever stands in ``sys.stdout`` (a notebook's stream, a test's capture) gets every write unchanged,
on the thread that wrote. Log records are seen where they are made, so that no handler is added:
a handler on the root logger would silence ``logging.basicConfig`` and the last-resort handler.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from wiseflow_nb.context import current_task

#: Of streams that stood in ``sys.stdout``, the last so many are held.
PROXIES_KEPT = 100


class TaskOutput:
    """Stands in for a text stream: passes everything on, and lets the current task keep the end."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> Any:
        """Write to the stream behind; inside a task its tail is kept as well."""
        context = current_task()
        if context is not None and isinstance(text, str):
            context.write_output(text)
        return self._stream.write(text)

    def writelines(self, lines: Any) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stream)

    def __repr__(self) -> str:
        return f"<TaskOutput over {self._stream!r}>"


class _LogFactory:
    """Makes log records as the one before did, and lets the current task keep their text."""

    def __init__(self, factory: Callable[..., logging.LogRecord]) -> None:
        self.factory = factory

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self.factory(*args, **kwargs)
        context = current_task()
        if context is not None:
            try:
                told = record.getMessage()
            except Exception:  # noqa: BLE001  arguments of the user's that do not fit: whoever prints the record reports it
                told = str(record.msg)
            context.write_output(f"{record.levelname} {record.name}: {told}\n")
        return record


_lock = threading.Lock()
_users: set[int] = set()
#: The proxies that stand or stood in ``sys.stdout``, each holding its stream. None is ever given up:
#: ``print`` borrows whatever stands there without holding it, and goes on with it after it was taken
#: away. The same stream gets the same proxy again, so there are no more than streams were put there.
_proxies: list[TaskOutput] = []


def _proxy_of(stream: Any) -> TaskOutput:
    for proxy in _proxies:
        if proxy._stream is stream:
            return proxy
    proxy = TaskOutput(stream)
    _proxies.append(proxy)
    # Streams that come and go (a capture for each cell) are kept for a while only: a print that is still
    # under way with the hundredth stream before this one does not exist.
    del _proxies[:-PROXIES_KEPT]
    return proxy


def begin_routing(user: object) -> None:
    """Route output for ``user`` from here on, until its ``end_routing``; saying it twice changes nothing."""
    with _lock:
        _users.add(id(user))
        # Looked at each time: a cell's capture or a test may have put another stream there meanwhile.
        if sys.stdout is not None and not isinstance(sys.stdout, TaskOutput):
            sys.stdout = _proxy_of(sys.stdout)
        made = logging.getLogRecordFactory()
        if not isinstance(made, _LogFactory):
            logging.setLogRecordFactory(_LogFactory(made))


def end_routing(user: object) -> None:
    """The last user puts back what was there; what others put there meanwhile is left alone."""
    with _lock:
        _users.discard(id(user))
        if _users:
            return
        if isinstance(sys.stdout, TaskOutput):
            sys.stdout = sys.stdout._stream
        made = logging.getLogRecordFactory()
        if isinstance(made, _LogFactory):
            logging.setLogRecordFactory(made.factory)


@contextlib.contextmanager
def routed() -> Iterator[None]:
    """Route output inside the block."""
    user = object()
    begin_routing(user)
    try:
        yield
    finally:
        end_routing(user)
