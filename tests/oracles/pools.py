"""The two pools, and what their tests have in common."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from tests.oracles.plain_pool import PlainPool
from wiseflow_nb.pool import ThreadPoolManager

POOLS: dict[str, type[Any]] = {"fast": ThreadPoolManager, "plain": PlainPool}
#: How long a test waits for what must happen; it is never waited out when all is well.
SOON = 20.0


class Blocker:
    """Work that says when it has begun and ends when told."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go = threading.Event()

    def __call__(self) -> str:
        self.entered.set()
        assert self.go.wait(SOON)
        return threading.current_thread().name


def hold(pool: Any) -> Blocker:
    """Keep one worker of the pool busy."""
    blocker = Blocker()
    pool.submit(blocker)
    assert blocker.entered.wait(SOON)
    return blocker


def eventually(what: Callable[[], bool]) -> None:
    """Wait until something that other threads bring about is so."""
    deadline = time.monotonic() + SOON
    while not what():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.001)


def check(pool: Any) -> None:
    """What holds of a pool at any moment."""
    stats = pool.stats()
    finished = stats.completed + stats.failed + stats.cancelled
    assert stats.submitted == finished + stats.queued + stats.running
    assert 0 <= stats.cancelling <= stats.running
    status = pool.status()
    assert status.min_workers <= status.target <= status.max_workers
    assert status.busy <= status.workers


def check_closed(pool: Any) -> None:
    """What holds of a pool whose work has ended."""
    check(pool)
    status = pool.status()
    assert (status.workers, status.busy, status.queued) == (0, 0, 0)
