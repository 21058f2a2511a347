"""Forked children: a recorder is the parent's alone."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forgetful(Protocol):
    """What has a recorder that is not its forked children's."""

    def forget_in_child(self) -> None: ...


_clients: weakref.WeakSet[Forgetful] = weakref.WeakSet()
_hooked = False


def forget_in_children(client: Forgetful) -> None:
    """In a child that is forked, let the client forget its recorder."""
    global _hooked
    _clients.add(client)
    if not _hooked and hasattr(os, "register_at_fork"):
        _hooked = True
        os.register_at_fork(after_in_child=_forget_all)


def forget_no_more(client: Forgetful) -> None:
    """The client has no recorder any more."""
    _clients.discard(client)


def _forget_all() -> None:
    for client in list(_clients):
        client.forget_in_child()
