"""The files beside the database: the ring, which outlives its deletion, and the room for the last words."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from wiseflow_nb.records import NAN, SAMPLE_COLUMNS, Sample
from wiseflow_nb.resources._ring import RingWriter
from wiseflow_nb.store.paths import in_memory

ROOM_NAME = "room.bin"
ROOM_BYTES = 256 * 1024
_OWN_CPU = SAMPLE_COLUMNS.index("recorder_cpu_seconds_total")


class KeptRing:
    """The ring of a session: continued after a recorder's replacement, made again where it was deleted.

    Parameters
    ----------
    path
        The file.
    resume
        Whether to continue what is there; one that cannot be continued is begun anew.

    Raises
    ------
    OSError
        If it cannot be made.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path = path
        self._remake = False
        #: When the newest row that was found was taken (epoch seconds), if one was.
        self.resumed_at: float | None = None
        #: CPU seconds of the recorder that took it (NaN: not known).
        self.resumed_cpu = NAN
        if resume:
            with contextlib.suppress(OSError, ValueError):
                self._ring = RingWriter.resume(str(path))
                self._inode = self._look()
                newest = self._ring.newest()
                if newest is not None:
                    self.resumed_at, self.resumed_cpu = newest[0], newest[_OWN_CPU]
                return
        self._ring = RingWriter(str(path))
        self._inode = self._look()

    def left_after(self, seconds: float) -> list[Sample]:
        """The samples later than a moment (monotonic seconds) that another recorder left in it, oldest first."""
        width = len(SAMPLE_COLUMNS)
        return [Sample(*row) for row in self._ring.after(seconds) if len(row) == width]

    def append(self, sample: Sequence[float]) -> None:
        """Write one row; on the sampling thread alone."""
        if self._remake:
            self._remake = False
            # Without room for a new one the deleted one goes on: who has it open still reads it.
            with contextlib.suppress(OSError):
                if not self.is_in_place():
                    new = f"{self._path}.new"
                    self._ring = self._ring.copied_to(new)
                    # Whole when it is seen.
                    os.replace(new, self._path)
                    self._inode = self._look()
        self._ring.append(sample)

    def is_in_place(self) -> bool:
        """Whether the file that is written still is the one at its path; from any thread."""
        return in_memory(self._path) or os.name != "posix" or self._look() == self._inode

    def _look(self) -> tuple[int, int] | None:
        try:
            status = os.lstat(self._path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def remake_soon(self) -> None:
        """With the next sample, look whether the file is there, and make it again if not; from any thread."""
        self._remake = True

    def close(self) -> None:
        """Unmap the file; it stays."""
        self._ring.close()


class LastRoom:
    """A small file that gives its place to the end mark when the disk is full."""

    def __init__(self, directory: Path) -> None:
        self._path = None if in_memory(directory) else directory / ROOM_NAME

    def take(self) -> None:
        """Keep the room, as far as there is any."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            fd = os.open(
                self._path,
                os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0),
                0o600,
            )
            try:
                if hasattr(os, "fchmod"):
                    os.fchmod(fd, 0o600)
                os.write(fd, bytes(ROOM_BYTES))
            finally:
                os.close(fd)

    def release(self) -> None:
        """Give the room back; a second call does nothing."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
