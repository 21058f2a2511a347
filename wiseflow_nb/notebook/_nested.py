"""Blocking on a coroutine inside the loop that is already running: only where this loses nothing.

nest_asyncio 1.6.0, applied in ipykernel 7 on Python 3.11 and later, silently drops the cells queued
behind the running one, and widget clicks with them; nest-asyncio2 does not. So neither is applied
at import or when the extension is loaded, and the choice is made from what is really running.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

from wiseflow_nb.errors import UsageError

T = TypeVar("T")
_REMEDY = "write `await ...` in the cell instead"


def run_nested(coro: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end and return its result, also inside a running event loop.

    Without a running loop this is ``asyncio.run``. With one, the loop is made re-entrant first, by
    nest_asyncio where that is sound and by nest-asyncio2 where it is not. Prefer ``await`` wherever
    the code can be asynchronous: re-entrance stays on for the rest of the process.

    Parameters
    ----------
    coro
        A coroutine object.

    Raises
    ------
    UsageError
        If it is not a coroutine, or if the loop cannot be made re-entrant without losing cells.

    Examples
    --------
    >>> async def answer():
    ...     return 42
    >>> run_nested(answer())
    42
    """
    if not asyncio.iscoroutine(coro):
        raise UsageError(f"run_nested takes a coroutine, got {type(coro).__name__}; call the async function first")
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coro)
    try:
        make_reentrant(loop)
    except UsageError:
        coro.close()
        raise
    return loop.run_until_complete(coro)


def make_reentrant(loop: asyncio.AbstractEventLoop) -> str:
    """Patch the loop once; return the name of the package that did it."""
    if not isinstance(loop, asyncio.BaseEventLoop):
        raise UsageError(f"a loop of type {type(loop).__name__} cannot be re-entered; {_REMEDY}")
    wanted = choose(kernel_version(), sys.version_info[:2])
    applied = already_applied()
    if applied == "nest_asyncio" and wanted == "nest_asyncio2":
        raise UsageError(
            "nest_asyncio is applied in this kernel, where it drops queued cells; "
            f"restart without it, then {_REMEDY} or call run_nested"
        )
    name = applied or wanted
    try:
        package = importlib.import_module(name)
    except ImportError:
        if name == wanted:
            raise UsageError(f'{name} is not installed; pip install "{name.replace("_", "-")}", or {_REMEDY}') from None
        raise
    package.apply(loop)
    return name


def choose(kernel: tuple[int, ...] | None, python: tuple[int, ...]) -> str:
    """Which package is sound: pure, from the versions of ipykernel (None outside of one) and Python.

    Examples
    --------
    >>> choose((7, 4), (3, 11)), choose((6, 31), (3, 11)), choose(None, (3, 12))
    ('nest_asyncio2', 'nest_asyncio', 'nest_asyncio')
    """
    # asyncio of 3.14 keeps its current task in C state that nest_asyncio (archived) cannot reach.
    if python >= (3, 14):
        return "nest_asyncio2"
    return "nest_asyncio2" if kernel is not None and kernel >= (7,) else "nest_asyncio"


def kernel_version() -> tuple[int, ...] | None:
    """The version of the ipykernel that runs this process, or None where none does."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or getattr(shell, "kernel", None) is None:
        return None
    module = sys.modules.get("ipykernel")
    version = str(getattr(module, "__version__", "7"))
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) or (7,)


def already_applied() -> str:
    """The name of the package that has patched asyncio in this process, or an empty string."""
    patched = getattr(asyncio.run, "__module__", "")
    return patched if patched in {"nest_asyncio", "nest_asyncio2"} else ""
