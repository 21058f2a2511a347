"""Where sessions are kept: a private directory on a local disk, checked before it is used."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from wiseflow_nb.errors import StoreError

DATABASE_NAME = "session.sqlite"
RING_NAME = "ring.bin"
LOG_NAME = "recorder.log"

#: File systems on which SQLite's write-ahead log is unsafe: its shared memory is not shared there.
NETWORK_FILE_SYSTEMS = frozenset(
    [
        "9p",
        "afs",
        "ceph",
        "cifs",
        "fuse.sshfs",
        "fuse.s3fs",
        "glusterfs",
        "fuse.glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "smb3",
        "smbfs",
    ]
)


def sessions_root(state_dir: str = "", environ: Mapping[str, str] | None = None) -> tuple[Path, str]:
    """Return the directory that holds the sessions and, if it is not the first choice, why.

    ``state_dir`` (the setting) is used as it is; otherwise the user's state directory, then
    ``$XDG_RUNTIME_DIR``, then a private directory under the temporary one. It is made, 0700.

    Raises
    ------
    StoreError
        If none can be used, or one belongs to somebody else.
    """
    environ = os.environ if environ is None else environ
    if state_dir:
        root = Path(state_dir).expanduser().absolute() / "sessions"
        private_directory(root)
        return root, ""
    reasons: list[str] = []
    for candidate in _candidates(environ):
        fstype = file_system_of(candidate)
        if fstype in NETWORK_FILE_SYSTEMS:
            reasons.append(f"{candidate} is on a network file system ({fstype})")
            continue
        root = candidate / "sessions"
        try:
            private_directory(root)
        except StoreError as error:
            reasons.append(str(error))
            continue
        return root, f"{'; '.join(reasons)}: sessions are kept in {root}" if reasons else ""
    raise StoreError(
        "no directory for sessions: " + "; ".join(reasons) + "; set STATE_DIR to a private local directory"
    )


def _candidates(environ: Mapping[str, str]) -> list[Path]:
    import platformdirs

    found = [Path(platformdirs.user_state_dir("wiseflow_nb"))]
    if environ.get("XDG_RUNTIME_DIR"):
        found.append(Path(environ["XDG_RUNTIME_DIR"]) / "wiseflow_nb")
    getuid: Callable[[], int] | None = getattr(os, "getuid", None)
    found.append(Path(tempfile.gettempdir()) / f"wiseflow_nb-{getuid() if getuid else 'user'}")
    return found


def private_directory(path: Path) -> None:
    """Make a directory (0700 whatever the umask) or check that an existing one is the user's own.

    Raises
    ------
    StoreError
        If it is a symbolic link, is owned by somebody else, or cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        check_owned(path)
        if stat.S_IMODE(path.stat().st_mode) != 0o700:
            path.chmod(0o700)
    except OSError as error:
        raise StoreError(f"{path} cannot be used ({error.strerror}); set STATE_DIR to a private directory") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise StoreError(f"{path} is not writable; set STATE_DIR to a private directory")


def check_owned(path: Path) -> None:
    """Refuse a symbolic link, or a file or directory that is owned by another user."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise StoreError(f"{path} is a symbolic link; remove it, or set STATE_DIR to a private directory")
    getuid: Callable[[], int] | None = getattr(os, "getuid", None)
    if getuid is not None and status.st_uid != getuid():
        raise StoreError(f"{path} belongs to user {status.st_uid}; remove it, or set STATE_DIR to a private directory")


def file_system_of(path: Path, mountinfo: str = "/proc/self/mountinfo") -> str:
    """Return the type of the file system that ``path`` is (or would be) on; empty where unknown."""
    try:
        lines = Path(mountinfo).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    target = str(path.expanduser().absolute())
    best, kind = "", ""
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, after = left.split(), right.split()
        if len(fields) < 5 or not after:
            continue
        mount = fields[4].encode("latin-1", "replace").decode("unicode_escape")
        inside = target == mount or target.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, after[0]
    return kind


def new_session_id(now: float) -> str:
    """Return an id that sorts by time and does not repeat: ``20260131-142500-3f9a1c``."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime(now)) + "-" + secrets.token_hex(3)


def valid_session_id(session_id: str) -> bool:
    """Whether the text has the form of an id: it can then be a directory's name and nothing else."""
    return 1 <= len(session_id) <= 64 and all(part.isalnum() and part.isascii() for part in session_id.split("-"))
