"""Files that are read again and again: their descriptors stay open, and are read with ``pread``."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import weakref
from collections.abc import Callable, Sequence
from itertools import compress
from operator import ne
from typing import Any, NamedTuple, TypeVar

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


class Source(NamedTuple):
    """A file, what is made of its bytes, and how many of them are asked for."""

    path: str
    parse: Callable[[bytes], Any]
    size: int = 4096
    #: Many records: a long one comes a page at a time.
    listing: bool = False


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

    __slots__ = ("__weakref__", "_kept", "_limit", "forked", "generation")

    def __init__(self, limit: int = KEPT) -> None:
        self._limit = limit
        self._kept: dict[str, _Kept] = {}
        #: Whether this is the child of a fork and has not been told yet.
        self.forked = False
        _readers().add(self)
        #: Another one as soon as a descriptor was given back: its number may be another file's by now.
        self.generation = 0

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
            self.generation += 1
            os.close(kept.fd)

    def descriptor(self, path: str) -> int | None:
        """Return the descriptor of one that is kept open, from now on at the latest; None beyond the limit.

        Raises
        ------
        OSError
            If it cannot be opened.
        """
        kept = self._kept.get(path)
        if kept is None:
            if len(self._kept) >= self._limit:
                return None
            kept = self._kept[path] = _Kept(os.open(path, _FLAGS))
        return kept.fd

    def after_fork(self) -> None:
        """Open all anew in a forked child: a kept ``/proc/self`` is the parent's."""
        if self.forked:
            self.close()
            self.forked = False

    def close(self) -> None:
        """Close all; what is read later is opened anew."""
        self.generation += 1
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


@functools.cache
def _readers() -> weakref.WeakSet[KeptFiles]:
    """All that are to be told of a fork: at each reading a flag costs less than a look at the own number."""
    readers: weakref.WeakSet[KeptFiles] = weakref.WeakSet()

    def tell() -> None:
        for files in list(readers):
            files.forked = True

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=tell)
    return readers


class Batch:
    """Files that are read together, in order, at each reading: one pass, and only what changed is parsed.

    At one reading a second the interpreter finds its own memory cold each time: what costs is not the
    reading but each function on the way to it. Here there is one for all files.

    A file that cannot be read fails all of them, without a word on which it was: then they are to be
    read one by one. So they are where ``files`` keeps as many as it may.

    Examples
    --------
    >>> files = KeptFiles()
    >>> Batch(files, [Source(__file__, len, 3)]).values()
    [3]
    >>> files.close()
    """

    __slots__ = (
        "_fds",
        "_files",
        "_generation",
        "_known",
        "_listings",
        "_numbers",
        "_parsers",
        "_sizes",
        "_sources",
        "_values",
        "_zeros",
    )

    def __init__(self, files: KeptFiles, sources: Sequence[Source]) -> None:
        self._files, self._sources = files, tuple(sources)
        self._parsers = tuple(source.parse for source in sources)
        self._sizes = tuple(source.size for source in sources)
        self._zeros, self._numbers = (0,) * len(sources), range(len(sources))
        self._listings = tuple(at for at, source in enumerate(sources) if source.listing)
        self._fds: list[int] | None = None
        self._known: list[bytes | None] = []
        self._values: list[Any] = []
        self._generation = -1

    def values(self) -> list[Any]:
        """Return what each file says now; the list is the batch's own, until the next reading.

        Raises
        ------
        OSError, ValueError, LookupError
            If one cannot be read or understood.
        """
        if self._generation != self._files.generation:
            self._open()
        if self._fds is None:
            return self._one_by_one()
        data = list(map(pread, self._fds, self._sizes, self._zeros))
        for at in self._listings:
            if len(data[at]) >= _WHOLE:
                data[at] = self._whole(self._fds[at], data[at])
        known, values = self._known, self._values
        for at in compress(self._numbers, map(ne, data, known)):
            # The value first: what cannot be parsed must fail the next time, too.
            values[at] = self._parsers[at](data[at])
            known[at] = data[at]
        return values

    def _open(self) -> None:
        generation = self._files.generation
        found = [self._files.descriptor(source.path) for source in self._sources]
        fds = [fd for fd in found if fd is not None]
        self._fds = fds if len(fds) == len(found) else None
        self._known = [None] * len(found)
        self._values = [None] * len(found)
        self._generation = generation

    def _one_by_one(self) -> list[Any]:
        files = self._files
        return [
            files.listing(path, parse) if listing else files.parsed(path, parse, size)
            for path, parse, size, listing in self._sources
        ]

    def _whole(self, fd: int, data: bytes) -> bytes:
        while more := pread(fd, 65536, len(data)):
            data += more
        return data
