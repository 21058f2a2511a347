"""Where sessions are kept: a private directory on a local disk, checked before it is used."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from wiseflow_nb.errors import StoreError

DATABASE_NAME = "session.sqlite"
RING_NAME = "ring.bin"
LOG_NAME = "recorder.log"
#: What a session is given where no directory can be used: its file and its ring are memory of its process.
MEMORY_ROOT = Path("memory:")
#: The ring, the first pages of the file and its log: with less than this a session is not begun in a place.
NEEDED_BYTES = 4 * 1024 * 1024
_REMEDY = "set STATE_DIR to a private local directory"

#: File systems on which SQLite's write-ahead log is unsafe: its shared memory is not shared there.
NETWORK_FILE_SYSTEMS = frozenset(
    [
        "9p",
        "afs",
        "afpfs",
        "beegfs",
        "ceph",
        "cifs",
        "coda",
        "davfs",
        "fuse.afp",
        "fuse.beegfs",
        "fuse.blobfuse",
        "fuse.blobfuse2",
        "fuse.ceph",
        "fuse.ceph-fuse",
        "fuse.davfs",
        "fuse.gcsfuse",
        "fuse.glusterfs",
        "fuse.goofys",
        "fuse.grpcfuse",
        "fuse.juicefs",
        "fuse.mount-s3",
        "fuse.mountpoint-s3",
        "fuse.rclone",
        "fuse.s3fs",
        "fuse.smbnetfs",
        "fuse.sshfs",
        "fuse.vmhgfs-fuse",
        "gfs2",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "panfs",
        "prl_fs",
        "pvfs2",
        "smb2",
        "smb3",
        "smbfs",
        "vboxsf",
        "vmhgfs",
        "wekafs",
    ]
)


def sessions_root(
    state_dir: str = "", environ: Mapping[str, str] | None = None, *, for_writing: bool = False
) -> tuple[Path, str]:
    """Return the directory that holds the sessions and, if it is not the first choice, why.

    The first choice is ``state_dir`` (the setting), else the user's state directory; then
    ``$XDG_RUNTIME_DIR``, then a directory under the temporary one; last ``MEMORY_ROOT``. A directory
    is made, 0700. One on a network file system, owned by somebody else, reached over a foreign
    symbolic link or not writable is passed over; with ``for_writing`` one without room is, too.
    """
    reasons: list[str] = []
    for root in _roots(state_dir, os.environ if environ is None else environ):
        fstype = file_system_of(root)
        if fstype in NETWORK_FILE_SYSTEMS:
            reasons.append(f"{root.parent} is on a network file system ({fstype})")
            continue
        try:
            _base_directory(root.parent, strict=not state_dir or bool(reasons))
            private_directory(root)
            if for_writing:
                _try_room(root)
        except StoreError as error:
            reasons.append(str(error))
            continue
        return root, f"{'; '.join(reasons)}: sessions are kept in {root}" if reasons else ""
    return MEMORY_ROOT, f"{'; '.join(reasons)}: this session is kept in memory only, and ends with its process"


def known_roots(state_dir: str = "", environ: Mapping[str, str] | None = None) -> list[Path]:
    """Every directory in which this user's sessions may be, first choice first; nothing is made.

    A session may have had to go elsewhere than the one that looks for it.
    """
    found: list[Path] = []
    for root in _roots(state_dir, os.environ if environ is None else environ):
        try:
            if root.is_dir():
                check_owned(root)
                found.append(root)
        except (OSError, StoreError):
            continue
    return found


def in_memory(path: Path) -> bool:
    """Whether a session's directory (or a file in it) is none: all is kept in memory."""
    return path.parts[:1] == MEMORY_ROOT.parts


def database_uri(path: Path, mode: str) -> str:
    """Return the SQLite URI of a session's file; ``mode`` is ro, rw or rwc."""
    if in_memory(path):
        # Shared by the connections of this process, with the locks of a file.
        return f"file:/{'/'.join(path.parts[1:])}?vfs=memdb"
    return f"{path.absolute().as_uri()}?mode={mode}"


