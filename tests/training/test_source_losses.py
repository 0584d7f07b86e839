"""The log has the loss of each source of a mixture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steplm.config import RunConfig
from steplm.data.loader import IGNORE_INDEX, Batch
from steplm.models.build import build_model, hf_config, initial_state
from steplm.models.forward import batch_loss
from steplm.optim.adamw import AdamW
from steplm.optim.build import UpdateRules
from steplm.training import step as step_module
from steplm.training.display import make_display
from steplm.training.metrics import read_metrics
from steplm.training.run import train
from steplm.training.step import StepOptions, train_step
from steplm.types import SourceLoss

Configure = Callable[..., RunConfig]
MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize("how", [{"micro_batch_size": 6}, {"micro_batch_size": 4}, {"fused_backward": True}])
def test_a_step_gives_each_sources_loss_as_computed_alone_and_is_unchanged_by_it(how: dict[str, Any]) -> None:
    tokens = torch.randint(0, 40, (6, 9), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    labels[1, 3:] = IGNORE_INDEX  # sources differ in how many tokens count
    batch = Batch(tokens[:, :-1], labels, source_ids=torch.tensor([0, 2, 0, 2, 2, 0]))
    options = StepOptions(**{"micro_batch_size": 6, "chunk_size": 5, "num_sources": 3, **how})
    results, weights = [], []
    for given in (batch, replace(batch, source_ids=None)):
        config = hf_config(MODEL)
        model = build_model(config, initial_state(config, seed=0, dtype=torch.float32)).train()
        rule = AdamW(dict(model.named_parameters()))
        rules = UpdateRules({"adamw": rule}, rule.parameters)
        expected = [
            batch_loss(model, batch.input_ids[rows], labels[rows], num_valid=1, chunk_size=64).item()
            for rows in ([0, 2, 5], [1, 3, 4])
        ]
        results.append(train_step(model, rules, given, options, learning_rate=1e-2, max_grad_norm=1.0))
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    first, none, third = results[0].sources
    assert none == SourceLoss(0.0, 0)
    assert (first.tokens, third.tokens) == (24, 19)
    assert [first.nats, third.nats] == pytest.approx(expected, rel=1e-6)
    assert (results[0].loss, results[0].grad_norm) == (results[1].loss, results[1].grad_norm)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*weights, strict=True))


def test_several_ranks_sum_what_each_has(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoAlike:
        is_alone, num_replicas = False, 1

        def sum(self, *values: float) -> list[float]:
            return [2 * value for value in values]

    result = step_module._over_ranks(TwoAlike(), 1.5, 3.0, [SourceLoss(4.0, 2), SourceLoss(9.0, 3)])  # type: ignore[arg-type]
    assert result.loss == 3.0
    assert result.grad_norm == pytest.approx(18**0.5)
    assert result.sources == (SourceLoss(8.0, 4), SourceLoss(18.0, 6))


@pytest.fixture
def mixed_run(tiny_run: Configure, tiny_corpus: Path, tmp_path: Path) -> Configure:
    lines = tiny_corpus.read_text().splitlines(keepends=True)
    for name, part in (("web", lines[:60]), ("code", lines[60:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    sources = [
        {"name": name, "files": str(tmp_path / f"{name}.jsonl"), "weight": weight}
        for name, weight in (("web", 3), ("code", 1))
    ]
    mixture = (f"data.train={json.dumps(sources)}", f"data.prepared_dir={tmp_path / 'prepared'}")
    return lambda output_dir, *overrides: tiny_run(output_dir, *mixture, *overrides)


def test_the_log_and_the_display_have_each_sources_loss_and_a_resumed_run_the_same(
    mixed_run: Configure,
    tmp_path: Path,
    stop_before: Callable[[set[int]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = ("log.logging_steps=3", "train.save_steps=2")
    train(mixed_run(tmp_path / "unbroken", *overrides), display=make_display("lines"))
    events = read_metrics(tmp_path / "unbroken" / "metrics.jsonl", "train")
    for event in events:
        # Every step has three sequences of web and one of code, all of the same length.
        assert event["loss"] == pytest.approx(0.75 * event["loss_web"] + 0.25 * event["loss_code"], rel=1e-5)
    assert f"web {events[0]['loss_web']:.3f}  code {events[0]['loss_code']:.3f}" in capsys.readouterr().out
    stop_before({2, 7})
    config = mixed_run(tmp_path / "stopped", *overrides)
    assert [train(config).finished for _ in range(3)] == [False, False, True]
    again = read_metrics(tmp_path / "stopped" / "metrics.jsonl", "train")
    assert [event["loss_web"] for event in again] == [event["loss_web"] for event in events]
