"""What travels between a kernel and its worker processes: frames, pickles, and whose fault a bad pickle is.

Both ends import this module and the child imports little else, so it stays light. The pipes are
anonymous and open in the two processes only: nobody else can write a pickle into them.
"""

from __future__ import annotations

import contextlib
import pickle
import struct
import sys
from collections.abc import Iterator
from typing import Any

with contextlib.suppress(ImportError):  # where they are missing there are no process tasks
    import fcntl
    import termios

#: Lengths of the header and the body that follow.
PREFIX = struct.Struct("!IQ")
PROTOCOL = pickle.HIGHEST_PROTOCOL
#: A call begins with a block of this many bytes, padded if it is shorter; one read takes a block, whole or
#: not at all. Linux writes as many at once (pipe(7): PIPE_BUF), so whoever reads a call has all of it.
BLOCK = 4096
_NUMBER = bytes(4)
#: How deep a value is searched for the part that cannot be pickled.
CULPRIT_DEPTH = 4


def frame(header: tuple[Any, ...], body: bytes = b"") -> bytes:
    """One message: a header of plain values, and a body that is a pickle of its own."""
    head = pickle.dumps(header, PROTOCOL)
    return b"".join((PREFIX.pack(len(head), len(body)), head, body))


def block(data: bytes) -> bytes:
    """A frame as a call is sent: never shorter than a block."""
    return data.ljust(BLOCK, b"\0")


def unread(fd: int) -> int:
    """How many bytes of a pipe were written and not read, from either end; 0 where the system does not tell."""
    try:
        return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, _NUMBER), sys.byteorder)
    except (NameError, OSError):
        return 0


class FrameReader:
    """Puts frames together again from whatever pieces a pipe delivers.

    Examples
    --------
    >>> reader = FrameReader()
    >>> data = frame(("result", 7), b"body")
    >>> list(reader.feed(data[:9])), list(reader.feed(data[9:]))
    ([], [(('result', 7), b'body')])
    """

    __slots__ = ("_data",)

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[tuple[Any, ...], bytes]]:
        """Take bytes in; yield each frame that is complete now."""
        held = self._data
        if not held and len(data) >= PREFIX.size:
            head, body = PREFIX.unpack_from(data)
            start = PREFIX.size + head
            if len(data) == start + body:  # one whole frame and no more: the usual answer
                yield pickle.loads(data[PREFIX.size : start]), data[start:]
                return
        held += data
        while len(held) >= PREFIX.size:
            head, body = PREFIX.unpack_from(held)
            start, end = PREFIX.size + head, PREFIX.size + head + body
            if len(held) < end:
                return
            view = memoryview(held)
            header, content = pickle.loads(view[PREFIX.size : start]), bytes(view[start:end])
            view.release()
            del held[:end]
            yield header, content


def dumps(value: Any) -> bytes:
    """Pickle a value; what lives in ``__main__``, a closure or a lambda goes by value.

    The standard pickler is tried first: it takes a tenth of cloudpickle's time. Whatever it pickles
    by reference names the module, so data in which ``__main__`` does not occur is right on the
    other side, where ``__main__`` is another.
    """
    try:
        data = pickle.dumps(value, PROTOCOL)
    except Exception:  # noqa: BLE001  any failure, user's __reduce__ included: cloudpickle decides and tells
        data = b"__main__"
    if b"__main__" not in data:
        return data
    import cloudpickle

    pickled: bytes = cloudpickle.dumps(value, PROTOCOL)
    return pickled


def dump_call(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Pickle a call, the function first: one that needs cloudpickle is not pickled twice with its arguments."""
    if getattr(fn, "__module__", None) == "__main__" or "<" in getattr(fn, "__qualname__", ""):
        import cloudpickle

        pickled: bytes = cloudpickle.dumps((fn, args, kwargs), PROTOCOL)
        return pickled
    return dumps((fn, args, kwargs))


def call_culprit(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Which part of a call cannot be pickled, in words."""
    parts: list[tuple[str, Any]] = [(f"argument {number}", value) for number, value in enumerate(args, 1)]
    parts += [(f"argument {name!r}", value) for name, value in kwargs.items()]
    for where, value in parts:
        if not _pickles(value):
            return culprit(where, value)
    return culprit("the function", fn)


def culprit(where: str, value: Any) -> str:
    """Follow a value that cannot be pickled down to the part that is to blame; say where it is.

    Examples
    --------
    >>> import threading
    >>> culprit("the result", {"rows": [1, threading.Lock()]})
    "the result['rows'][1] (lock)"
    """
    for _ in range(CULPRIT_DEPTH):
        for step, part in _parts(value):
            if not _pickles(part):
                where, value = f"{where}{step}", part
                break
        else:
            break
    return f"{where} ({type(value).__name__})"


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [(f"[{number}]", item) for number, item in enumerate(value)]
    code = getattr(value, "__code__", None)
    if code is not None:
        cells = zip(code.co_freevars, getattr(value, "__closure__", None) or (), strict=False)
        held = [(f"'s variable {name!r}", cell.cell_contents) for name, cell in cells if _filled(cell)]
        known = getattr(value, "__globals__", {})
        return held + [(f"'s global {name!r}", known[name]) for name in code.co_names if name in known]
    held_by = getattr(value, "__dict__", None)
    return [(f".{name}", item) for name, item in held_by.items()] if isinstance(held_by, dict) else []


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _pickles(value: Any) -> bool:
    try:
        dumps(value)
    except Exception:  # noqa: BLE001  user's __reduce__ may raise anything; what is asked is whether it does
        return False
    return True