def _roots(state_dir: str, environ: Mapping[str, str]) -> Iterator[Path]:
    if state_dir:
        yield Path(state_dir).expanduser().absolute() / "sessions"
    else:
        import platformdirs

        yield Path(platformdirs.user_state_dir("wiseflow_nb")) / "sessions"
    if environ.get("XDG_RUNTIME_DIR"):
        yield Path(environ["XDG_RUNTIME_DIR"]) / "wiseflow_nb" / "sessions"
    # tempfile.gettempdir() would end at the working directory where no other can be written.
    temporary = (environ.get("TMPDIR") or "/tmp") if os.name == "posix" else tempfile.gettempdir()
    yield Path(temporary) / f"wiseflow_nb-{_own_uid() if os.name == 'posix' else 'user'}" / "sessions"


def _base_directory(path: Path, *, strict: bool) -> None:
    """Make or check the directory above the sessions; one that the user named may be the system's (``/srv``)."""
    try:
        exists = strict is False and path.is_dir() and not path.is_symlink() and path.lstat().st_uid == 0
    except OSError as error:
        raise StoreError(f"{path} cannot be used ({error.strerror}); {_REMEDY}") from error
    if not exists:
        private_directory(path, mode_of_existing=strict)


def private_directory(path: Path, *, mode_of_existing: bool = True) -> None:
    """Make a directory (0700 whatever the umask) or check that an existing one is the user's own.

    Directories above it that do not exist are made alike. Without ``mode_of_existing`` the mode of
    one that exists is left as it is.

    Raises
    ------
    StoreError
        If it is a symbolic link or none but a file, is owned by somebody else, is reached over a link
        of somebody else's, or cannot be made or written.
    """
    if in_memory(path):
        return
    try:
        check_links(path)
        made = _make(path)
        check_owned(path)
        status = path.stat()
        if not stat.S_ISDIR(status.st_mode):
            raise StoreError(f"{path} is not a directory; remove it, or {_REMEDY}")
        if (made or mode_of_existing) and stat.S_IMODE(status.st_mode) != 0o700:
            path.chmod(0o700)
    except OSError as error:
        raise StoreError(f"{path} cannot be used ({error.strerror}); {_REMEDY}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise StoreError(f"{path} is not writable; {_REMEDY}")


def _make(path: Path) -> bool:
    """Make a directory and those above it, each 0700; return whether it was not there."""
    if not path.parent.exists():
        _make(path.parent)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return False
    path.chmod(0o700)
    return True


def check_owned(path: Path) -> None:
    """Refuse a symbolic link, or a file or directory that is owned by another user."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise StoreError(f"{path} is a symbolic link; remove it, or {_REMEDY}")
    if os.name == "posix" and status.st_uid != _own_uid():
        raise StoreError(f"{path} belongs to user {status.st_uid}; remove it, or {_REMEDY}")


def check_regular(path: Path) -> None:
    """Refuse what ``check_owned`` refuses, and what is no regular file: to open a named pipe would be to wait."""
    check_owned(path)
    if not stat.S_ISREG(path.lstat().st_mode):
        raise StoreError(f"{path} is not a regular file; remove it")


def check_links(path: Path) -> None:
    """Refuse a path that leads over a symbolic link which is neither the user's own nor the system's."""
    if os.name != "posix":
        return
    for part in path.absolute().parents:
        try:
            status = part.lstat()
        except FileNotFoundError:
            continue
        if stat.S_ISLNK(status.st_mode) and status.st_uid not in (0, _own_uid()):
            raise StoreError(f"{part} is a symbolic link of user {status.st_uid}; {_REMEDY}")


def _own_uid() -> int:
    getuid: Callable[[], int] | None = getattr(os, "getuid", None)
    return getuid() if getuid is not None else 0


def _try_room(directory: Path) -> None:
    """Take the bytes that a session needs at its begin, and give them back: a quota shows in no other way."""
    path = directory / f".room-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            _take(fd, NEEDED_BYTES)
        finally:
            os.close(fd)
            path.unlink()
    except OSError as error:
        raise StoreError(
            f"{directory} has no room for a session ({error.strerror}); free some, or {_REMEDY}"
        ) from error


def _take(fd: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                raise
        else:
            return
    while size > 0:
        size -= os.write(fd, bytes(min(size, 1 << 20)))


def file_system_of(path: Path, mountinfo: str = "/proc/self/mountinfo") -> str:
    """Return the type of the file system that ``path`` is (or would be) on; empty where unknown."""
    try:
        lines = Path(mountinfo).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    target = os.path.realpath(path.expanduser())
    best, kind = "", ""
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, after = left.split(" "), right.split()
        if len(fields) < 5 or not after:
            continue
        # Space, tab, newline and backslash are written as three octal digits.
        mount = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4])
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
