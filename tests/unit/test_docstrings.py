"""The examples in the docstrings run, and say what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import wiseflow_nb

ROOT = Path(wiseflow_nb.__file__).parent
#: Running these as a module is what they are for.
NOT_IMPORTED = {"__main__"}


def modules() -> list[str]:
    names = []
    for path in sorted(ROOT.rglob("*.py")):
        if path.stem in NOT_IMPORTED or ">>>" not in path.read_text(encoding="utf-8"):
            continue
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


@pytest.mark.parametrize("name", modules())
def test_the_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
