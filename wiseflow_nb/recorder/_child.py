"""What a recorder's process is started with: an environment that finds this package, and a pipe that holds much."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

PIPE_BYTES = 1024 * 1024


def child_environment() -> dict[str, str]:
    """The environment for a child that must find this very package, wherever it was imported from."""
    environment = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    if root not in installed:
        # Appended to what is there; never in front of it.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH", ""), root]))
    return environment


def widen(fd: int) -> None:
    """Let a pipe hold more: what it took is safe whatever becomes of this process, also while the recorder waits."""
    try:
        import fcntl

        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except (ImportError, AttributeError, OSError):
        pass  # not on this system, or over the user's limit: it holds what it holds
