"""Find sessions wherever they had to be put."""

from __future__ import annotations

from pathlib import Path

from wiseflow_nb.records import SessionInfo
from wiseflow_nb.store.paths import known_roots, sessions_root
from wiseflow_nb.store.reader import list_sessions, live_and_newest_first, newer_sessions, session_directory


def all_sessions(state_dir: str, now: float, *more: Path) -> list[SessionInfo]:
    """Every readable session of this user: live ones first, newest first. ``now`` is epoch seconds.

    ``more`` are directories of sessions besides those that are known.
    """
    found = [info for root in _roots(state_dir, more) for info in list_sessions(root, now)]
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
