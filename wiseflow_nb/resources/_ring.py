"""The mapped ring: the newest samples in a file that one process writes and any may read.

Layout: a header of 64 bytes (magic, version, columns, capacity, count), then rows of float64. The
writer stores a row first and the count after it; a reader looks at the count again after its copy
and drops the rows that may have been overwritten meanwhile.

A row has no count of its own: one for the whole file, in the header, does for all. So a sample takes
8 bytes a column, and its share of the header is under 8 bytes from 9 rows on.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import struct
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from wiseflow_nb.records import SAMPLE_COLUMNS, Sample

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"WFRING\x00\x01"
HEADER = struct.Struct("<8sIIQ")
COUNT_AT = 32
HEADER_BYTES = 64
#: A path that begins so is no file: the ring is memory, shared within the process.
MEMORY_PREFIX = "memory:"
_MONOTONIC = SAMPLE_COLUMNS.index("monotonic_seconds")
_memory_rings: weakref.WeakValueDictionary[str, mmap.mmap] = weakref.WeakValueDictionary()


class RingWriter:
    """Write samples into a new ring file (mode 0600); ``resume`` continues an existing one.

    Parameters
    ----------
    path
        The file; begun anew if it exists.
    columns
        Names of the columns, for their number.
    capacity
        Rows that are kept, at least 2.

    Raises
    ------
    OSError
        If the file cannot be made, a full disk included.

    Examples
    --------
    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "ring")
    >>> writer = RingWriter(path)
    >>> writer.append(Sample(time_seconds=1.0))
    >>> RingReader(path).latest().time_seconds
    1.0
    >>> writer.close()
    """

    def __init__(self, path: str, columns: Sequence[object] = SAMPLE_COLUMNS, capacity: int = 3600) -> None:
        if path.startswith(MEMORY_PREFIX):
            self._attach(mmap.mmap(-1, HEADER_BYTES + capacity * len(columns) * 8), len(columns), capacity)
            _memory_rings[path] = self._map
            self._begin(len(columns))
            return
        # Not cut to nothing first: a reader that has it mapped would be killed by its next look.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(path, flags, 0o600)
        try:
            # Whatever the umask.
            if hasattr(os, "fchmod"):
                os.fchmod(fd, 0o600)
            size = HEADER_BYTES + capacity * len(columns) * 8
            _reserve(fd, size)
            self._attach(mmap.mmap(fd, size), len(columns), capacity)
        finally:
            os.close(fd)
        self._begin(len(columns))

    def _begin(self, columns: int) -> None:
        self._map[0:8] = bytes(8)
        self._counter[0] = 0
        # The magic last: a reader that sees it sees a whole header.
        HEADER.pack_into(self._map, 0, bytes(8), columns, 0, self.capacity)
        self._map[0:8] = MAGIC

    @classmethod
    def resume(cls, path: str) -> RingWriter:
        """Continue a ring that another writer left.

        Raises
        ------
        ValueError
            If the file is not a ring of this layout.
        """
        fd = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0))
        try:
            columns, capacity = _layout(os.pread(fd, HEADER_BYTES, 0) if hasattr(os, "pread") else _head(path), path)
            self = cls.__new__(cls)
            self._attach(mmap.mmap(fd, HEADER_BYTES + capacity * columns * 8), columns, capacity)
        finally:
            os.close(fd)
        self._count = self._counter[0]
        return self

    def _attach(self, mapped: mmap.mmap, columns: int, capacity: int) -> None:
        self._map = mapped
        self._counter = _counter(self._map)
        self._row = struct.Struct(f"<{columns}d")
        self.capacity = capacity
        self._count = 0

    @property
    def count(self) -> int:
        """How many rows were ever written."""
        return self._count

    def newest(self) -> tuple[float, ...] | None:
        """The row that was written last, or None before the first."""
        return None if self._count == 0 else self._at(self._count - 1)

    def after(self, seconds: float) -> list[tuple[float, ...]]:
        """The rows at the end that were taken later than a moment (monotonic seconds), oldest first."""
        found: list[tuple[float, ...]] = []
        for number in range(self._count - 1, max(self._count - self.capacity, 0) - 1, -1):
            row = self._at(number)
            if not row[_MONOTONIC] > seconds:
                break
            found.append(row)
        return found[::-1]

    def _at(self, number: int) -> tuple[float, ...]:
        return self._row.unpack_from(self._map, HEADER_BYTES + (number % self.capacity) * self._row.size)

    def copied_to(self, path: str) -> RingWriter:
        """Go on in another file that holds the same rows; this one is closed.

        Raises
        ------
        OSError
            If the file cannot be made; this one goes on.
        """
        other = RingWriter(path, range(self._row.size // 8), self.capacity)
        # The count last, as ever.
        other._map[HEADER_BYTES:] = self._map[HEADER_BYTES:]
        other._count = other._counter[0] = self._count
        self.close()
        return other

    def append(self, sample: Sequence[float]) -> None:
        """Write one row, then the count."""
        self._row.pack_into(self._map, HEADER_BYTES + (self._count % self.capacity) * self._row.size, *sample)
        self._count += 1
        self._counter[0] = self._count

    def close(self) -> None:
        """Unmap the file; it stays."""
        self._counter.release()
        # One in memory is mapped by its readers too, and goes with the last of them.
        with contextlib.suppress(BufferError):
            self._map.close()


class RingReader:
    """Read a ring file from any process.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a ring (or is still being made).
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._inode: tuple[int, int] | None = None
        if path.startswith(MEMORY_PREFIX):
            self._map = _memory_ring(path)
            self._columns, self.capacity = _layout(self._map[:HEADER_BYTES], path)
        else:
            with open(path, "rb", opener=_without_waiting) as stream:
                if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                    raise ValueError(f"{path} is not a regular file")
                self._columns, self.capacity = _layout(stream.read(HEADER_BYTES), path)
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                status = os.fstat(stream.fileno())
                self._inode = status.st_dev, status.st_ino
        self._counter = _counter(self._map)
        self._row = struct.Struct(f"<{self._columns}d")

    @property
    def count(self) -> int:
        """How many rows were ever written."""
        return self._counter[0]

    def was_replaced(self) -> bool:
        """Whether another file is at the path by now: this one is not written any more."""
        if self._inode is None:
            return False
        try:
            status = os.stat(self._path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) != self._inode

    def latest(self) -> Sample | None:
        """The newest row, or None before the first."""
        while True:
            count = self.count
            if count == 0:
                return None
            values = self._row.unpack_from(self._map, HEADER_BYTES + ((count - 1) % self.capacity) * self._row.size)
            if self.count - count < self.capacity - 1:
                return Sample(*values[: len(SAMPLE_COLUMNS)])

    def read(self, since_count: int = 0) -> tuple[int, np.ndarray]:
        """Copy the rows from number ``since_count`` on that are still there.

        Returns
        -------
        first : int
            The number of the first row returned.
        rows : ndarray of float64, shape (n, columns)
        """
        import numpy as np

        ring: np.ndarray = np.frombuffer(self._map, dtype="<f8", offset=HEADER_BYTES).reshape(-1, self._columns)
        count = self.count
        first = max(since_count, count - self.capacity, 0)
        if first >= count:
            return count, np.empty((0, self._columns))
        start, stop = first % self.capacity, (count - 1) % self.capacity + 1
        rows = ring[start:stop].copy() if start < stop else np.concatenate((ring[start:], ring[:stop]))
        # One row more than the count tells may be half written.
        safe = self.count - self.capacity + 1
        if safe > first:
            rows, first = rows[safe - first :], safe
        return first, rows

    def close(self) -> None:
        """Unmap the file."""
        self._counter.release()
        if self._path.startswith(MEMORY_PREFIX):
            return  # the writer's own
        # A copy under way in another thread still needs the map; it goes with the last user.
        with contextlib.suppress(BufferError):
            self._map.close()


def _without_waiting(path: str, flags: int) -> int:
    # A named pipe would be waited for.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _memory_ring(path: str) -> mmap.mmap:
    try:
        return _memory_rings[path]
    except KeyError:
        raise FileNotFoundError(f"there is no ring {path} in this process") from None


def _counter(mapped: mmap.mmap) -> memoryview[int]:
    # One store of eight bytes; struct with a byte order writes them one by one, and a reader can see half.
    return memoryview(mapped)[COUNT_AT : COUNT_AT + 8].cast("Q")


def _reserve(fd: int, size: int) -> None:
    """Give the file its size, with its blocks: a store into a hole of a full disk kills the writer."""
    os.ftruncate(fd, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                raise


def _layout(header: bytes, path: str) -> tuple[int, int]:
    if len(header) < HEADER_BYTES or header[:8] != MAGIC:
        raise ValueError(f"{path} is not a ring file of this version")
    _, columns, _, capacity = HEADER.unpack_from(header)
    return int(columns), int(capacity)


def _head(path: str) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(HEADER_BYTES)
