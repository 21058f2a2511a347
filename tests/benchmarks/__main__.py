"""``python -m tests.benchmarks [words...] [--check | --record]``: run the benchmarks whose module name holds a word."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from tests.benchmarks.harness import Bench, load, ratios, record, slower


def main() -> int:
    """Print the figures; with ``--check`` return 1 where one is twice the recorded ratio."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("words", nargs="*", help="run only modules whose name contains one of these")
    parser.add_argument("--check", action="store_true", help="fail where a ratio is twice the recorded one")
    parser.add_argument("--record", action="store_true", help="record the ratios")
    given = parser.parse_args()
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    chosen = [name for name in names if not given.words or any(word in name for word in given.words)]
    bench = Bench()
    for name in chosen:
        print(f"== {name.removeprefix('bench_')}", flush=True)
        importlib.import_module(f"tests.benchmarks.{name}").run(bench)
    found = ratios(bench.figures)
    if given.record:
        record(found)
    worse = slower(found, load()) if given.check else []
    for line in worse:
        print(f"slower than recorded: {line}")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
