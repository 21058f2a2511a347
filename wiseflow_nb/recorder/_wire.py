"""The pipe to the recorder: written without ever blocking; a batch stays until it is acknowledged."""

from __future__ import annotations

import collections
import contextlib
import os
import select
import threading
from collections.abc import Callable

from wiseflow_nb.recorder._child import widen

WRITE_BYTES = 65_536


class Wire:
    """What is on its way to the recorder, and what it has not acknowledged: another one is sent that again.

    Examples
    --------
    >>> wire = Wire()
    >>> wire.batch(1, b"first"), wire.batch(2, b"second"), wire.unacked_bytes
    (None, None, 11)
    >>> wire.acknowledged(1), wire.unacked(), wire.send(b"nobody is there")
    (None, [(2, b'second')], False)
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fd = -1
        self._buffer = bytearray()
        self._unacked: collections.deque[tuple[int, bytes]] = collections.deque()
        self.unacked_bytes = 0
        #: The number of the newest batch that is acknowledged.
        self.acked = 0

    @property
    def is_open(self) -> bool:
        """Whether there is a pipe to write to."""
        return self._fd >= 0

    @property
    def waits(self) -> bool:
        """Whether something waits for room in the pipe."""
        return bool(self._buffer) and self._fd >= 0

    def open(self, fd: int, greeting: Callable[[], bytes]) -> None:
        """Write to this pipe from now on: what ``greeting`` gives, and all that is not acknowledged.

        The greeting is asked for where nothing can be sent meanwhile, so that what changes is in it or follows it.
        """
        with contextlib.suppress(OSError, AttributeError):
            os.set_blocking(fd, False)
        widen(fd)
        with self._lock:
            self._fd = fd
            self._buffer = bytearray(greeting())
            for _, line in self._unacked:
                self._buffer += line
        self.pump()

    def close(self) -> None:
        """Close the pipe; what is not acknowledged stays."""
        with self._lock:
            fd, self._fd = self._fd, -1
            self._buffer.clear()
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def forget(self) -> None:
        """In a forked child: the pipe is the parent's, and would keep its end from being seen."""
        # A thread that is not there may have held the old one.
        self._lock = threading.Lock()
        self._buffer, self._unacked, self.unacked_bytes = bytearray(), collections.deque(), 0
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def send(self, line: bytes) -> bool:
        """Put a message on its way; return False where nobody is there to take it."""
        with self._lock:
            if self._fd < 0:
                return False
            self._buffer += line
        self.pump()
        return True

    def batch(self, number: int, line: bytes) -> None:
        """Take a batch; it is on its way as soon as there is a recorder, and with the next ``pump``."""
        with self._lock:
            self._unacked.append((number, line))
            self.unacked_bytes += len(line)
            if self._fd >= 0:
                self._buffer += line

    def acknowledged(self, number: int) -> None:
        """Forget the batches up to this number."""
        with self._lock:
            while self._unacked and self._unacked[0][0] <= number:
                self.unacked_bytes -= len(self._unacked.popleft()[1])
            self.acked = max(self.acked, number)

    def unacked(self) -> list[tuple[int, bytes]]:
        """The batches that are not acknowledged, with their numbers, oldest first."""
        with self._lock:
            return list(self._unacked)

    def pump(self) -> None:
        """Write as much as the pipe takes."""
        with self._lock:
            while self._buffer and self._fd >= 0:
                try:
                    written = os.write(self._fd, self._buffer[:WRITE_BYTES])
                except OSError:
                    return  # it is full, or its other end is gone: who listens sees that
                del self._buffer[:written]

    def wait(self, timeout: float) -> None:
        """Wait until the pipe takes more, ``timeout`` seconds at most."""
        if os.name == "posix":
            with contextlib.suppress(OSError, ValueError):
                select.select([], [self._fd], [], timeout)
