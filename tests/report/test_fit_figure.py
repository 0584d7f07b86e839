"""The picture of ``steplm fit``: it is drawn with and without a device, and for every axis."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from steplm.cli.fit import show_fit

SMALL = (
    "model.hidden_size=64", "model.intermediate_size=96", "model.vocab_size=100", "model.num_attention_heads=4",
    "model.num_hidden_layers=6", "pet.rank=8", "plan.num_stages=2", "memory.reserve=1MiB",
)  # fmt: skip


@pytest.mark.parametrize(("device", "label"), [(None, "FLOPs, relative to row 1"), ("rtx4090", "hours")])
@pytest.mark.parametrize("maximize", [None, "batch"])
def test_every_row_is_numbered_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str | None, label: str, maximize: str | None
) -> None:
    path = tmp_path / "new" / "fit.svg"
    show_fit("llama_368m", SMALL, budget="64MiB", device=device, maximize=maximize, output=path)
    assert "steplm train" in capsys.readouterr().out
    texts = [element.text or "" for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]
    assert label in texts
    assert (maximize or "memory needed, MiB (dashed: the budget)") in texts
    assert any(text.strip().startswith("1  ") for text in texts)
