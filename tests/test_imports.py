"""The house rules: imports point down only, and planning loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import steplm

PACKAGE = Path(steplm.__file__).parent

# Each room with what it may import, besides itself. A lower room never names a higher one.
BASE = {"types", "errors", "units", "files", "yaml_files", "problems", "config", "rows", "launch"}
PLANNING = BASE | {"memory", "planner"}
SIBLINGS = PLANNING | {"steplm"}  # `import steplm` for the version
ALLOWED = {
    "types": set(),
    "errors": set(),
    "units": set(),
    "files": {"errors"},
    "rows": set(),
    "launch": set(),
    "yaml_files": {"errors", "units"},
    "problems": {"errors", "units"},
    "config": {"errors", "units", "files", "yaml_files", "problems"},
    "memory": BASE,
    "planner": PLANNING,
    "growth": SIBLINGS,
    "pet": SIBLINGS,
    "optim": SIBLINGS,
    "models": SIBLINGS | {"growth"},  # the names of layers are growth's knowledge
    "checkpoint": SIBLINGS | {"models"},
    "distributed": SIBLINGS,
    "data": SIBLINGS,
    "training": SIBLINGS | {"growth", "pet", "optim", "models", "checkpoint", "distributed", "data"},
    "eval": SIBLINGS | {"models", "checkpoint", "data"},
    "sft": SIBLINGS | {"training", "models", "data"},
    "report": SIBLINGS | {"training", "eval"},
    "compare": SIBLINGS | {"training", "eval", "sft", "report", "data", "models", "checkpoint"},
    "mt_bench": SIBLINGS | {"eval", "report", "data", "models"},
    "cli": SIBLINGS | {"training", "eval", "sft", "report", "compare", "mt_bench", "data", "models"},
}


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "steplm":
                rooms.add(parts[1] if len(parts) > 1 else "steplm")
    return rooms


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if _room(path) not in ("__init__", "__main__"))


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_only(path: Path) -> None:
    room = _room(path)
    assert room in ALLOWED, f"{room} is a new room: say in this table what it may import"
    assert _imported_rooms(path) - {room} <= ALLOWED[room]


def _modules_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(chr(10).join(sys.modules))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(output.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import steplm, steplm.config, steplm.types",
        "from steplm import plan, load_config; plan(load_config('llama_1.2b'))",
        "import steplm.cli.app, steplm.cli.plan, steplm.cli.init, steplm.cli.sft",
    ],
)
def test_planning_loads_no_torch(code: str) -> None:
    loaded = _modules_after(code)
    assert not loaded & {"torch", "transformers", "datasets"}


def test_the_public_names_are_what_they_say() -> None:
    from steplm import export, grow, plan, train

    assert [f.__name__ for f in (plan, train, grow, export)] == ["plan", "train", "grow", "export"]
    assert all(getattr(steplm, name) is not None for name in steplm.__all__)
    assert callable(steplm.train), "a subpackage must not hide the function"
