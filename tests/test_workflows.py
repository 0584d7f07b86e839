"""The workflows of GitHub Actions: what they call is there, and what they install is pinned or bounded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def _commands(path: Path) -> list[str]:
    jobs: dict[str, Any] = yaml.safe_load(path.read_text())["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_make_target_of_a_workflow_is_in_the_makefile(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {
        word for run in _commands(path) if run.startswith("make") for word in run.split()[1:] if word.isalpha()
    } | {word for run in _commands(path) for word in re.findall(r"^make ([a-z-]+)", run)}
    assert called
    assert called <= targets


def test_the_constraints_pin_every_dependency_that_the_tests_need_within_its_bounds() -> None:
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    versions = {_normal(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    for line in project["dependencies"] + project["optional-dependencies"]["dev"]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(versions[_normal(wanted.name)]), line


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
