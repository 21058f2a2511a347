"""What happens to the workers when the interpreter ends: a short wait, never a hang."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from typing import Any

#: Workers that still run this long after the interpreter began to end are left behind.
EXIT_DEADLINE_SECONDS = 2.0

_pools: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.Lock()
_registered = False


def join_at_exit(pool: Any) -> None:
    """Have the pool's workers joined, with a deadline, when the interpreter ends."""
    global _registered
    with _lock:
        _pools.add(pool)
        if _registered:
            return
        _registered = True
    # A kernel with a busy thread pool is killed before atexit runs; the hook of the threading
    # module runs earlier. It is private, so its absence must not matter.
    register = getattr(threading, "_register_atexit", atexit.register)
    try:
        register(_join_all)
    except RuntimeError:  # the interpreter is ending already: daemon threads end with it
        return


def _join_all() -> None:
    deadline = time.monotonic() + EXIT_DEADLINE_SECONDS
    pools = list(_pools)
    for pool in pools:
        pool._close(cancel_queued=False)
    for pool in pools:
        pool._join(deadline)
