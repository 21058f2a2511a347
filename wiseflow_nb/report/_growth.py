"""Under which task or cell the kernel's memory grew: pure, from samples and the times of the work.

Memory of a thread is not attributable, so nothing is divided up: each task is given all that the
process tree grew while it ran, and how much of that came while nothing else ran. Between two
samples memory is taken to change evenly.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from wiseflow_nb.lines import one_line
from wiseflow_nb.records import CellRecord, Sample, TaskRecord
from wiseflow_nb.report._facts import Facts, Growth

#: Less than this is the interpreter's own breathing.
LEAST_BYTES = 16e6
#: Whoever saw this share of the largest growth is a candidate; among them the fastest grower is named.
CANDIDATE_SHARE = 0.8
#: A cell that waits for its task starts a moment earlier: the task is what worked.
TASK_PREFERENCE = 0.9
MOST_OTHERS = 5


class Span(NamedTuple):
    """When a piece of work ran (seconds since the epoch)."""

    key: str
    label: str
    is_task: bool
    begin: float
    end: float


def task_label(task: TaskRecord) -> str:
    """How a task is named in a sentence."""
    return f"task {one_line(task.name)!r} ({one_line(task.task_id, 40)})"


def cell_label(cell: CellRecord) -> str:
    """How a cell is named in a sentence."""
    line = one_line(cell.first_line)
    return f"cell [{cell.number}]" + (f" {line!r}" if line else "")


def spans(tasks: Iterable[TaskRecord], cells: Iterable[CellRecord], end: float) -> list[Span]:
    """The times of all work that started; what did not finish ran until ``end``."""
    found = [
        Span(task.task_id, task_label(task), True, task.started_seconds, _until(task.finished_seconds, end))
        for task in tasks
        if math.isfinite(task.started_seconds)
    ]
    found += [
        Span(cell.cell_id, cell_label(cell), False, cell.started_seconds, _until(cell.finished_seconds, end))
        for cell in cells
        if math.isfinite(cell.started_seconds)
    ]
    return [span for span in found if span.end > span.begin]


def _until(finished: float, end: float) -> float:
    return min(finished, end) if math.isfinite(finished) else end


class _Memory:
    """The kernel tree's resident memory as a function of time, linear between samples."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        pairs = [(item.time_seconds, item.process_memory_rss_bytes) for item in samples]
        # A clock that was set back gives times that do not rise.
        ordered = sorted({moment: rss for moment, rss in pairs if rss > 0 and math.isfinite(moment)}.items())
        self.times = [moment for moment, _ in ordered]
        self._bytes = [rss for _, rss in ordered]

    def at(self, moment: float) -> float:
        at = bisect.bisect_left(self.times, moment)
        if at == 0:
            return self._bytes[0]
        if at == len(self.times):
            return self._bytes[-1]
        before, after = self.times[at - 1], self.times[at]
        share = (moment - before) / (after - before)
        return self._bytes[at - 1] + share * (self._bytes[at] - self._bytes[at - 1])


def growth(samples: Sequence[Sample], work: Sequence[Span]) -> tuple[Growth, ...]:
    """How much memory grew under each piece of work, the likeliest grower first.

    Only what grew by 16 MB or more is told. Of those that saw nearly all of the largest growth
    (80 %), the one under which it was fastest comes first: whoever ran long before it is less likely.
    """
    memory = _Memory(samples)
    if len(memory.times) < 2:
        return ()
    first, last = memory.times[0], memory.times[-1]
    inside = [
        span._replace(begin=max(span.begin, first), end=min(span.end, last))
        for span in work
        if span.begin < last and span.end > first
    ]
    inside = [span for span in inside if span.end > span.begin]
    alone = _alone(memory, inside)
    found = [
        Growth(
            span.label, span.key, span.is_task, memory.at(span.end) - memory.at(span.begin), part, span.end - span.begin
        )
        for span, part in zip(inside, alone, strict=True)
    ]
    largest = max((item.grown_bytes for item in found), default=0.0)
    if largest < LEAST_BYTES:
        return ()
    fastest = max(_rate(item) for item in found if item.grown_bytes >= CANDIDATE_SHARE * largest)

    def order(item: Growth) -> tuple[bool, bool, float]:
        candidate = item.grown_bytes >= CANDIDATE_SHARE * largest
        preferred = candidate and item.is_task and _rate(item) >= TASK_PREFERENCE * fastest
        return (not candidate, not preferred, -_rate(item) if candidate else -item.grown_bytes)

    ranked = sorted((item for item in found if item.grown_bytes >= LEAST_BYTES), key=order)
    by_key = {(span.is_task, span.key): span for span in inside}
    return tuple(_with_others(item, by_key[item.is_task, item.key], inside) for item in ranked[:MOST_OTHERS])


def growth_of(facts: Facts) -> tuple[Growth, ...]:
    """The same, from a session's facts."""
    return growth(facts.samples, spans(facts.tasks, facts.cells, facts.end_seconds))


def _rate(item: Growth) -> float:
    return item.grown_bytes / max(item.seconds, 1e-3)


def _alone(memory: _Memory, work: Sequence[Span]) -> list[float]:
    """For each piece of work, the growth in the times in which it alone ran."""
    edges = sorted(
        [(span.begin, 1, number) for number, span in enumerate(work)]
        + [(span.end, 0, number) for number, span in enumerate(work)]
    )
    running: set[int] = set()
    parts = [0.0] * len(work)
    since = 0.0
    for moment, starts, number in edges:
        if len(running) == 1 and moment > since:
            (only,) = running
            parts[only] += memory.at(moment) - memory.at(since)
        since = moment
        (running.add if starts else running.discard)(number)
    return parts


def _with_others(item: Growth, own: Span, work: Sequence[Span]) -> Growth:
    others = [span for span in work if span is not own and span.begin < own.end and span.end > own.begin]
    others.sort(key=lambda span: max(span.begin, own.begin) - min(span.end, own.end))
    names = [span.label for span in others[:MOST_OTHERS]]
    if len(others) > MOST_OTHERS:
        names.append(f"{len(others) - MOST_OTHERS} more")
    return Growth(item.label, item.key, item.is_task, item.grown_bytes, item.alone_bytes, item.seconds, tuple(names))
