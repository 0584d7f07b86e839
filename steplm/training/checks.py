"""What must agree before a run begins or goes on: the given model, the configuration, the plan, the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steplm.checkpoint import CheckpointState
from steplm.checkpoint.folder import complete_checkpoints
from steplm.config import ModelConfig, OptimConfig, RunConfig, load_config
from steplm.data.tokens import Manifest
from steplm.errors import CheckpointError, CheckpointMismatch, ConfigError
from steplm.models.build import config_values, hf_config
from steplm.models.folder import load_hf_config
from steplm.types import Plan, from_json
from steplm.units import reason

# What the saved optimizer states depend on.
OPTIMIZER_KEYS = ("name", "rank", "low_rank_layers", "update_proj_gap", "scale", "switch_steps")

# Of ``optim``, what the plan's stages depend on.
PLANNED_KEYS = ("schedule_over",)

# A resumed run may differ in these keys; any other difference would make it another run.
FREE_AT_RESUME = (
    "name",
    "output_dir",
    "data.num_workers",
    "data.prepared_dir",
    "train.device",
    "train.num_threads",
    "distributed",
    "train.dry_run",
    # How a step is computed, not what: its tokens are compared.
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "train.global_batch_size",
    "train.gradient_checkpointing",
    "train.loss_chunk_size",
    "train.compile",
    "memory.offload_activations",
    "memory.reserve",
    "memory.correction",
    "plan.budget",
    # The way out of a diverged run. Such a change is noted in the log.
    *(f"optim.{key}" for key in OptimConfig.model_fields if key not in OPTIMIZER_KEYS + PLANNED_KEYS),
    "train.save_steps",
    "train.save_total_limit",
    "eval",
    "log",
)

# Keys of a given model's configuration that need not be those of ``model``: the given ones hold.
NOT_COMPARED = (
    "num_hidden_layers", "layer_types", "max_window_layers", "initializer_range", "max_position_embeddings",
    "use_cache", "dtype", "architectures", "transformers_version", "_name_or_path", "bos_token_id", "eos_token_id",
    "pad_token_id", "model_type",
)  # fmt: skip


def check_init_from(config: RunConfig, plan: Plan) -> None:
    """The given model is the one that ``model`` describes, of stage 1's depth, with its own tokenizer.

    Raises:
        ConfigError: it is not; the message says which key to set.
    """
    if config.init_from is None:
        return
    given = load_hf_config(config.init_from)
    if config.data.tokenizer == "train":
        raise ConfigError(
            f"init_from {config.init_from} has embeddings for its own tokenizer, and data.tokenizer=train would make "
            f"another. Set data.tokenizer={config.init_from}.",
            init_from=config.init_from,
        )
    if given.num_hidden_layers != plan.layers[0]:
        raise ConfigError(
            f"init_from {config.init_from} has {given.num_hidden_layers} layers, but stage 1 of the plan has "
            f"{plan.layers[0]}. Set plan.layers by hand, beginning with {given.num_hidden_layers}.",
            num_hidden_layers=given.num_hidden_layers,
        )
    if config.train.sequence_length > given.max_position_embeddings:
        raise ConfigError(
            f"train.sequence_length={config.train.sequence_length} is more than the {given.max_position_embeddings} "
            f"positions of init_from {config.init_from}.",
            max_position_embeddings=given.max_position_embeddings,
        )
    ours = hf_config(config.model.hf_config())
    for key, theirs in config_values(given).items():
        value = getattr(ours, key, theirs)
        if key not in NOT_COMPARED and theirs != value:
            name = f"model.{key}" if key in ModelConfig.model_fields else f"model.extra.{key}"
            raise ConfigError(
                f"{name} is {value}, but that of init_from {config.init_from} is {theirs}: set {name}={theirs}", key=key
            )


def check_same_run(config: RunConfig, plan: Plan) -> list[str]:
    """A run directory belongs to one configuration, but for the keys in ``FREE_AT_RESUME``.

    Returns:
        Keys that differ and change what is computed or what losses are of, each with its old and new value.

    Raises:
        CheckpointMismatch: another key or the plan differs.
    """
    run_dir = config.run_dir
    written = run_dir / "config.yaml"
    begun = (run_dir / "summary.json").is_file() or bool(complete_checkpoints(run_dir / "checkpoints"))
    if not written.is_file() or not begun:
        return []
    begun_with = load_config(written)
    sequences, before_sequences = config.global_batch_size, begun_with.global_batch_size
    if sequences != before_sequences:
        raise CheckpointMismatch(
            f"{config.run_dir} holds a run of {before_sequences} sequences a step, and this configuration has "
            f"{sequences}. Set train.global_batch_size={before_sequences}, or change both "
            "train.per_device_train_batch_size and train.gradient_accumulation_steps, so that their product stays.",
            sequences=sequences,
            sequences_before=before_sequences,
        )
    differing = _differing(begun_with, config)
    changed = [key for key in differing if not key.startswith(FREE_AT_RESUME)]
    if changed:
        listing = ", ".join(differing[key] for key in changed[:5])
        raise CheckpointMismatch(
            f"{config.run_dir} holds a run of another configuration ({listing}). "
            "Undo the change to resume it, or give this run its own name or output_dir.",
            changed=changed,
        )
    if (run_dir / "plan.json").is_file() and written_plan(run_dir).hash != plan.hash:
        raise CheckpointMismatch(
            f"{run_dir / 'plan.json'} is not the plan that this configuration gives now. "
            "It was edited, or made by another version: give this run its own output_dir.",
            plan_hash=plan.hash,
        )
    return [change for key, change in differing.items() if key.startswith(("optim.", "eval.max_tokens"))]


def is_same_run(config: RunConfig) -> bool:
    """Whether the directory has been given just this run: every key that changes what is computed is as it was."""
    try:
        before = load_config(config.run_dir / "config.yaml")
    except ConfigError:
        return False
    others = [
        key for key in _differing(before, config) if key.startswith("optim.") or not key.startswith(FREE_AT_RESUME)
    ]
    return not others and before.global_batch_size == config.global_batch_size


def _differing(before: RunConfig, now: RunConfig) -> dict[str, str]:
    """``"key: old -> new"`` of every key that differs."""
    old, new = flat(before.model_dump(mode="json")), flat(now.model_dump(mode="json"))
    return {key: f"{key}: {old.get(key)} -> {value}" for key, value in new.items() if old.get(key) != value}


def written_plan(run_dir: Path) -> Plan:
    """``plan.json`` of a run directory.

    Raises:
        CheckpointError: there is none that can be used.
    """
    try:
        plan = from_json(Plan, json.loads((run_dir / "plan.json").read_text()))
        if not plan.layers:
            raise ValueError("a plan without layers")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{run_dir / 'plan.json'} cannot be used: {reason(error)}. It is damaged, or another version of steplm "
            "wrote it.",
            path=str(run_dir / "plan.json"),
        ) from None
    return plan


def trained_on(run_dir: Path) -> str | None:
    """The fingerprint of the data of a finished run; None of one that is not, or that an older version finished."""
    try:
        return json.loads((run_dir / "summary.json").read_text()).get("data_fingerprint")
    except (OSError, ValueError, AttributeError):
        return None


def check_checkpoint(path: Path | None, state: CheckpointState, plan: Plan, manifest: Manifest) -> None:
    """The checkpoint was made by this plan, on these data.

    Raises:
        CheckpointMismatch: it was not.
    """
    stage_index = state.progress.stage_index
    expected = plan.hash_until(min(stage_index, plan.num_stages))
    if state.plan_hash != expected:
        raise CheckpointMismatch(
            f"{path} belongs to plan {state.plan_hash}, not to this run's plan, which is {expected} up to stage "
            f"{stage_index}. Use another output_dir for the new plan.",
            plan_hash=expected,
        )
    if state.data_fingerprint != manifest.fingerprint:
        raise CheckpointMismatch(
            f"{path} was trained on data {state.data_fingerprint}, but the prepared data is {manifest.fingerprint}. "
            "Restore the data, or start anew in another output_dir.",
            fingerprint=manifest.fingerprint,
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as ``section.key``; the free-form ``model.extra`` stays one value."""
    keys: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, dict) and name != "model.extra"
        keys.update(flat(value, f"{name}.") if nested else {name: value})
    return keys
