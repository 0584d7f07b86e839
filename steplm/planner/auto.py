"""Resolve ``train.per_device_train_batch_size: auto`` and ``train.loss_chunk_size: auto``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from steplm.config import RunConfig, changed, read_values
from steplm.errors import ConfigError, PlanInfeasible
from steplm.planner.fit import fit
from steplm.planner.plan import plan
from steplm.planner.solve import last_true
from steplm.problems import validated

CHUNK_UNIT = 512  # rows
ANY_BUDGET = 2**60
MICRO_BATCH, CHUNK = "per_device_train_batch_size", "loss_chunk_size"  # keys of ``train``


def load_config(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """As ``steplm.config.load_config``, and resolve sizes that are ``auto``.

    Raises:
        ConfigError, PlanInfeasible: as ``steplm.config.load_config`` and ``resolve_auto``.
    """
    values = read_values(source, overrides)
    return resolve_auto(values) if smallest_sizes(values) else validated(RunConfig, values)


def resolve_auto(values: Mapping[str, Any]) -> RunConfig:
    """Build the configuration, replacing each size that is written as ``auto``.

    The micro-batch is the largest that fits ``plan.budget``, or the memory of the GPU, with ``train.global_batch_size``
    unchanged. The loss chunk is the largest multiple of 512 rows that does not raise the peak.

    Raises:
        ConfigError: the global batch size or the budget is unknown, or the family has no activation formulas.
        PlanInfeasible: a micro-batch of one sequence does not fit.
    """
    sizes = smallest_sizes(values)
    config = validated(RunConfig, {**values, "train": {**values["train"], **sizes}})
    if MICRO_BATCH in sizes:
        config = changed(config, {f"train.{MICRO_BATCH}": _largest_micro_batch(config)})
    if CHUNK in sizes:
        config = changed(config, {f"train.{CHUNK}": _largest_free_chunk(config)})
    return config


def smallest_sizes(values: Mapping[str, Any]) -> dict[str, int]:
    """The smallest possible values of ``train`` for the sizes that are ``auto``."""
    train = values.get("train")
    written = {key for key in (MICRO_BATCH, CHUNK) if isinstance(train, Mapping) and train.get(key) == "auto"}
    sizes = {CHUNK: CHUNK_UNIT} if CHUNK in written else {}
    if MICRO_BATCH in written:  # it also determines gradient accumulation
        sizes |= {MICRO_BATCH: 1, "gradient_accumulation_steps": 1}
    return sizes


def _largest_micro_batch(config: RunConfig) -> int:
    if config.train.global_batch_size is None:
        raise ConfigError(f"train.{MICRO_BATCH}=auto needs train.global_batch_size, the sequences of one step")
    budget_bytes = config.plan.budget or _gpu_bytes(config)
    sequences = config.global_batch_size // config.distributed.world_size

    def fits(micro_batch: int) -> bool:
        try:
            peak_bytes = _peak_bytes(config, MICRO_BATCH, micro_batch)
        except (ConfigError, PlanInfeasible):  # the size is not allowed, or exceeds the host budget
            return False
        return config.memory.needed_bytes(peak_bytes) <= budget_bytes

    if fits(sequences):  # one micro-batch may need less memory than two, whose gradients are accumulated
        return sequences
    plan(changed(config, {"plan.budget": budget_bytes}))  # raises, with the reason, if not even one sequence fits
    micro_batches = -(-sequences // last_true(fits, 1, sequences))
    return -(-sequences // micro_batches)


def _largest_free_chunk(config: RunConfig) -> int:
    least = _peak_bytes(config, CHUNK, CHUNK_UNIT)

    def is_free(num_units: int) -> bool:
        return _peak_bytes(config, CHUNK, num_units * CHUNK_UNIT) <= least

    rows = config.micro_batch_size * config.train.sequence_length
    return CHUNK_UNIT * last_true(is_free, 1, -(-rows // CHUNK_UNIT))


def _peak_bytes(config: RunConfig, key: str, size: int) -> int:
    """The planned peak with another size; ``fit`` finds the layers faster than ``plan``."""
    return fit(changed(config, {f"train.{key}": size}), ANY_BUDGET, vary=()).best.peak_bytes


def _gpu_bytes(config: RunConfig) -> int:
    import torch  # imported here so that a plan with a budget needs no torch

    if config.train.device == "cpu" or not torch.cuda.is_available():
        raise ConfigError(f"train.{MICRO_BATCH}=auto needs plan.budget, e.g. 24GiB, where there is no GPU")
    return int(torch.cuda.get_device_properties(0).total_memory)
