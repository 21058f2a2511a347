"""A module imports from lower floors only; siblings on one floor do not import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import wiseflow_nb

ROOT = Path(wiseflow_nb.__file__).parent

FLOORS: dict[int, set[str]] = {
    6: {"__init__", "__main__", "cli", "notebook"},
    5: {"dashboard"},
    4: {"doctor", "session"},
    3: {"governor", "recorder", "tasks", "text", "verbs", "view"},
    2: {"pool", "report", "resources", "store"},
    1: {"config", "context", "events", "frames", "lines", "metrics", "sizing"},
    0: {"clock", "errors", "forks", "futures", "quantities", "records"},
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
#: Fakes for users' tests: they stand on floors 0-2, and no module of the package may lean on them.
FLOOR_OF["testing"] = 3
#: The front door leads everywhere, and the module that `python -m` runs is the command line.
DOORS = {("__init__", "notebook"), ("__main__", "cli")}
#: The version is a constant of the package itself.
FREE = {"__version__"}


def unit_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0].removesuffix(".py")


def imports_of(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """Every unit of the package that the source imports, with the line, inside functions too."""
    package = ("wiseflow_nb", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "wiseflow_nb" and len(parts) > 1:
                    yield node.lineno, parts[1]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "wiseflow_nb":
            # What `import wiseflow_nb` is used for; submodules are seen at their own import.
            if node.attr not in FREE | set(FLOOR_OF):
                yield node.lineno, "__init__"
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            parts = base + (node.module.split(".") if node.module else [])
            if parts[:1] != ["wiseflow_nb"]:
                continue
            if len(parts) > 1:
                yield node.lineno, parts[1]
                continue
            for alias in node.names:
                if alias.name not in FREE:
                    yield node.lineno, alias.name if alias.name in FLOOR_OF else "__init__"


def violations(path: Path, source: str) -> list[str]:
    unit = unit_of(path)
    found = []
    for line, other in imports_of(path, source):
        if other == unit or (unit, other) in DOORS:
            continue
        if other == "testing" or FLOOR_OF[other] >= FLOOR_OF[unit]:
            found.append(f"{path.relative_to(ROOT)}:{line}: {unit} (floor {FLOOR_OF[unit]}) imports {other}")
    return found


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)


def test_every_module_has_a_floor() -> None:
    assert {unit_of(path) for path in modules()} <= set(FLOOR_OF)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_lead_down(path: Path) -> None:
    assert violations(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("records.py", "from wiseflow_nb.config import Settings"),
        ("pool/manager.py", "import wiseflow_nb.store.paths"),
        ("view.py", "def f():\n    from wiseflow_nb.session import Session"),
        ("store/reader.py", "from ..tasks import Task"),
        ("session.py", "from wiseflow_nb import dashboard"),
        ("view.py", "import wiseflow_nb\nwiseflow_nb.Session"),
        ("cli.py", "from wiseflow_nb.notebook import load"),
        ("tasks/manager.py", "from wiseflow_nb.testing import FakeClock"),
    ],
)
def test_a_wrong_import_is_found(where: str, source: str) -> None:
    assert len(violations(ROOT / where, source)) == 1


def test_only_the_dashboard_draws() -> None:
    for path in modules():
        if unit_of(path) == "dashboard":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not {name.split(".")[0] for name in names} & {"ipywidgets", "plotly", "anywidget"}, path


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_the_recorder_stays_small() -> None:
    names = [path.stem for path in (ROOT / "recorder").glob("*.py") if path.stem not in {"__init__", "__main__"}]
    statement = "; ".join(["import wiseflow_nb.recorder", *(f"import wiseflow_nb.recorder.{name}" for name in names)])
    assert not loaded_after(statement) & {"pandas", "numpy", "pydantic", "plotly", "ipywidgets", "IPython"}


def test_modules_stay_small() -> None:
    sizes = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert {path: size for path, size in sizes.items() if size > 600} == {}
