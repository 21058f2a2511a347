"""Whether somebody keeps an asyncio task, told by its reference count where that can be told.

A runner that is kept by somebody, who got it as the current task, must not take another task: a late
cancel would hit that one. Only CPython counts references, and what its counts say of a task depends
on how its steps are made (the version, a build without the interpreter's lock, another class of
tasks or loops). So it is tried once for each kind, on a task of its own; where the counts do not tell,
and until it is known, a runner takes one task only.
"""

from __future__ import annotations

import asyncio
import sys
import types
import weakref
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wiseflow_nb.tasks._loop import TaskLoop

Kind = tuple[type[Any], type[Any]]

#: What is known of each kind of loop and task.
_tell: dict[Kind, bool] = {}
#: Kinds of loops that a test moves on which it was tried ahead.
_tried: set[type[Any]] = set()
#: Where it is being tried.
_trying: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()


def counts_tell(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> bool:
    """Whether ``sys.getrefcount`` tells that somebody keeps a task such as this; False while that is not known."""
    return _tell.get((type(loop), type(task)), False)


def try_counts(loop: asyncio.AbstractEventLoop) -> None:
    """On the loop: begin to find out, unless it is known or under way."""
    kind = type(loop), asyncio.Task
    if kind in _tell or loop in _trying:
        return
    if not hasattr(sys, "getrefcount"):
        _tell[kind] = False
        return
    _trying.add(loop)
    found: list[bool] = []
    trial = asyncio.Task(_trial(loop, found), loop=loop, name="wiseflow-trial")
    # The loop may be closed under it; then the next one tries.
    trial._log_destroy_pending = False  # type: ignore[attr-defined]

    def ended(task: asyncio.Task[None]) -> None:
        _trying.discard(loop)
        if not task.cancelled():
            _tell[kind] = task.exception() is None and all(found)

    trial.add_done_callback(ended)


def try_ahead(loop: TaskLoop) -> None:
    """Find out now on a loop that a test moves, so that the first manager of a process does as the later ones do."""
    run_until_idle = getattr(loop, "run_until_idle", None)
    if run_until_idle is None or loop.current or type(loop) in _tried:
        return
    _tried.add(type(loop))
    loop.call(_try_here)
    run_until_idle()


def _try_here() -> None:
    try_counts(asyncio.get_running_loop())


async def _trial(loop: asyncio.AbstractEventLoop, found: list[bool]) -> None:
    me = asyncio.current_task()
    assert me is not None
    await _steps(loop, me, found)


@types.coroutine
def _steps(loop: asyncio.AbstractEventLoop, me: asyncio.Task[Any], found: list[bool]) -> Generator[Any, Any, None]:
    # Steps as a runner's are: the first, one after others had their turn, one after something awaited.
    known = sys.getrefcount(me)
    yield None
    found.append(sys.getrefcount(me) == known)
    awaited = loop.create_future()
    loop.call_soon(awaited.set_result, None)
    yield from awaited
    found.append(sys.getrefcount(me) == known)
    kept: list[Any] = [me]
    found.append(sys.getrefcount(me) == known + 1)
    kept = [me.cancel]
    found.append(sys.getrefcount(me) == known + 1)
    kept.clear()
    found.append(sys.getrefcount(me) == known)
