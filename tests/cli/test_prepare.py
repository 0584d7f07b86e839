"""``steplm prepare`` tells what the documents are like, and how often the planned run reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steplm.config import RunConfig, dump_config
from steplm.data.tokens import Manifest


def test_a_mixture_is_told_with_lengths_windows_and_epochs_and_the_plan_knows_them_then(
    tiny_run: Callable[..., RunConfig], tiny_corpus: Path, tmp_path: Path, steplm: Callable[..., Any]
) -> None:
    lines = tiny_corpus.read_text().splitlines(keepends=True)
    for name, part in (("few", lines[:3]), ("many", lines[3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    sources = [{"name": name, "files": str(tmp_path / f"{name}.jsonl"), "weight": 1} for name in ("few", "many")]
    prepared = tmp_path / "prepared"
    config = tiny_run(tmp_path / "run", f"data.train={json.dumps(sources)}", f"data.prepared_dir={prepared}")
    (tmp_path / "run.yaml").write_text(dump_config(config))
    assert "epochs" not in steplm("plan", "run.yaml", cwd=tmp_path).stdout
    told = steplm("prepare", "run.yaml", "log.progress=lines", cwd=tmp_path).stdout
    few, many = (Manifest.load(prepared).split(f"train/{name}").num_tokens for name in ("few", "many"))
    epochs = f"epochs: few {512 / few:.1f}, many {512 / many:.1f}"
    assert f"the planned 1.02k tokens in {epochs}" in told
    assert told.count("windows of 16 tokens: no padding, ") == 2
    assert "train/few: " in told
    assert " tokens  " in told
    assert epochs in steplm("plan", "run.yaml", cwd=tmp_path).stdout
    document = json.loads(steplm("plan", "run.yaml", "--json", cwd=tmp_path).stdout)
    assert document["epochs_of_sources"] == {"few": 512 / few, "many": 512 / many}
