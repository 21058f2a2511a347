"""The life of a task as functions of values: which moves are legal, and what an ended attempt means."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterable, Mapping
from concurrent.futures import CancelledError
from types import MappingProxyType

from wiseflow_nb.errors import IllegalTransitionError
from wiseflow_nb.records import TaskState

_S = TaskState

#: What a new task may be at first.
BIRTH: frozenset[TaskState] = frozenset({_S.WAITING, _S.PENDING})

#: Every legal move. LOST is only ever read back after a crash, never moved to.
LEGAL: Mapping[TaskState, frozenset[TaskState]] = MappingProxyType(
    {
        _S.WAITING: frozenset({_S.PENDING, _S.SKIPPED, _S.CANCELLED, _S.TIMED_OUT}),
        _S.PENDING: frozenset({_S.RUNNING, _S.CANCELLED, _S.TIMED_OUT}),
        _S.RUNNING: frozenset({_S.COMPLETED, _S.FAILED, _S.RETRY_WAIT, _S.CANCELLING, _S.PENDING}),
        _S.RETRY_WAIT: frozenset({_S.PENDING, _S.CANCELLED, _S.TIMED_OUT}),
        _S.CANCELLING: frozenset(
            {_S.CANCELLED, _S.COMPLETED, _S.FAILED, _S.TIMED_OUT, _S.RETRY_WAIT, _S.ABANDONED},
        ),
    }
)


#: The states by number: comparing and counting numbers costs a tenth of hashing members, a few times a task.
STATES: tuple[TaskState, ...] = tuple(TaskState)
CODES: Mapping[TaskState, int] = MappingProxyType({state: code for code, state in enumerate(STATES)})
WAITING, PENDING, RUNNING, RETRY_WAIT, CANCELLING, COMPLETED = range(6)
#: From this number on a state is terminal.
FIRST_TERMINAL = COMPLETED
#: ``LEGAL`` once more: bit ``t`` of ``MOVES[s]`` says whether ``s -> t`` is legal.
MOVES: tuple[int, ...] = tuple(sum(1 << CODES[target] for target in LEGAL.get(state, ())) for state in STATES)
KEPT_MOVES = (1 << 4 * 64) - 1


def went(been: int, code: int) -> int:
    """A history, four bits a state and the newest lowest, with one more state.

    Examples
    --------
    >>> decoded(went(went(0, PENDING), RUNNING))
    ['pending', 'running']
    """
    return (been << 4 | code + 1) & KEPT_MOVES


def decoded(been: int) -> list[str]:
    """The words of a history, the oldest first."""
    words = []
    while been:
        words.append(STATES[(been & 15) - 1].value)
        been >>= 4
    return words[::-1]


class Stop(enum.StrEnum):
    """Why an attempt was asked to stop."""

    NONE = ""
    CANCEL = "cancelled"
    TIMEOUT = "timed out"
    DEADLINE = "deadline passed"


def check_move(task_id: str, history: Iterable[str], source: TaskState | None, target: TaskState) -> None:
    """Refuse a move that the table does not have; ``source`` is None for a new task.

    Raises
    ------
    IllegalTransitionError
        With what the task has been through so far.
    """
    allowed = BIRTH if source is None else LEGAL.get(source, frozenset())
    if target not in allowed:
        been = " -> ".join(history) or "(new)"
        may = ", ".join(sorted(allowed)) or "nothing, it is terminal"
        raise IllegalTransitionError(
            f"task {task_id}: {source or 'new'} -> {target} is not a legal move; it went {been} and may become: {may}"
        )


def is_cancel(error: BaseException | None) -> bool:
    """Whether an exception is the way in which code says that it was cancelled."""
    return isinstance(error, (asyncio.CancelledError, CancelledError))


def outcome(stop: Stop, error: BaseException | None, *, may_retry: bool, may_rerun: bool = False) -> TaskState:
    """Return what an attempt leads to whose code has ended.

    Parameters
    ----------
    stop
        Why it had been asked to stop *before* its code ended; NONE if it was not, or too late.
    error
        What the code raised, None if it returned.
    may_retry
        Whether attempts are left and the retry rule covers what happened.
    may_rerun
        Whether the worker was lost, and the task may be queued once more for that.

    Examples
    --------
    >>> outcome(Stop.NONE, None, may_retry=False), outcome(Stop.TIMEOUT, None, may_retry=False)
    (<TaskState.COMPLETED: 'completed'>, <TaskState.TIMED_OUT: 'timed_out'>)
    """
    if stop is Stop.TIMEOUT:
        return _S.RETRY_WAIT if may_retry else _S.TIMED_OUT
    if stop is Stop.DEADLINE:
        return _S.TIMED_OUT
    if stop is Stop.CANCEL:
        return _S.CANCELLED if error is None or is_cancel(error) else _S.FAILED
    if error is None:
        return _S.COMPLETED
    if is_cancel(error):
        return _S.CANCELLED
    if may_rerun:
        return _S.PENDING
    return _S.RETRY_WAIT if may_retry else _S.FAILED
