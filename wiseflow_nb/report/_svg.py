"""A small picture of the last minutes: one quantity with its limit and thresholds, the work as bars below it.

Inline SVG without scripts; colours come from the page's variables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 600.0, 120.0
#: The captions of the levels stand in the right margin, so that they are never on the line.
LEFT, RIGHT, TOP = 2.0, 104.0, 8.0
LANE, BAR = 17.0, 13.0
AXIS = 17.0
CAPTION = 12.0
MOST_POINTS = 320
#: Narrower bars carry no name.
LEAST_NAMED = 60.0
LETTER = 6.0


class Line(NamedTuple):
    """A level drawn across: value, CSS class, caption."""

    value: float
    style: str
    caption: str


class Bar(NamedTuple):
    """A piece of work: from when to when (seconds since the epoch), its name, its CSS class."""

    begin: float
    end: float
    label: str
    style: str


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most about ``most`` points; of each bucket the least and the greatest, so that peaks stay.

    Examples
    --------
    >>> len(thinned([(float(at), 1.0) for at in range(10_000)], 100)) <= 100
    True
    """
    if len(points) <= most:
        return list(points)
    buckets = max(most // 2, 1)
    result: list[tuple[float, float]] = []
    for number in range(buckets):
        part = points[number * len(points) // buckets : (number + 1) * len(points) // buckets]
        finite = [point for point in part if math.isfinite(point[1])]
        if len(finite) < len(part):
            result.append((part[0][0], math.nan))  # a gap stays a gap
        elif finite:
            result.extend(sorted({min(finite, key=lambda item: item[1]), max(finite, key=lambda item: item[1])}))
    return result


def picture(
    points: Sequence[tuple[float, float]],
    lines: Sequence[Line],
    bars: Sequence[Bar],
    *,
    begin: float,
    end: float,
    mark: float,
    mark_caption: str,
    title: str,
) -> str:
    """Return the SVG.

    Parameters
    ----------
    points
        (time, value); a NaN value breaks the line.
    lines
        Levels; the scale reaches from 0 to the largest of values and levels.
    bars
        Drawn below in lanes, so that what ran at once is seen side by side.
    begin, end
        The range of time; ``mark`` is the moment of the end.
    """
    span = max(end - begin, 1e-6)
    finite = [value for _, value in points if math.isfinite(value)] + [line.value for line in lines]
    top = max([value for value in finite if math.isfinite(value)] or [1.0]) * 1.04 or 1.0

    def x(moment: float) -> float:
        return LEFT + (min(max(moment, begin), end) - begin) / span * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (1 - min(max(value / top, 0.0), 1.0)) * (HEIGHT - TOP)

    lanes = _lanes(bars)
    height = HEIGHT + AXIS + LANE * (max((lane for _, lane in lanes), default=-1) + 1)
    out = [
        f'<svg class="wfr-svg" viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(title, quote=True)}">',
        f"<title>{escape(title)}</title>",
        f'<line class="wfr-axis" x1="{LEFT:g}" y1="{HEIGHT:g}" x2="{WIDTH - RIGHT:g}" y2="{HEIGHT:g}"/>',
    ]
    for run in _runs(thinned(points)):
        path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in run)
        out.append(
            f'<polygon class="wfr-area" points="{x(run[0][0]):.1f},{HEIGHT:g} {path} {x(run[-1][0]):.1f},{HEIGHT:g}"/>'
        )
        out.append(f'<polyline class="wfr-line" points="{path}"/>')
    levels = sorted((y(line.value), line) for line in lines if math.isfinite(line.value))
    below = 0.0
    for at, line in levels:
        below = max(at + 3.5, below + CAPTION if below else 0.0)
        out.append(
            f'<line class="wfr-level {line.style}" x1="{LEFT:g}" y1="{at:.1f}" x2="{WIDTH - RIGHT:g}" y2="{at:.1f}"/>'
            f'<text class="wfr-caption {line.style}" x="{WIDTH - RIGHT + 5:g}" y="{below:.1f}">{escape(line.caption)}</text>'
        )
    if begin <= mark <= end:
        out.append(
            f'<line class="wfr-mark" x1="{x(mark):.1f}" y1="{TOP:g}" x2="{x(mark):.1f}" y2="{height - AXIS:.1f}"/>'
        )
    for bar, lane in lanes:
        left, right = x(bar.begin), x(bar.end)
        top_at = HEIGHT + 3 + lane * LANE
        wide = max(right - left, 1.5)
        out.append(
            f'<g><title>{escape(bar.label)}</title><rect class="wfr-bar {bar.style}" x="{left:.1f}" y="{top_at:.1f}" '
            f'width="{wide:.1f}" height="{BAR:g}" rx="3"/>'
        )
        room = int((wide - 8) / LETTER)
        if wide >= LEAST_NAMED:
            name = bar.label if len(bar.label) <= room else bar.label[: room - 1] + "…"
            out.append(f'<text class="wfr-name" x="{left + 4:.1f}" y="{top_at + BAR - 3:.1f}">{escape(name)}</text>')
        out.append("</g>")
    base = height - 4
    out.append(f'<text class="wfr-tick" x="{LEFT:g}" y="{base:.1f}">{escape(_ago(mark - begin))}</text>')
    anchor = "end" if x(mark) > WIDTH / 2 else "start"
    out.append(
        f'<text class="wfr-tick" text-anchor="{anchor}" x="{x(mark):.1f}" y="{base:.1f}">{escape(mark_caption)}</text>'
    )
    out.append("</svg>")
    return "".join(out)


def _ago(seconds: float) -> str:
    return f"{seconds / 60:.0f} min before" if seconds >= 90 else f"{seconds:.0f} s before"


def _runs(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]) and math.isfinite(point[0]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _lanes(bars: Sequence[Bar]) -> list[tuple[Bar, int]]:
    """Each bar with its lane: the first one that is free when it begins."""
    free: list[float] = []
    placed = []
    for bar in sorted(bars, key=lambda bar: bar.begin):
        lane = next((number for number, until in enumerate(free) if until <= bar.begin), len(free))
        if lane == len(free):
            free.append(0.0)
        free[lane] = bar.end
        placed.append((bar, lane))
    return placed
