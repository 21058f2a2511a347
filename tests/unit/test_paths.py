"""Where sessions are kept: every kind of unfit directory is passed over, and the reason says what to do."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from wiseflow_nb.errors import StoreError
from wiseflow_nb.store import paths
from wiseflow_nb.store.paths import (
    MEMORY_ROOT,
    NETWORK_FILE_SYSTEMS,
    check_links,
    database_uri,
    file_system_of,
    in_memory,
    known_roots,
    private_directory,
    sessions_root,
)
from wiseflow_nb.store.reader import StoreReader
from wiseflow_nb.store.writer import StoreWriter

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and process groups are POSIX")


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    for name in ("run", "tmp"):
        (tmp_path / name).mkdir(mode=0o700)
    return {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "TMPDIR": str(tmp_path / "tmp")}


def mounted(monkeypatch: pytest.MonkeyPatch, *kinds: tuple[Path, str]) -> None:
    """Let directories be on file systems of other kinds."""

    def kind(path: Path, mountinfo: str = "") -> str:
        return next((name for where, name in kinds if path.is_relative_to(where)), "ext4")

    monkeypatch.setattr(paths, "file_system_of", kind)


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "lustre", "gpfs", "beegfs", "fuse.gcsfuse", "ceph"]
)
def test_a_network_file_system_is_passed_over(
    kind: str, tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted(monkeypatch, (tmp_path / "home", kind))
    root, why = sessions_root(str(tmp_path / "home" / "state"), environ)
    assert root == tmp_path / "run" / "wiseflow_nb" / "sessions"
    assert f"network file system ({kind})" in why
    assert str(root) in why
    assert not (tmp_path / "home").exists()


def test_the_order_is_state_runtime_temporary_memory(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = str(tmp_path / "state")
    assert sessions_root(state, environ) == (tmp_path / "state" / "sessions", "")
    mounted(monkeypatch, (tmp_path / "state", "nfs"))
    assert sessions_root(state, environ)[0] == tmp_path / "run" / "wiseflow_nb" / "sessions"
    mounted(monkeypatch, (tmp_path / "state", "nfs"), (tmp_path / "run", "nfs"))
    root, why = sessions_root(state, environ)
    assert root == tmp_path / "tmp" / f"wiseflow_nb-{os.getuid()}" / "sessions"
    assert why.count("network file system") == 2
    for made in (root, root.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    mounted(monkeypatch, (tmp_path, "nfs"))
    root, why = sessions_root(state, environ)
    assert root == MEMORY_ROOT
    assert "in memory only" in why


def test_sessions_are_looked_for_wherever_they_may_have_gone(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = str(tmp_path / "state")
    assert known_roots(state, environ) == []
    first, _ = sessions_root(state, environ)
    mounted(monkeypatch, (tmp_path / "state", "nfs"))
    second, _ = sessions_root(state, environ)
    assert known_roots(state, environ) == [first, second]


def test_the_user_s_own_state_directory_is_the_default(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    root, why = sessions_root("", environ)
    assert why == ""
    assert root.name == "sessions"
    assert root.parent.name == "wiseflow_nb"


@pytest.mark.parametrize("part", ["state", "state/sessions"])
def test_what_belongs_to_somebody_else_is_refused(
    part: str, tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / part).mkdir(parents=True)
    real = Path.lstat

    def lstat(self: Path) -> os.stat_result:
        found = real(self)
        return os.stat_result((*found[:4], 12345, *found[5:])) if self == tmp_path / part else found

    monkeypatch.setattr(Path, "lstat", lstat)
    root, why = sessions_root(str(tmp_path / "state"), environ)
    assert root == tmp_path / "run" / "wiseflow_nb" / "sessions"
    assert "belongs to user 12345" in why
    assert "set STATE_DIR" in why


@pytest.mark.parametrize("part", ["state", "state/sessions"])
def test_a_symbolic_link_in_the_path_is_refused(part: str, tmp_path: Path, environ: dict[str, str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / part).parent.mkdir(exist_ok=True)
    (tmp_path / part).symlink_to(tmp_path / "elsewhere")
    root, why = sessions_root(str(tmp_path / "state"), environ)
    assert root == tmp_path / "run" / "wiseflow_nb" / "sessions"
    assert "symbolic link" in why
    assert "set STATE_DIR" in why
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_foreign_link_above_is_refused_and_the_user_s_own_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    private_directory(link / "mine")
    real = Path.lstat

    def lstat(self: Path) -> os.stat_result:
        found = real(self)
        return os.stat_result((*found[:4], 12345, *found[5:])) if self == link else found

    monkeypatch.setattr(Path, "lstat", lstat)
    with pytest.raises(StoreError, match="symbolic link of user 12345"):
        check_links(link / "mine")


@pytest.mark.parametrize("name", ["session.sqlite", "directory"])
def test_a_session_that_is_a_link_is_neither_read_nor_written(name: str, tmp_path: Path) -> None:
    session = tmp_path / "20200101-000000-abcdef"
    session.mkdir(mode=0o700)
    StoreWriter(session / "session.sqlite").close()
    if name == "directory":
        session.rename(tmp_path / "real")
        session.symlink_to(tmp_path / "real")
        with pytest.raises(StoreError, match="symbolic link"):
            private_directory(session)
    else:
        (session / name).rename(session / "real.sqlite")
        (session / name).symlink_to(session / "real.sqlite")
        with pytest.raises(StoreError):
            StoreWriter(session / "session.sqlite")
    with pytest.raises(StoreError, match="symbolic link"):
        StoreReader(session)


def test_a_file_of_somebody_else_s_is_neither_read_nor_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    StoreWriter(tmp_path / "session.sqlite").close()
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    for opened in (lambda: StoreWriter(tmp_path / "session.sqlite"), lambda: StoreReader(tmp_path)):
        with pytest.raises(StoreError, match="belongs to user"):
            opened()


def test_a_file_in_the_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o600)
    with pytest.raises(StoreError, match="not a directory"):
        private_directory(tmp_path / "file")
    with pytest.raises(StoreError, match="set STATE_DIR"):
        private_directory(tmp_path / "file" / "below")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def test_a_directory_without_room_is_passed_over_by_who_writes(
    tmp_path: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def take(fd: int, size: int) -> None:
        asked.append(size)
        if len(asked) == 1:
            raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(paths, "_take", take)
    state = str(tmp_path / "state")
    assert sessions_root(state, environ) == (tmp_path / "state" / "sessions", "")
    root, why = sessions_root(state, environ, for_writing=True)
    assert root == tmp_path / "run" / "wiseflow_nb" / "sessions"
    assert "Disk quota exceeded" in why
    assert list((tmp_path / "state" / "sessions").iterdir()) == []


def test_every_mount_is_read_whatever_its_name(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "1 0 0:1 / / rw - ext4 /dev/a rw\n2 1 0:2 / /home/日本 rw - nfs server:/x rw\n"
        "3 1 0:3 / /back\\134slash\\011tab rw - cifs x rw\n4 1 0:4 / /home/日本 rw - tmpfs over rw\nshort line\n",
        encoding="utf-8",
    )
    assert file_system_of(Path("/home/日本/x"), str(table)) == "tmpfs"
    assert file_system_of(Path("/back\\slash\ttab"), str(table)) == "cifs"
    assert file_system_of(Path("/home"), str(table)) == "ext4"


def test_a_link_to_a_network_file_system_is_seen_through(tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "share")
    table = tmp_path / "mountinfo"
    table.write_text(f"1 0 0:1 / / rw - ext4 /dev/a rw\n2 1 0:2 / {os.path.realpath(tmp_path)}/share rw - nfs x rw\n")
    assert file_system_of(tmp_path / "home" / "me", str(table)) in NETWORK_FILE_SYSTEMS


def test_memory_is_no_path(tmp_path: Path) -> None:
    where = MEMORY_ROOT / "20200101-000000-abcdef" / "session.sqlite"
    assert in_memory(where)
    assert not in_memory(tmp_path / "memory:" / "x")
    assert database_uri(where, "ro") == "file:/20200101-000000-abcdef/session.sqlite?vfs=memdb"
    assert database_uri(tmp_path / "a?b#c.sqlite", "rw").endswith("a%3Fb%23c.sqlite?mode=rw")
    private_directory(where.parent)
    assert not Path("memory:").exists()
