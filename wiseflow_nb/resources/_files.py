"""Files that are read again and again: their descriptors stay open, and are read with ``pread``."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

#: Descriptors that one reader keeps. Beyond, a file is opened and closed each time: with files that
#: are read in turn, putting out the oldest would mean that none is ever found open.
KEPT = 128
#: Listings of many records (diskstats, net/dev) come a page at a time; less than this is the whole.
_WHOLE = 3072
_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def _seek_and_read(fd: int, size: int, offset: int) -> bytes:
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, size)


#: Windows has no ``pread``; a reader belongs to one thread at a time, so that a seek does no harm.
pread: Any = getattr(os, "pread", _seek_and_read)


class _Kept:
    """An open file, and what was made of its bytes."""

    __slots__ = ("data", "fd", "value")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.data: bytes | None = None
        self.value: Any = None


class KeptFiles:
    """Read files that the kernel makes up anew at each read, without opening them each time.

    Examples
    --------
    >>> files = KeptFiles()
    >>> len(files.read(__file__, 3))
    3
    >>> files.close()
    """

    def __init__(self, limit: int = KEPT) -> None:
        self._limit = limit
        self._kept: dict[str, _Kept] = {}
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self._kept)

    def parsed(self, path: str, parse: Callable[[bytes], T], size: int = 4096) -> T:
        """Return what ``parse`` makes of one read of ``size`` bytes; the same bytes are parsed once.

        On an idle machine, where a monitor's own cost is most seen, most files say the same again.
        One path always goes with one ``parse``.

        Raises
        ------
        OSError
            See ``read``.
        """
        kept = self._kept.get(path)
        if kept is None:
            return parse(self._first(path, size))
        try:
            data = pread(kept.fd, size, 0)
        except OSError as error:
            return parse(self._again(path, size, error))
        if data != kept.data:
            # The value first: what cannot be parsed must fail the next time, too.
            kept.value = parse(data)
            kept.data = data
        return kept.value  # type: ignore[no-any-return]

    def read(self, path: str, size: int = 4096) -> bytes:
        """Return what one read of ``size`` bytes gives, from the file's beginning.

        A kept descriptor that went bad is replaced at once: a control group that was made anew
        under its old name is read on.

        Raises
        ------
        OSError
            If it cannot be read; ``ProcessLookupError`` if it was that of a process that ended.
        """
        kept = self._kept.get(path)
        if kept is None:
            return self._first(path, size)
        try:
            return pread(kept.fd, size, 0)  # type: ignore[no-any-return]
        except OSError as error:
            return self._again(path, size, error)

    def listing(self, path: str, parse: Callable[[bytes], T]) -> T:
        """Return what ``parse`` makes of all of a file of many records; see ``parsed``.

        Raises
        ------
        OSError
            See ``read``.
        """
        kept = self._kept.get(path)
        if kept is not None:
            try:
                data: bytes = pread(kept.fd, 4096, 0)
            except OSError as error:
                data = self._again(path, 4096, error)
                kept = self._kept.get(path)
            else:
                if data == kept.data and len(data) < _WHOLE:
                    return kept.value  # type: ignore[no-any-return]
        else:
            data = self._first(path, 4096)
            kept = self._kept.get(path)
        if len(data) >= _WHOLE:
            if kept is None:
                with open(path, "rb") as stream:
                    return parse(stream.read())
            while more := pread(kept.fd, 65536, len(data)):
                data += more
        value = parse(data)
        if kept is not None:
            kept.value, kept.data = value, data
        return value

    def forget(self, path: str) -> None:
        """Close one, if it is open, and drop what is known of it."""
        kept = self._kept.pop(path, None)
        if kept is not None:
            os.close(kept.fd)

    def after_fork(self) -> None:
        """Open all anew in a forked child: a kept ``/proc/self`` is the parent's."""
        if self._pid != os.getpid():
            self.close()
            self._pid = os.getpid()

    def close(self) -> None:
        """Close all; what is read later is opened anew."""
        while self._kept:
            os.close(self._kept.popitem()[1].fd)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError, TypeError):  # at exit half of it may be gone
            self.close()

    def _again(self, path: str, size: int, error: OSError) -> bytes:
        self.forget(path)
        # Opened again, the path could be that of a later process with the same number.
        if error.errno == errno.ESRCH:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), path) from error
        return self._first(path, size)

    def _first(self, path: str, size: int) -> bytes:
        fd = os.open(path, _FLAGS)
        try:
            data: bytes = pread(fd, size, 0)
        except OSError as error:
            os.close(fd)
            error.filename = path
            raise
        if len(self._kept) < self._limit:
            self._kept[path] = _Kept(fd)
        else:
            os.close(fd)
        return data
