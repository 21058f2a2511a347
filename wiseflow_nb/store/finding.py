"""Find sessions wherever they had to be put, and list them."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import sqlite3
from pathlib import Path
from typing import Any

from wiseflow_nb.errors import SessionNotFoundError, StoreError, StoreVersionError
from wiseflow_nb.records import SessionInfo, SessionState
from wiseflow_nb.store.paths import DATABASE_NAME, known_roots, sessions_root, valid_session_id
from wiseflow_nb.store.reader import StoreReader

logger = logging.getLogger("wiseflow_nb.store")
#: What is known of sessions that are over, by directory: which files it was read from, and what it said.
Over = dict[Path, tuple[tuple[Any, ...], SessionInfo]]


def all_sessions(state_dir: str, now: float, *more: Path, over: Over | None = None) -> list[SessionInfo]:
    """Every readable session of this user: live ones first, newest first. ``now`` is epoch seconds.

    ``more`` are directories of sessions besides those that are known; ``over`` is as of ``list_sessions``.
    """
    found = [info for root in _roots(state_dir, more) for info in list_sessions(root, now, over)]
    return sorted(found, key=live_and_newest_first)


def newer_text(state_dir: str) -> str:
    """What to say of the sessions that no list has, as a newer version wrote them; empty where there are none."""
    counts = [(root, len(newer_sessions(root))) for root in _roots(state_dir, ())]
    where = ", ".join(f"{count} in {root}" for root, count in counts if count)
    return f"passed over, as a newer version of wiseflow_nb wrote them: {where}; upgrade to read them" if where else ""


def _roots(state_dir: str, more: tuple[Path, ...]) -> list[Path]:
    return list(dict.fromkeys([*more, *known_roots(state_dir)]))


def find_session(state_dir: str, session_id: str, *more: Path) -> Path:
    """Return the directory of a session, or where it would be if there is none.

    Raises
    ------
    SessionNotFoundError
        If the id is no id.
    """
    found = [session_directory(root, session_id) for root in _roots(state_dir, more)]
    there = [directory for directory in found if directory.is_dir()]
    return there[0] if there else session_directory(sessions_root(state_dir)[0], session_id)


def session_directory(root: Path, session_id: str) -> Path:
    """Return the directory of a session, refusing ids that are not ids."""
    if not valid_session_id(session_id):
        raise SessionNotFoundError(
            f"{session_id[:80]!r} is not a session id; `wiseflow sessions` lists those there are"
        )
    return root / session_id


def list_sessions(root: Path, now: float, over: Over | None = None) -> list[SessionInfo]:
    """Every readable session below ``root``: live ones first, newest first.

    What is in the way (a damaged file, a named pipe, a file of somebody else) is passed over with one warning.
    Who lists again and again keeps ``over``: the files of sessions that are over are opened once, until they change.
    """
    found: list[SessionInfo] = []
    for directory in sorted(root.iterdir(), reverse=True) if root.is_dir() else []:
        if not valid_session_id(directory.name):
            continue
        files = () if over is None else _files_of(directory)
        if over is not None and directory in over and over[directory][0] == files:
            found.append(over[directory][1])
            continue
        try:
            with contextlib.closing(StoreReader(directory)) as reader:
                info = reader.info(now)
        except SessionNotFoundError:
            continue
        except (StoreError, OSError) as error:
            _warn_once(str(directory), str(error))
            continue
        except sqlite3.Error:
            continue  # a file still being made, or damaged: not a session yet
        if any(moment == moment for moment in (info.started_seconds, info.last_seen_seconds, info.ended_seconds)):
            found.append(info)
            if over is not None and info.state is not SessionState.LIVE:
                # To live again it would have to write its heartbeat.
                over[directory] = files, info
    return sorted(found, key=live_and_newest_first)


def _files_of(directory: Path) -> tuple[Any, ...]:
    """By what is seen that a session's file, or its log, was written."""
    found: list[tuple[int, ...]] = []
    for end in ("", "-wal"):
        try:
            status = os.stat(directory / f"{DATABASE_NAME}{end}", follow_symlinks=False)
        except OSError:
            found.append(())
        else:
            # An empty log is what a reader leaves behind.
            seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            found.append(seen if status.st_size else ())
    return tuple(found)


def newer_sessions(root: Path) -> list[Path]:
    """The directories below ``root`` of sessions whose file a newer version has written: no list has them."""
    found: list[Path] = []
    for directory in sorted(root.iterdir()) if root.is_dir() else []:
        if valid_session_id(directory.name):
            try:
                StoreReader(directory).close()
            except StoreVersionError:
                found.append(directory)
            except (SessionNotFoundError, StoreError, OSError):
                continue
    return found


def live_and_newest_first(info: SessionInfo) -> tuple[bool, float]:
    """By what lists of sessions are sorted."""
    # One whose start cannot be read is the oldest: NaN would leave all in any order.
    started = info.started_seconds
    return info.state is not SessionState.LIVE, -started if started == started else math.inf


@functools.cache
def _warn_once(directory: str, why: str) -> None:
    logger.warning("%s is passed over: %s", directory, why)
