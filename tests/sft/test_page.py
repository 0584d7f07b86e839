"""What docs/instruction_tuning.md says of keys and commands, checked."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steplm.sft.config import SftConfig

PAGE = (Path(__file__).parents[2] / "docs/instruction_tuning.md").read_text(encoding="utf-8")


def keys_table() -> str:
    """Every key with its default and its description, as the page has it."""
    rows = []
    for name, field in SftConfig.model_fields.items():
        default = "" if field.default is None else f"`{json.dumps(field.default).strip(chr(34))}`"
        rows.append(f"| `{name}` | {default} | {field.description or ''} |")
    return "\n".join(["| key | default | |", "| --- | --- | --- |", *rows])


def test_the_page_has_every_key_with_its_default() -> None:
    assert f"<!-- keys -->\n{keys_table()}\n<!-- /keys -->" in PAGE


def test_the_commands_of_the_page_run(
    steplm: Callable[..., Any], folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="trl is not installed: pip install 'steplm[sft]'")
    (tmp_path / "runs/my-run").mkdir(parents=True)
    (tmp_path / "runs/my-run/export").symlink_to(folder)
    (tmp_path / "alpaca.json").write_bytes(data.read_bytes())
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("steplm ")]
    commands = [shlex.split(line) for line in lines]
    assert [words[1] for words in commands if words[1] in ("sft", "chat")] == ["sft", "chat", "chat"]
    for words in commands:
        extra = {"sft": ["max_steps=2", "precision=fp32", "device=cpu"], "chat": ["--device", "cpu"]}
        monkeypatch.setattr("sys.stdin", io.StringIO("Say cat.\n"))
        if words[1] in extra:
            result = steplm(*words[1:], *extra[words[1]], cwd=tmp_path)
            assert result.returncode == 0, (words, result.stderr)
