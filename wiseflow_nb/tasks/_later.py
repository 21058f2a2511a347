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

    def carry_out(self) -> None:
        """Make the calls that are due; not where the lock is held."""
        while self._calls:
            try:
                call = self._calls.popleft()
            except IndexError:  # another thread was faster
                return
            call()

    def _carry_on(self) -> None:
        while self._calls:
            try:
                self.carry_out()
            finally:
                self._under_way = False
            if self._calls:  # added before it was said that nobody is under way
                self._under_way = True
