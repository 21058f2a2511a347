"""Which ended sessions are removed, and when."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from wiseflow_nb.clock import Clock
from wiseflow_nb.errors import StoreError, StoreVersionError
from wiseflow_nb.records import SessionInfo, SessionState
from wiseflow_nb.store.finding import list_sessions
from wiseflow_nb.store.paths import check_owned, in_memory, valid_session_id
from wiseflow_nb.store.reader import StoreReader

logger = logging.getLogger("wiseflow_nb.recorder")
PRUNE_SECONDS = 600.0
#: A session without an end mark is not removed for its size so soon after its last heartbeat: it may be
#: one on another host, or one whose machine slept.
UNSURE_SECONDS = 3600.0
#: A clock that was set ahead is believed, where things are deleted for their age, once it has been so for a day.
BELIEVED_SECONDS = 86_400.0
#: Two clocks drift apart, and are read one after the other: by less than this none was set.
DRIFT_SECONDS = 1.0


class SteadyTime:
    """The time of day by which things are over their age: one that no bad reading of the clock carries ahead.

    It runs on with the monotonic clock, from the least that the clock has shown in the last day: one that
    is set back is followed at once, one that is set ahead (by hand, by a time server, by a machine that
    slept) a day later. What was deleted for a year that did not pass cannot be had back; what stays a day
    longer does no harm. What the clock shows at first is believed.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # (the other clock less the monotonic one, when it was last so), the least and the oldest first.
        self._shifts: list[tuple[float, float]] = []
        self.look()

    def look(self) -> tuple[float, float]:
        """Return the time that the clock shows, and the one to delete by (both seconds since the epoch)."""
        now, monotonic = self._clock.time(), self._clock.monotonic()
        shifts, shift = self._shifts, now - monotonic
        while shifts and shifts[-1][0] > shift - DRIFT_SECONDS:
            shift = min(shift, shifts.pop()[0])
        shifts.append((shift, monotonic))
        while shifts[0][1] < monotonic - BELIEVED_SECONDS:
            del shifts[0]
        return now, monotonic + shifts[0][0]


def doomed(
    sessions: Iterable[tuple[SessionInfo, int]], *, own_id: str, now: float, max_age: float, max_bytes: int
) -> list[SessionInfo]:
    """Return the sessions to remove, oldest first: those over the age, then as many as are over the size.

    Never a live one, never ``own_id``; their bytes count all the same. ``sessions`` are (info, bytes).
    """
    found = list(sessions)
    total = sum(size for _, size in found)
    over = sorted(
        ((_last(info), size, info) for info, size in found if _ended(info) and info.session_id != own_id),
        key=lambda item: (item[0], item[2].session_id),
    )
    removed: list[SessionInfo] = []
    for last, size, info in over:
        sure = info.ended_seconds == info.ended_seconds and info.state is SessionState.ENDED
        large = total > max_bytes and (sure or now - last > UNSURE_SECONDS)
        if now - last > max_age or large:
            removed.append(info)
            total -= size
    return removed


def _ended(info: SessionInfo) -> bool:
    return info.state is not SessionState.LIVE


def _last(info: SessionInfo) -> float:
    """When it was last seen; a session that never got as far as a heartbeat was last seen when it began."""
    known = (info.ended_seconds, info.last_seen_seconds, info.started_seconds)
    return max((moment for moment in known if moment == moment), default=0.0)


def prune(root: Path, *, own_id: str, now: float, max_age: float, max_bytes: int) -> Sequence[SessionInfo]:
    """Remove the sessions below ``root`` that are over the age or the size; return them."""
    if in_memory(root):
        return ()
    sizes = [(info, size_of(Path(info.path))) for info in list_sessions(root, now)]
    removed = doomed(sizes, own_id=own_id, now=now, max_age=max_age, max_bytes=max_bytes)
    for info in removed:
        shutil.rmtree(info.path, ignore_errors=True)
    known = {info.session_id for info, _ in sizes}
    for directory in root.iterdir() if root.is_dir() else ():
        if directory.name not in known and directory.name != own_id and _is_wreck(directory, now - max_age):
            shutil.rmtree(directory, ignore_errors=True)
    return removed


def size_of(directory: Path) -> int:
    """The bytes of the files in a directory."""
    total = 0
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                total += entry.stat(follow_symlinks=False).st_size
    except OSError:
        pass  # it is being removed, or its session ends: what was seen counts
    return total


def _is_wreck(directory: Path, before: float) -> bool:
    """Whether this is a session's directory whose file cannot be read, untouched since ``before``."""
    if not valid_session_id(directory.name):
        return False
    try:
        check_owned(directory)
        if max(entry.stat(follow_symlinks=False).st_mtime for entry in (directory, *directory.iterdir())) > before:
            return False
        StoreReader(directory).close()
    except StoreVersionError:
        return False  # not ours to judge
    except StoreError:
        return directory.is_dir() and not directory.is_symlink()
    except OSError:
        return False
    return True


class Pruner:
    """Prune now and every ten minutes, on a thread of its own: it opens every old session's file."""

    def __init__(self, root: Path, own_id: str, max_age: float, max_bytes: int, clock: Clock) -> None:
        self._root, self._own_id, self._clock = root, own_id, clock
        self._max_age, self._max_bytes = max_age, max_bytes
        self._steady = SteadyTime(clock)
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="wiseflow-prune", daemon=True).start()

    def stop(self) -> None:
        """Do not begin another round."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                prune(
                    self._root,
                    own_id=self._own_id,
                    now=self._steady.look()[1],
                    max_age=self._max_age,
                    max_bytes=self._max_bytes,
                )
            except OSError as error:
                logger.warning("old sessions could not be pruned: %s", error)
            self._clock.wait(self._stopped, PRUNE_SECONDS)
