"""When a failed attempt is made again, and how long it waits first."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.oracles.plain_tasks._machine import is_cancel
from wiseflow_nb.errors import UsageError


@dataclass(frozen=True, slots=True)
class Retry:
    """How often, on what, and after which delay a task is tried again.

    Parameters
    ----------
    times
        Further attempts after the first; default 0.
    on
        Exception types that are worth another attempt; default every ``Exception``. A cancel,
        KeyboardInterrupt and SystemExit never are.
    base, cap
        Seconds: retry ``k`` waits at most ``min(cap, base * 2**(k - 1))``. Default 1 and 60.
    jitter
        ``"full"`` (default): uniform between 0 and that bound ("full jitter", AWS Architecture
        Blog, "Exponential Backoff And Jitter", 2015). None: exactly the bound.
    seed
        Makes the jitter of each task repeatable.

    Raises
    ------
    UsageError
        If a value does not fit.

    Examples
    --------
    >>> rule = Retry(3, jitter=None)
    >>> [rule.delay(k, random.Random()) for k in (1, 2, 3)]
    [1.0, 2.0, 4.0]
    """

    times: int = 0
    on: tuple[type[BaseException], ...] | type[BaseException] = (Exception,)
    base: float = 1.0
    cap: float = 60.0
    jitter: str | None = "full"
    seed: int | None = None

    def __post_init__(self) -> None:
        kinds = self.on if isinstance(self.on, tuple) else (self.on,)
        if isinstance(self.times, bool) or not isinstance(self.times, int) or self.times < 0:
            raise UsageError(f"retry times {self.times!r} is not a number of attempts; give 0 or more")
        if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
            raise UsageError(f"retry on={self.on!r} names no exception types; give a type or a tuple of types")
        if not (self.base >= 0 and self.cap >= 0):
            raise UsageError(f"retry base={self.base!r}, cap={self.cap!r}; give seconds of 0 or more")
        if self.jitter not in ("full", None):
            raise UsageError(f"retry jitter {self.jitter!r} is unknown; give 'full' or None")

    def delay(self, k: int, rng: random.Random) -> float:
        """Return the seconds to wait before retry ``k``, counted from 1."""
        # Past 2**1000 the cap has long won; a larger power would overflow.
        bound = min(self.cap, self.base * 2.0 ** min(k - 1, 1000))
        return bound if self.jitter is None else rng.uniform(0.0, bound)

    def covers(self, error: BaseException | None) -> bool:
        """Whether this rule tries again after such an error."""
        never = (KeyboardInterrupt, SystemExit, GeneratorExit)
        return isinstance(error, self.on) and not isinstance(error, never) and not is_cancel(error)

    @classmethod
    def parse(cls, value: Retry | int) -> Retry:
        """Return a rule from itself or from a number of further attempts."""
        return value if isinstance(value, Retry) else cls(value)
