"""Which process a session belongs to, so that a reused pid fools nobody."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Identity:
    """Host, boot, pid namespace, pid and start time (seconds since the epoch) of a process."""

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    start_seconds: float

    def to_dict(self) -> dict[str, str | int | float]:
        return asdict(self)


def identify(pid: int | None = None) -> Identity:
    """Return the identity of a live process (default: this one)."""
    pid = os.getpid() if pid is None else pid
    return Identity(socket.gethostname(), _boot_id(), _pid_namespace(), pid, psutil.Process(pid).create_time())


def is_alive(identity: Identity) -> bool | None:
    """Whether the process still runs; None where this cannot be seen from here (other host or namespace)."""
    here = (socket.gethostname(), _boot_id(), _pid_namespace())
    if here != (identity.host, identity.boot_id, identity.pid_namespace):
        return None
    try:
        process = psutil.Process(identity.pid)
        # create_time() is rounded to clock ticks and moves with clock corrections.
        same = abs(process.create_time() - identity.start_seconds) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return None


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
            return stream.read().strip()
    except OSError:
        return f"boot-{int(psutil.boot_time()) // 60}"


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
