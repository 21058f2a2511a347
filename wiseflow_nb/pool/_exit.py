"""What happens to work and workers when the interpreter ends, or forks: a short wait, never a hang.

First those that send work to pools (the task managers) let it run, then they cancel what is left,
and only then do the pools take no more: so nothing fails because its pool was closed under it.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

from wiseflow_nb.pool._work import PoolStats, logger

#: Workers that still run this long after the interpreter began to end are left behind; with the
#: interpreter's own way out that makes less than 2 s.
EXIT_DEADLINE_SECONDS = 1.5
#: Of these, what is asked to stop has so long to do so.
STOP_SECONDS = 0.3


class Joinable(Protocol):
    """What is closed, and waited for, at the end."""

    def close(self, *, cancel_queued: bool) -> None: ...

    def join(self, deadline: float | None) -> object: ...

    def stats(self) -> PoolStats: ...

    def forget_threads(self) -> None: ...


class Stopped(NamedTuple):
    """What was left of a manager's tasks, and what carries their stop out until a moment (monotonic seconds)."""

    waiting: int
    running: int
    finish: Callable[[float], object]


class Ends(NamedTuple):
    """How something that sends work to pools ends; each function is given the thing itself.

    ``let_run`` waits for its work until a moment (monotonic seconds), ``stop`` asks what is left to
    stop, ``forget`` is called in a forked child.
    """

    let_run: Callable[[Any, float], object]
    stop: Callable[[Any], Stopped]
    forget: Callable[[Any], object]


_crews: weakref.WeakSet[Joinable] = weakref.WeakSet()
_senders: weakref.WeakKeyDictionary[Any, Ends] = weakref.WeakKeyDictionary()
# Re-entrant, for a finaliser that makes a pool or a manager may come in between.
_lock = threading.RLock()
_registered = False


def join_at_exit(crew: Joinable) -> None:
    """Have the crew's workers joined, with a deadline, when the interpreter ends."""
    if crew in _crews:
        return
    with _lock:
        _crews.add(crew)
        _register()


def end_at_exit(sender: Any, ends: Ends) -> None:
    """Have its work run, or stopped, when the interpreter ends, before any pool is closed."""
    with _lock:
        _senders[sender] = ends
        _register()


def _register() -> None:
    global _registered
    if _registered:
        return
    _registered = True
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_all)
    # A kernel with a busy thread pool is killed before atexit runs; the hook of the threading
    # module runs earlier. It is private, so its absence must not matter.
    register = getattr(threading, "_register_atexit", atexit.register)
    try:
        register(_end_all)
    except RuntimeError:  # the interpreter is ending already: daemon threads end with it
        return


def _end_all() -> None:
    deadline = time.monotonic() + EXIT_DEADLINE_SECONDS
    with _lock:
        senders = list(_senders.items())
    _end_senders(senders, deadline)
    with _lock:
        crews = list(_crews)
    for crew in crews:
        crew.close(cancel_queued=False)
    for crew in crews:
        crew.join(deadline)
    if queued := sum(crew.stats().queued for crew in crews):
        logger.warning("the interpreter ended before all calls of pools had begun (now cancelled: %d)", queued)
        _bounded([partial(crew.close, cancel_queued=True) for crew in crews], deadline + STOP_SECONDS)


def _end_senders(senders: list[tuple[Any, Ends]], deadline: float) -> None:
    until = deadline - STOP_SECONDS
    for _ in range(2):  # twice: what one of them ran may have given another something to do
        for sender, ends in senders:
            ends.let_run(sender, until)
    stopped = [ends.stop(sender) for sender, ends in senders]
    waiting, running = sum(item.waiting for item in stopped), sum(item.running for item in stopped)
    if waiting or running:
        logger.warning(
            "the interpreter ended before all tasks were done (not begun, now cancelled: %d; running, asked to stop: "
            "%d); drain() or shutdown() the manager first",
            waiting,
            running,
        )
    _bounded([partial(item.finish, deadline) for item in stopped], deadline)


def _bounded(calls: list[Callable[[], object]], deadline: float) -> None:
    # On a thread that can be left behind: done-callbacks are the user's code, and may not return.
    def make_all() -> None:
        for call in calls:
            call()

    thread = threading.Thread(target=make_all, name="wiseflow-exit", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # not to be had any more at this point (Python 3.12.0 to 3.12.2)
        make_all()
    else:
        thread.join(max(0.0, deadline - time.monotonic()))


def _forget_all() -> None:
    # Locks that other threads held at the fork will never be released in the child.
    global _lock
    _lock = threading.RLock()
    for crew in list(_crews):
        crew.forget_threads()
    for sender, ends in list(_senders.items()):
        ends.forget(sender)
