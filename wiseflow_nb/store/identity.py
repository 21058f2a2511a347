"""Which process a session belongs to, so that a reused pid fools nobody."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from typing import Any

import psutil


@dataclass(frozen=True, slots=True)
class Identity:
    """Host, boot, pid namespace, pid and start of a process.

    ``start_seconds`` is since the epoch, and moves when the clock is set; ``start_ticks`` is since
    the boot and does not (0 where the system does not tell).
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    start_seconds: float
    start_ticks: int = 0

    def to_dict(self) -> dict[str, str | int | float]:
        return asdict(self)

    @classmethod
    def read(cls, value: Any) -> Identity | None:
        """Return the identity that ``to_dict`` gave, or None where the value is none."""
        if not isinstance(value, dict):
            return None
        host, boot_id, namespace = (value.get(name) for name in ("host", "boot_id", "pid_namespace"))
        pid, started, ticks = value.get("pid"), value.get("start_seconds"), value.get("start_ticks", 0)
        if not (isinstance(host, str) and isinstance(boot_id, str) and isinstance(namespace, str)):
            return None
        if isinstance(pid, bool) or isinstance(ticks, bool):
            return None
        if not isinstance(pid, int) or not 0 < pid < 2**31 or not isinstance(ticks, int):
            return None
        if not isinstance(started, (int, float)) or isinstance(started, bool) or not abs(started) < 1e15:
            return None
        return cls(host, boot_id, namespace, pid, float(started), ticks)


def identify(pid: int | None = None) -> Identity:
    """Return the identity of a live process (default: this one)."""
    pid = os.getpid() if pid is None else pid
    started = psutil.Process(pid).create_time()
    return Identity(socket.gethostname(), _boot_id(), _pid_namespace(), pid, started, _state_and_ticks(pid)[1])


def is_alive(identity: Identity) -> bool | None:
    """Whether the process still runs; None where this cannot be seen from here (other host or namespace)."""
    here = (socket.gethostname(), _boot_id(), _pid_namespace())
    if here != (identity.host, identity.boot_id, identity.pid_namespace):
        return None
    if identity.start_ticks:
        state, ticks = _state_and_ticks(identity.pid)
        return ticks == identity.start_ticks and state not in ("Z", "X")
    try:
        process = psutil.Process(identity.pid)
        # create_time() is rounded to clock ticks and moves with clock corrections.
        same = abs(process.create_time() - identity.start_seconds) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return None


def still_runs(identity: Any) -> bool | None:
    """Whether the process whose identity was written (``to_dict``) still runs; None where that cannot be seen."""
    known = Identity.read(identity)
    return None if known is None else is_alive(known)


def _state_and_ticks(pid: int) -> tuple[str, int]:
    """The state and the start (ticks since the boot) of a process on Linux; ("", 0) where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            # The name, in parentheses, may hold anything.
            fields = stream.read().rpartition(b")")[2].split()
        return fields[0].decode("ascii"), int(fields[19])
    except (OSError, IndexError, ValueError):
        return "", 0


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
