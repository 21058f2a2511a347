"""The recorder's end of the two pipes: a thread that reads, a thread that writes, bounded queues."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from typing import Any, BinaryIO

from wiseflow_nb.errors import RecorderError
from wiseflow_nb.recorder._rows import unpacked
from wiseflow_nb.recorder.protocol import decode, encode

OUTGOING_LIMIT = 10_000


class Link:
    """Messages in through ``inbox`` (None when the other side is gone), messages out by ``send``."""

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO) -> None:
        self.inbox: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._incoming, self._outgoing = incoming, outgoing
        # Bounded: a stopped kernel that does not read must not make the recorder grow.
        self._outbox: queue.Queue[bytes | None] = queue.Queue(OUTGOING_LIMIT)
        self.dropped = 0
        self.malformed = 0
        self._reader = threading.Thread(target=self._read, name="wiseflow-recorder-read", daemon=True)
        self._writer = threading.Thread(target=self._write, name="wiseflow-recorder-write", daemon=True)

    def start(self) -> None:
        """Start both threads."""
        self._reader.start()
        self._writer.start()

    def send(self, message: Mapping[str, Any]) -> None:
        """Queue a message; never blocks."""
        try:
            self._outbox.put_nowait(encode(message))
        except queue.Full:
            self.dropped += 1

    def close(self, timeout: float = 1.0) -> None:
        """Write what is queued, as far as the other side still reads."""
        try:
            self._outbox.put_nowait(None)
        except queue.Full:
            return
        self._writer.join(timeout)

    def _read(self) -> None:
        while True:
            try:
                line = self._incoming.readline()
            except (OSError, ValueError):
                line = b""
            if not line.endswith(b"\n"):
                break  # the end, or the torn last line of a killed kernel
            try:
                message = decode(line)
                if size := int(message.get("packed") or 0):
                    tail = self._incoming.read(size)
                    if len(tail) < size:
                        break
                    try:
                        message["rows"] += unpacked(tail)
                    except RecorderError:
                        # The rest of the batch is taken: unanswered it would be sent again, without end.
                        message["torn"] = 1
                        self.malformed += 1
                self.inbox.put(message)
            except (RecorderError, OSError, ValueError):
                self.malformed += 1
        self.inbox.put(None)

    def _write(self) -> None:
        while True:
            line = self._outbox.get()
            if line is None:
                return
            try:
                self._outgoing.write(line)
                self._outgoing.flush()
            except (OSError, ValueError):
                return  # the kernel is gone; the reading side tells what that means
