"""What happens to the workers when the interpreter ends, or forks: a short wait, never a hang."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from typing import Protocol

#: Workers that still run this long after the interpreter began to end are left behind; with the
#: interpreter's own way out that makes less than 2 s.
EXIT_DEADLINE_SECONDS = 1.5


class Joinable(Protocol):
    """What is closed, and waited for, at the end."""

    def close(self, *, cancel_queued: bool) -> None: ...

    def join(self, deadline: float | None) -> object: ...

    def forget_threads(self) -> None: ...


_crews: weakref.WeakSet[Joinable] = weakref.WeakSet()
_lock = threading.Lock()
_registered = False


def join_at_exit(crew: Joinable) -> None:
    """Have the crew's workers joined, with a deadline, when the interpreter ends."""
    global _registered
    if crew in _crews:
        return
    with _lock:
        _crews.add(crew)
        if _registered:
            return
        _registered = True
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_all)
    # A kernel with a busy thread pool is killed before atexit runs; the hook of the threading
    # module runs earlier. It is private, so its absence must not matter.
    register = getattr(threading, "_register_atexit", atexit.register)
    try:
        register(_join_all)
    except RuntimeError:  # the interpreter is ending already: daemon threads end with it
        return


def _join_all() -> None:
    deadline = time.monotonic() + EXIT_DEADLINE_SECONDS
    with _lock:
        crews = list(_crews)
    for crew in crews:
        crew.close(cancel_queued=False)
    for crew in crews:
        crew.join(deadline)


def _forget_all() -> None:
    # Locks that other threads held at the fork will never be released in the child.
    global _lock
    _lock = threading.Lock()
    for crew in list(_crews):
        crew.forget_threads()
