"""Who is told of a fork: in the child no thread but one goes on, and a lock that another held stays held."""

from __future__ import annotations

import functools
import os
import weakref
from typing import Protocol


class Forked(Protocol):
    """What is told."""

    def after_fork(self) -> None: ...


def tell_of_forks(one: Forked) -> None:
    """Call ``one.after_fork()`` in each forked child, as long as it lives; it must be quick and take no lock."""
    _told().add(one)


def tell_no_more(one: Forked) -> None:
    """``one`` is over: what it had is no child's."""
    _told().discard(one)


@functools.cache
def _told() -> weakref.WeakSet[Forked]:
    told: weakref.WeakSet[Forked] = weakref.WeakSet()

    def tell() -> None:
        for one in list(told):
            one.after_fork()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=tell)
    return told
