"""Names that tell models apart."""

from __future__ import annotations

import pytest

from steplm.models.names import short_name, short_names


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["runs/step/export", "/a/vanilla/export/"], ["step", "vanilla"]),
        (["runs/a/lr1/export", "runs/b/lr1/export"], ["a", "b"]),
        (["runs/a/s0/export", "runs/b/s1/export"], ["s0", "s1"]),
        (["runs/a/s0/export", "runs/b/s0/export", "runs/b/s1/export"], ["a/s0", "b/s0", "b/s1"]),
        (["owner/model", "export"], ["model", "export"]),
        (["runs", "runs/y"], ["runs", "y"]),
        (["x", "x"], ["x", "x"]),
        ([], []),
    ],
)
def test_names_are_what_tells_the_paths_apart(models: list[str], names: list[str]) -> None:
    assert short_names(models) == names


@pytest.mark.parametrize(
    ("model", "name"), [("runs/a/export", "a"), ("owner/model", "model"), ("./x/", "x"), ("..", "model")]
)
def test_one_model_is_called_by_its_run_or_folder(model: str, name: str) -> None:
    assert short_name(model) == name
