"""The benchmarks' own arithmetic: who runs when, what counts, what is recorded, what fails."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest

from tests.benchmarks import harness
from tests.benchmarks.harness import Bench, Figure, load, ratios, record, slower

BENCHMARKS = sorted(path.stem for path in Path(harness.__file__).parent.glob("bench_*.py"))


def test_both_sides_run_in_turn_and_the_medians_count(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []
    mine, theirs = iter([99.0, 1.0, 3.0, 100.0]), iter([99.0, 4.0, 6.0, 5.0])

    def ours() -> float:
        order.append("a")
        return next(mine)

    def peer() -> float:
        order.append("b")
        return next(theirs)

    figure = Bench(rounds=3).pair("x", ours, peer, peer_name="y", goal=0.5)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert (figure.ours, figure.peer, figure.ratio) == (3.0, 5.0, 0.6)
    assert "ratio 0.600 (goal <= 0.5: MISSED)" in capsys.readouterr().out


def test_a_figure_that_stands_alone_has_no_ratio() -> None:
    figure = Bench().note("bytes", 10.0, "B", goal=12)
    assert math.isnan(figure.peer)
    assert figure.line() == "bytes: 10 B (goal <= 12: reached)"
    assert ratios([figure]) == {}


def test_twice_the_recorded_ratio_is_too_slow(tmp_path: Path) -> None:
    path = tmp_path / "recorded.json"
    assert load(path) == {}
    record({"pool": 0.2}, path)
    record({"tasks": 0.5}, path)
    assert load(path) == {"pool": 0.2, "tasks": 0.5}
    assert slower({"pool": 0.39, "new": 9.0}, load(path)) == []
    assert slower({"pool": 0.41}, load(path)) == ["pool: ratio 0.410, recorded 0.200"]
    assert ratios([Figure("pool", 1.0, "s", "them", 3.0)]) == {"pool": 0.3333}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_can_be_loaded(name: str) -> None:
    try:
        module = importlib.import_module(f"tests.benchmarks.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("wiseflow_nb", "tests")):
            raise
        pytest.skip(f"{error.name} is not installed (the peers come with the extra bench)")
    assert callable(module.run)
