"""Honest pairs: two sides run in turn in one process tree; what counts is the ratio of their medians.

A benchmark is a module ``bench_*.py`` with a function ``run(bench: Bench) -> None``.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RECORDED = Path(__file__).with_name("recorded.json")
#: A ratio this many times the recorded one is a failure.
TOLERANCE = 2.0


@dataclass(frozen=True, slots=True)
class Figure:
    """One result. ``ratio`` is ours over the peer's; NaN for a figure that stands alone."""

    name: str
    ours: float
    unit: str
    peer_name: str = ""
    peer: float = math.nan
    goal: float = math.nan

    @property
    def ratio(self) -> float:
        return self.ours / self.peer

    def line(self) -> str:
        """The result as one line of text."""
        text = f"{self.name}: {self.ours:.4g} {self.unit}"
        if self.peer_name:
            text += f", {self.peer_name} {self.peer:.4g} {self.unit}, ratio {self.ratio:.3f}"
        if not math.isnan(self.goal):
            reached = self.ratio if self.peer_name else self.ours
            text += f" (goal <= {self.goal:g}: {'reached' if reached <= self.goal else 'MISSED'})"
        return text


class Bench:
    """Collects figures and prints each as soon as it is known."""

    def __init__(self, rounds: int = 7) -> None:
        self.rounds = rounds
        self.figures: list[Figure] = []

    def pair(
        self,
        name: str,
        ours: Callable[[], float],
        peer: Callable[[], float],
        *,
        peer_name: str,
        unit: str = "s",
        goal: float = math.nan,
        rounds: int = 0,
    ) -> Figure:
        """Run both sides in turn, after one round that is not counted.

        Each side returns its own measure (seconds, bytes, ...), so that set-up does not count.
        """
        mine: list[float] = []
        theirs: list[float] = []
        ours(), peer()
        for number in range(rounds or self.rounds):
            # Who goes first changes, so that neither always finds a warmer machine.
            for side in (0, 1) if number % 2 else (1, 0):
                if side:
                    mine.append(ours())
                else:
                    theirs.append(peer())
        return self._keep(Figure(name, statistics.median(mine), unit, peer_name, statistics.median(theirs), goal))

    def note(self, name: str, value: float, unit: str, *, goal: float = math.nan) -> Figure:
        """Keep a figure that has no peer."""
        return self._keep(Figure(name, value, unit, goal=goal))

    def _keep(self, figure: Figure) -> Figure:
        self.figures.append(figure)
        print(figure.line(), flush=True)
        return figure


def ratios(figures: list[Figure]) -> dict[str, float]:
    """What is recorded of the figures: the ratios of those with a peer."""
    return {item.name: round(item.ratio, 4) for item in figures if item.peer_name}


def slower(found: dict[str, float], recorded: dict[str, float]) -> list[str]:
    """Which ratios are more than ``TOLERANCE`` times the recorded ones."""
    return [
        f"{name}: ratio {ratio:.3f}, recorded {recorded[name]:.3f}"
        for name, ratio in found.items()
        if name in recorded and ratio > TOLERANCE * recorded[name]
    ]


def load(path: Path = RECORDED) -> dict[str, float]:
    """The recorded ratios."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def record(found: dict[str, float], path: Path = RECORDED) -> None:
    """Write ratios over the recorded ones."""
    path.write_text(json.dumps(dict(sorted({**load(path), **found}.items())), indent=1) + "\n", encoding="utf-8")
