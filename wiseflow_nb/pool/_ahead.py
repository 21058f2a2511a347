"""Which queued work was handed ahead of its turn, to whom, and whether it can still be taken back.

A worker that waits for a process may hand the next call on, so that the process finds it when it is
done. That is a guess and no claim: the work stays queued, in its place, and whoever pops, cancels or
outranks it takes it back first. Where that fails it has begun: then it is running, and belongs to
the worker that handed it ahead, which runs it next.

Everything here is called while the crew's lock is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures._base import RUNNING
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any, Protocol, cast

from wiseflow_nb.records import Priority

if TYPE_CHECKING:
    from wiseflow_nb.pool._crew import Worker
    from wiseflow_nb.pool._deques import DequeQueue
    from wiseflow_nb.pool._future import PoolFuture


class AheadCall(Protocol):
    """The function of work that can be handed ahead."""

    @property
    def handed(self) -> bool:
        """Whether somebody has it who begins it in its turn, or has begun it."""

    def take_back(self) -> bool:
        """Return whether it will not be begun by whom it was handed to; does not wait."""

    def go_on(self, *, well: bool) -> None:
        """Tell it that what ran before it has ended; unless that went well, it has not begun."""


class Ahead:
    """The work that is handed ahead: of each worker a few, in their order, those that have begun first."""

    __slots__ = ("_queue", "held")

    def __init__(self, queue: DequeQueue[PoolFuture[Any]]) -> None:
        self._queue = queue
        #: Who handed what ahead; it is queued all the same. Empty for most pools.
        self.held: dict[PoolFuture[Any], Worker] = {}

    def reserve(self, me: Worker, most: int, fits: Callable[[PoolFuture[Any]], bool]) -> list[PoolFuture[Any]]:
        """Note the next work that nobody was handed yet as handed to ``me``, as long as it fits."""
        held = self.held
        if not all(_call(work).handed for work in me.ahead):
            return []  # what was promised to run comes first, and is nowhere yet
        found = list(islice(takewhile(fits, self._queue.coming(held)), most))
        for work in found:
            held[work] = me
        me.ahead += found
        return found

    @property
    def unheld(self) -> int:
        """How much queued work is not handed ahead."""
        return self._queue.size - len(self.held)

    def take_back(self, work: PoolFuture[Any]) -> bool:
        """Make sure that queued work is begun by nobody; if it has been, make it its owner's and return False."""
        owner = self.held.get(work)
        if owner is None:
            return True
        self.take_back_from(owner)
        return work._state != RUNNING

    def take_back_from(self, owner: Worker) -> bool:
        """Take back what a worker has handed ahead; return whether nothing of it has begun or will."""
        for work in [work for work in owner.ahead if work._state != RUNNING]:
            # A finaliser, which the collector runs at any step, may have come first: it finds the lock its own.
            back = work in self.held and _call(work).take_back()
            if work not in self.held:
                continue
            if back:
                del self.held[work]
                owner.ahead.remove(work)
            else:
                self._begin(work)
        return not any(_call(work).handed for work in owner.ahead)

    def give_up(self, me: Worker, works: Iterable[PoolFuture[Any]]) -> None:
        """Let go of work that ``me`` reserved and has not handed ahead."""
        for work in works:
            if self.held.get(work) is me and _call(work).take_back():
                del self.held[work]
                me.ahead.remove(work)

    def take_back_all(self, below: int = len(Priority)) -> None:
        """Take back the work of the classes below one."""
        for owner in {owner for work, owner in self.held.items() if work._priority < below}:
            self.take_back_from(owner)

    def go_on(self, me: Worker, now: float, *, well: bool) -> bool:
        """What ran before has ended: return whether ``me`` has its next work, which has begun.

        Unless that went well, what was handed ahead is void. It is queued as it was; only what had
        been found begun, and so was promised to run, is still this worker's next.
        """
        work = me.ahead[0]
        if well:
            if not _call(work).handed:
                return False
            if work._state != RUNNING:
                self._begin(work)
            me.ahead_since = now
            _call(work).go_on(well=True)
            return True
        promised = sum(work._state == RUNNING for work in me.ahead)
        for work in me.ahead[promised:]:
            if self.held.pop(work, None) is not None:
                call = _call(work)
                call.take_back()
                call.go_on(well=False)
        del me.ahead[promised:]
        for work in me.ahead:
            _call(work).go_on(well=False)
        return False

    def _begin(self, work: PoolFuture[Any]) -> None:
        self._queue.discard(work)
        del self.held[work]
        work._state = RUNNING


def _call(work: PoolFuture[Any]) -> AheadCall:
    return cast("AheadCall", work._fn)


def begun(workers: Iterable[Worker]) -> int:
    """How much work has begun and is not yet its worker's present work."""
    return sum(work._state == RUNNING for worker in workers for work in worker.ahead)
