"""The verbs of a view, each one command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wiseflow_nb.records import (
    CommandResult,
)

if TYPE_CHECKING:
    pass


class Verbs:
    """The verbs of a view, each one command."""

    def _perform(self, verb: str, **arguments: Any) -> CommandResult:
        raise NotImplementedError

    def cancel(self, task_id: str) -> CommandResult:
        """Cancel a task."""
        return self._perform("cancel", task_id=task_id)

    def retry(self, task_id: str) -> CommandResult:
        """Run a finished task again, as a new one."""
        return self._perform("retry", task_id=task_id)

    def reprioritise(self, task_id: str, priority: str) -> CommandResult:
        """Give a task another class: low, normal, high or critical."""
        return self._perform("reprioritise", task_id=task_id, priority=priority)

    def pause(self) -> CommandResult:
        """Start no new task until ``resume``."""
        return self._perform("pause")

    def resume(self) -> CommandResult:
        """Start tasks again."""
        return self._perform("resume")

    def resize(self, min_workers: int, max_workers: int) -> CommandResult:
        """Set the pool's bounds."""
        return self._perform("resize", min_workers=min_workers, max_workers=max_workers)

    def configure(self, changes: Mapping[str, Any]) -> CommandResult:
        """Change settings, all or none."""
        return self._perform("configure", changes=dict(changes))

    def acknowledge(self, alert_id: str) -> CommandResult:
        """Mark an open alert as seen."""
        return self._perform("acknowledge", alert_id=alert_id)

    def silence(self, alert_id: str, seconds: float) -> CommandResult:
        """Keep an open alert quiet for so long."""
        return self._perform("silence", alert_id=alert_id, seconds=seconds)

    def shutdown(self, mode: str = "cancel_pending") -> CommandResult:
        """End the session's work: drain, cancel_pending or now."""
        return self._perform("shutdown", mode=mode)
