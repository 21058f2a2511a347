"""Calls that come in the midst of a change: a finaliser may run anywhere, also in a thread that holds the lock."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class Later:
    """Carries calls out on a thread of its own, in order, as soon as the lock is free for it.

    The collector may run a finaliser wherever something is made. One that submits or cancels while its
    own thread is in the midst of a change can neither wait for the lock nor change things now.
    """

    def __init__(self) -> None:
        self._calls: deque[Callable[[], object]] = deque()
        self._under_way = False
        # Held while calls are made, so that who waits for all of them waits for the one under way, too.
        self._making = threading.RLock()

    def add(self, call: Callable[[], object]) -> None:
        """Have ``call`` made soon, without the lock."""
        self._calls.append(call)
        if not self._under_way:
            self._under_way = True
            # Where no thread is to be had any more, the next who waits for all tasks makes the call.
            try:
                threading.Thread(target=self._carry_on, name="wiseflow-later", daemon=True).start()
            except RuntimeError:
                self._under_way = False

    def carry_out(self, timeout: float | None = None) -> bool:
        """Make the calls that are due; not where the lock is held.

        Return whether all have been made, those of another thread included, whose calls are waited for
        ``timeout`` seconds at most (default: for ever).
        """
        if not self._making.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
            return False
        try:
            while self._calls:
                self._calls.popleft()()
        finally:
            self._making.release()
        return True

    def _carry_on(self) -> None:
        while self._calls:
            try:
                self.carry_out()
            finally:
                self._under_way = False
            if self._calls:  # added before it was said that nobody is under way
                self._under_way = True
