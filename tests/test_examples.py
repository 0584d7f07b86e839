"""The examples run as they stand."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_model_is_planned_and_deepened_without_changing_its_logits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["deepen.py"])
    runpy.run_path(str(EXAMPLES / "deepen.py"), run_name="__main__")
    *planned, grown = capsys.readouterr().out.splitlines()
    states = [int(line.split(": ")[1].split()[0].replace(",", "")) for line in planned]
    assert states[0] == max(states)
    assert grown == "4 -> 6 layers, same logits: True"
