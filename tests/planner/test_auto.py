"""Sizes that are written as ``auto``."""

from __future__ import annotations

from typing import Any

import pytest

from steplm.config import RunConfig, changed, config_schema
from steplm.errors import ConfigError, PlanInfeasible
from steplm.planner.auto import load_config
from steplm.planner.plan import plan

VALUES: dict[str, Any] = {
    "model": {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 6, "num_attention_heads": 4,
        "vocab_size": 500, "max_position_embeddings": 64,
    },
    "plan": {"num_stages": 2, "total_tokens": "100M"},
    "pet": {"rank": 16},
    "train": {
        "sequence_length": 64, "per_device_train_batch_size": "auto", "gradient_accumulation_steps": 8,
        "global_batch_size": 24,
    },
    "memory": {"reserve": 1000},
}  # fmt: skip


def needed(micro_batch: int) -> int:
    """Bytes needed with micro-batches of this many sequences."""
    config = loaded(f"train.per_device_train_batch_size={micro_batch}", "train.gradient_accumulation_steps=1")
    return config.memory.needed_bytes(plan(config).peak_bytes or 0)


def loaded(*overrides: str) -> RunConfig:
    return load_config({key: dict(section) for key, section in VALUES.items()}, overrides)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 6, 8, 24])
def test_the_micro_batch_is_the_largest_that_fits_and_the_step_stays(micro_batch: int) -> None:
    config = loaded(f"plan.budget={needed(micro_batch)}")
    assert config.train.per_device_train_batch_size == micro_batch
    assert config.global_batch_size == 24
    assert plan(config).peak_bytes == needed(micro_batch) - 1000
    if 1 < micro_batch < 24:  # one micro-batch more than the budget allows
        fewer = changed(config, {"train.per_device_train_batch_size": -(-24 // (config.micro_batches - 1))})
        with pytest.raises(PlanInfeasible):
            plan(fewer)


def test_of_equally_many_micro_batches_the_smallest_is_taken() -> None:
    config = loaded(f"plan.budget={needed(11)}")  # 11 + 11 + 2
    assert (config.train.per_device_train_batch_size, config.micro_batches) == (8, 3)


def test_a_budget_below_one_sequence_is_refused_with_its_bytes() -> None:
    with pytest.raises(PlanInfeasible, match=r"plan\.budget"):
        loaded(f"plan.budget={needed(1) - 1}")


def test_without_a_global_batch_or_a_budget_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs train\.global_batch_size"):
        loaded("train.global_batch_size=null", "plan.budget=1GiB")
    with pytest.raises(ConfigError, match=r"needs plan\.budget"):
        loaded("train.device=cpu")


def test_a_fused_update_takes_the_whole_step_or_nothing() -> None:
    fused = ("memory.fused_backward=true", "optim.max_grad_norm=null")
    assert loaded(*fused, "plan.budget=1GiB").micro_batches == 1
    with pytest.raises(ConfigError, match="fused_backward"):
        loaded(*fused, "plan.budget=1MiB")


def test_the_loss_chunk_is_the_largest_that_does_not_raise_the_peak() -> None:
    large = (
        "train.per_device_train_batch_size=48", "train.gradient_accumulation_steps=1", "train.global_batch_size=null",
        "model.vocab_size=250",
    )  # fmt: skip
    config = loaded(*large, "train.loss_chunk_size=auto")
    chunk = config.train.loss_chunk_size
    peaks = {
        size: plan(loaded(*large, f"train.loss_chunk_size={size}")).peak_bytes for size in (512, chunk, chunk + 512)
    }
    assert 512 < chunk < 48 * 64
    assert peaks[512] == peaks[chunk]
    assert (peaks[chunk + 512] or 0) > (peaks[chunk] or 0)


def test_both_together() -> None:
    config = loaded("train.loss_chunk_size=auto", f"plan.budget={needed(8)}")
    assert config.train.per_device_train_batch_size == 8
    assert plan(config).peak_bytes == needed(8) - 1000


def test_the_schema_knows_auto() -> None:
    properties = config_schema()["$defs"]["TrainConfig"]["properties"]
    for key in ("per_device_train_batch_size", "loss_chunk_size"):
        assert {"enum": ["auto"]} in properties[key]["anyOf"]
