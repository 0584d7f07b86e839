"""The wheel, in a bare environment: planning needs none of the heavy libraries."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_plans_in_an_environment_without_torch(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "steplm/py.typed" in names
    assert "steplm/recipes/quickstart.yaml" in names
    assert "steplm/eval/tasks/piqa.yaml" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "results"))]

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "pydantic", "PyYAML", "typer", "rich"], check=True)
    command = [environment / "bin" / "steplm", "plan", "llama_368m", "--json"]
    planned = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(planned.stdout)["layers"] == [11, 8, 5]
