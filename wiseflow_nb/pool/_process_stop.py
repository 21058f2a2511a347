"""How code in a worker process is stopped: first its token, then an exception in it, then the kill."""

from __future__ import annotations

from dataclasses import dataclass

#: Code that was asked to stop may look at its token this long; then TaskCancelledError is raised in it.
TOKEN_SECONDS = 0.25
#: Code that was asked to stop and has not is killed after this long, with all that it started.
KILL_SECONDS = 0.5
#: Code that did stop may spend this long in the cleanup handlers that it pushed inside the process.
CLEANUP_SECONDS = 5.0
#: How often a silent worker is looked at: what it started may hold its pipes open after its death.
LOOK_SECONDS = 1.0


@dataclass(slots=True)
class StopPlan:
    """What is done when about code that was asked to stop; times are monotonic seconds.

    Examples
    --------
    >>> plan = StopPlan(asked=10.0)
    >>> plan.due(10.0), plan.due(10.25), plan.due(10.5)
    (('wait', 0.25), ('interrupt', 0.25), ('kill', 0.0))
    """

    asked: float | None = None
    #: When the code had stopped and its cleanup inside the process began.
    stopped: float | None = None
    interrupted: bool = False

    def due(self, now: float) -> tuple[str, float]:
        """What to do now (``wait``, ``interrupt``, ``kill``), and the seconds until there may be more to do."""
        if self.asked is None:
            return "wait", LOOK_SECONDS
        if self.stopped is not None:
            left = max(self.asked, self.stopped) + CLEANUP_SECONDS - now
        else:
            left = self.asked + KILL_SECONDS - now
        if left <= 0.0:
            return "kill", 0.0
        if self.interrupted or self.stopped is not None:
            return "wait", left
        patience = self.asked + TOKEN_SECONDS - now
        return ("wait", min(patience, left)) if patience > 0.0 else ("interrupt", left)
