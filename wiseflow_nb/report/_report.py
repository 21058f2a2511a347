"""The report: frozen, made of facts, shown as a page in a notebook and as text everywhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wiseflow_nb.records import to_json_dict
from wiseflow_nb.report._diagnose import diagnose
from wiseflow_nb.report._facts import Cause, Facts, Growth
from wiseflow_nb.report._growth import growth_of


@dataclass(frozen=True, slots=True)
class Report:
    """How a session stands or ended, what was running, and the likeliest cause with its evidence.

    It shows itself in a notebook; ``print(report)`` gives the same as text, ``to_dict()`` as JSON.

    Parameters
    ----------
    facts
        What the record holds of the last minutes.
    causes
        The explanations, the likeliest first; never empty.
    grown
        Under which tasks and cells the kernel's memory grew, the likeliest grower first.

    Examples
    --------
    >>> from wiseflow_nb.records import SessionInfo, SessionState
    >>> info = SessionInfo("20260101-000000-abcdef", SessionState.ENDED, "etl", "here", 7, 0.0, 60.0)
    >>> report = Report.of(Facts(info, 90.0, ended_mark_seconds=60.0, end_reason="closed"))
    >>> report.cause.sentence
    'It ended in order: closed.'
    """

    facts: Facts
    causes: tuple[Cause, ...]
    grown: tuple[Growth, ...] = ()

    @classmethod
    def of(cls, facts: Facts) -> Report:
        """Judge the facts."""
        return cls(facts, diagnose(facts), growth_of(facts))

    @property
    def cause(self) -> Cause:
        """The likeliest cause."""
        return self.causes[0]

    def __str__(self) -> str:
        from wiseflow_nb.report._text import report_text

        return report_text(self)

    def __repr__(self) -> str:
        return f"<Report {self.facts.info.session_id} {self.facts.info.state}: {self.cause.sentence}>"

    def _repr_html_(self) -> str:
        from wiseflow_nb.report._html import report_html

        return report_html(self)

    def to_html(self) -> str:
        """The report as one page of its own: no scripts, nothing from elsewhere."""
        from wiseflow_nb.report._html import page_html

        return page_html(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain values that ``json`` can write; times in seconds since the epoch."""
        from wiseflow_nb.report._text import oom_counts

        facts = self.facts
        start, end = oom_counts(facts)
        alive = facts.last_alive
        return {
            "session": to_json_dict(facts.info),
            "end_seconds": _finite(facts.end_seconds),
            "end_reason": facts.end_reason,
            "heartbeat_seconds": _finite(facts.heartbeat_seconds),
            "causes": [to_json_dict(cause) for cause in self.causes],
            "grown": [to_json_dict(item) for item in self.grown],
            "running": [to_json_dict(task) for task in facts.tasks if facts.was_running(task)],
            "running_count": facts.tasks_in_flight,
            "cells": [to_json_dict(cell) for cell in facts.cells],
            "alerts": [to_json_dict(alert) for alert in facts.alerts],
            "oom_kills": {"start": _finite(start), "end": _finite(end)},
            "last_sample": None if alive is None else {name: _finite(value) for name, value in alive._asdict().items()},
            "gaps": sum(1 for sample in facts.samples if sample.gap),
            "dropped_rows": facts.dropped_rows,
        }


def _finite(value: float) -> float | None:
    return value if value - value == 0 else None
