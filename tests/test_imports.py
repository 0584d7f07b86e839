"""The house rules: imports point down only and in no circle, and planning loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import steplm

PACKAGE = Path(steplm.__file__).parent

# Each room with what it may import, besides itself. A lower room never names a higher one.
BASE = {
    "version",
    "types",
    "errors",
    "units",
    "files",
    "rows",
    "pinned",
    "launch",
    "yaml_files",
    "problems",
    "old_keys",
    "config",
}
PLANNING = BASE | {"schedule", "cost", "planner"}
SIBLINGS = PLANNING
ALLOWED = {
    "version": set(),
    "types": set(),
    "errors": set(),
    "units": set(),
    "files": {"errors"},
    "rows": set(),
    "pinned": {"errors", "units"},
    "launch": set(),
    "yaml_files": {"errors", "units"},
    "problems": {"errors", "units"},
    "old_keys": {"errors"},
    "config": {"errors", "units", "files", "yaml_files", "problems", "old_keys"},
    "schedule": {"types"},
    "cost": BASE | {"schedule"},
    "planner": BASE | {"schedule", "cost"},
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


def _imported(node: ast.AST) -> Iterator[str]:
    """Dotted names of the package's own that a statement imports: modules, or what stands in them."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return
    yield from (name for name in names if name.partition(".")[0] == "steplm")


def _imported_rooms(path: Path) -> set[str]:
    """Anywhere in the file: in functions, and for the type checker alone."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for name in _imported(node):
            part = name.partition(".")[2].partition(".")[0]
            is_room = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file()
            rooms.add(part if part and is_room else "steplm")
    return rooms


def _modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if _room(path) not in ("__init__", "__main__"))


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that are run when a module is imported, or read by the type checker."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from _outside_functions(child)


def _imports_of_files(package: Path) -> dict[str, set[str]]:
    """For each file, by its dotted name, the files that it imports; ``steplm.checkpoint`` is an ``__init__.py``."""
    names = {}
    for path in package.rglob("*.py"):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        names[".".join(parts).removesuffix(".__init__")] = path
    graph = {}
    for name, path in names.items():
        imported = {
            target if target in names else target.rpartition(".")[0]
            for node in _outside_functions(ast.parse(path.read_text()))
            for target in _imported(node)
        }
        graph[name] = imported
    graph[package.name] = set()  # it shows the public names of all parts, which ask it for the version alone
    return graph


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = _imports_of_files(PACKAGE)
    assert graph["steplm.planner.plan"] >= {"steplm.schedule", "steplm.cost.price"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_a_circle_is_found_where_only_the_type_checker_sees_it(tmp_path: Path) -> None:
    package = tmp_path / "steplm"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("import typing\nif typing.TYPE_CHECKING:\n    from steplm.two import Two\n")
    (package / "two.py").write_text("from steplm import one\n\nclass Two:\n    pass\n")
    (package / "three.py").write_text("def late():\n    from steplm import three\n    return three\n")
    graph = _imports_of_files(package)
    assert graph == {"steplm": set(), "steplm.one": {"steplm.two"}, "steplm.two": {"steplm.one"}, "steplm.three": set()}
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


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
        "import steplm.cli.app, steplm.cli.plan, steplm.cli.init, steplm.sft.config",
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
