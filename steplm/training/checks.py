"""Checks before a run starts or resumes: the initial model, the configuration, the plan, and the data must agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from steplm.checkpoint import CheckpointState
from steplm.config import ModelConfig, OptimConfig, RunConfig
from steplm.data.tokens import Manifest
from steplm.errors import CheckpointMismatch, ConfigError
from steplm.growth.grow import positions_in_final, select_layers
from steplm.models.build import config_values, hf_config
from steplm.models.folder import load_hf_config, require_plain_weights
from steplm.models.trial import require_trainable, require_unchanged_function
from steplm.planner.plan import Plan
from steplm.schedule import Phase, Schedule
from steplm.training.folder import RunFolder

# Keys of ``optim`` that the schedule or the saved optimizer states depend on.
FIXED_OPTIM_KEYS = ("name", "old_layers", "rank", "update_proj_gap", "scale", "switch_steps", "schedule_over")

# Keys and sections that may change at a resume; any other change makes it another run.
FREE_AT_RESUME = (
    "name",
    "output_dir",
    "data.num_workers",
    "data.prepared_dir",
    "train.device",
    "train.num_threads",
    "distributed",
    "train.dry_run",
    # These change how a step is computed, not its result; the tokens of a step are compared separately.
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "train.global_batch_size",
    "train.gradient_checkpointing",
    "train.loss_chunk_size",
    "train.compile",
    "memory.offload_activations",
    "memory.offload_optimizer",
    "memory.offload_weights",
    "memory.reserve",
    "memory.correction",
    "plan.budget",
    "plan.host_budget",
    # Changing these can rescue a diverged run. Such changes are logged.
    *(f"optim.{key}" for key in OptimConfig.model_fields if key not in FIXED_OPTIM_KEYS),
    "train.save_steps",
    "train.save_minutes",
    "train.save_total_limit",
    "eval",
    "log",
)

# Config keys in which the initial model may differ from ``model``; its own values apply.
NOT_COMPARED = (
    "num_hidden_layers", "layer_types", "max_window_layers", "initializer_range", "max_position_embeddings",
    "use_cache", "dtype", "architectures", "transformers_version", "_name_or_path", "bos_token_id", "eos_token_id",
    "pad_token_id", "model_type",
)  # fmt: skip


def check_family(config: RunConfig, plan: Plan) -> None:
    """Refuse model families that cannot be trained, and growth that does not do what its operator declares.

    Reads no data, so it fails early.

    Raises:
        ConfigError: the family cannot be trained or grown.
        GrowthError: growing this family would not preserve the function as the operator declares.
    """
    final = hf_config(config.model.hf_config())
    grown = [phase for phase in plan.schedule.phases if phase.entry.operator is not None]
    for phase in (plan.schedule.phases[0], *grown):
        phase_config(config, plan.schedule, phase)
    require_trainable(final)
    for operator in {phase.entry.operator for phase in grown if phase.entry.operator is not None}:
        require_unchanged_function(final, operator)


def phase_config(config: RunConfig, schedule: Schedule, phase: Phase) -> PretrainedConfig:
    """The final model's configuration, reduced to the layers that this phase's layers will become."""
    later = (other.entry.layer_map for other in schedule.phases[phase.index :])
    growths = [layer_map for layer_map in later if layer_map is not None]
    return hf_config(config.model.hf_config(), positions_in_final(growths, phase.num_hidden_layers))


def check_init_from(config: RunConfig, plan: Plan) -> None:
    """Require that the initial model matches ``model``, has stage 1's depth, and keeps its own tokenizer.

    Raises:
        ConfigError: it does not; the message says which key to set.
    """
    if config.init_from is None:
        return
    given = load_hf_config(config.init_from)
    require_plain_weights(given, config.init_from)
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
    positions = getattr(given, "max_position_embeddings", None)
    if positions is not None and config.train.sequence_length > positions:
        raise ConfigError(
            f"train.sequence_length={config.train.sequence_length} is more than the {positions} "
            f"positions of init_from {config.init_from}.",
            max_position_embeddings=positions,
        )
    ours = hf_config(config.model.hf_config())
    values = config_values(ours)
    # Per-layer settings come from the initial model too.
    per_layer = {key for key, value in select_layers(values, [0]).items() if value != values[key]}
    for key, theirs in config_values(given).items():
        value = getattr(ours, key, theirs)
        if key not in per_layer and key not in NOT_COMPARED and theirs != value:
            name = f"model.{key}" if key in ModelConfig.model_fields else f"model.extra.{key}"
            raise ConfigError(
                f"{name} is {value}, but that of init_from {config.init_from} is {theirs}: set {name}={theirs}", key=key
            )


def check_same_run(config: RunConfig, folder: RunFolder) -> list[str]:
    """Require that the run directory has the same configuration, except for the keys in ``FREE_AT_RESUME``.

    Returns:
        Allowed changes that affect the training result or the reported losses, each with old and new value.

    Raises:
        CheckpointMismatch: another key differs.
    """
    begun_with = folder.begun_with
    if begun_with is None:
        return []
    sequences, before_sequences = config.global_batch_size, begun_with.global_batch_size
    if sequences != before_sequences:
        raise CheckpointMismatch(
            f"{config.run_dir} holds a run of {before_sequences} sequences a step, and this configuration has "
            f"{sequences}. Set train.global_batch_size={before_sequences}, or change both "
            "train.per_device_train_batch_size and train.gradient_accumulation_steps, so that their product stays.",
            sequences=sequences,
            sequences_before=before_sequences,
        )
    differing = differing_keys(begun_with, config)
    changed = [key for key in differing if not is_one_of(key, FREE_AT_RESUME)]
    if changed:
        listing = ", ".join(differing[key] for key in changed[:5])
        raise CheckpointMismatch(
            f"{config.run_dir} holds a run of another configuration ({listing}). "
            "Undo the change to resume it, or give this run its own name or output_dir.",
            changed=changed,
        )
    return [change for key, change in differing.items() if is_one_of(key, ("optim", "eval.max_tokens"))]


def is_same_run(config: RunConfig) -> bool:
    """Whether the directory was written by this same run: every key that affects the result is unchanged."""
    try:
        before = RunFolder.open(config.run_dir).written
    except ConfigError:
        return False
    if before is None:
        return False
    others = [
        key
        for key in differing_keys(before, config)
        if is_one_of(key, ("optim",)) or not is_one_of(key, FREE_AT_RESUME)
    ]
    return not others and before.global_batch_size == config.global_batch_size


def is_one_of(key: str, names: tuple[str, ...]) -> bool:
    """Whether ``section.key`` is one of these keys or belongs to one of these sections."""
    return key in names or key.partition(".")[0] in names


def differing_keys(before: RunConfig, now: RunConfig) -> dict[str, str]:
    """Map each key that differs to ``"key: old -> new"``."""
    old, new = (flat(config.model_dump(mode="json")) for config in (before, now))
    for values in (old, new):
        if values["plan.num_stages"] == 1 and values["method"] in ("step", "growth", "thawed"):
            values["method"] = "vanilla"  # with one stage these methods are identical
    return {key: f"{key}: {old.get(key)} -> {value}" for key, value in new.items() if old.get(key) != value}


def check_checkpoint(path: Path | None, state: CheckpointState, plan: Plan, manifest: Manifest) -> None:
    """Require that the checkpoint comes from this plan and this data.

    Raises:
        CheckpointMismatch: it does not.
    """
    phase_index = state.progress.phase_index
    expected = plan.schedule.hash_until(phase_index)
    if state.schedule_hash != expected or not 0 < phase_index <= len(plan.schedule.phases):
        raise CheckpointMismatch(
            f"{path} belongs to schedule {state.schedule_hash}, not to that of plan.json, which is {expected} up to "
            f"phase {phase_index}. Restore plan.json, or use another output_dir.",
            schedule_hash=expected,
        )
    if state.data_fingerprint != manifest.fingerprint:
        raise CheckpointMismatch(
            f"{path} was trained on data {state.data_fingerprint}, but the prepared data is {manifest.fingerprint}. "
            "Restore the data, or start in another output_dir.",
            fingerprint=manifest.fingerprint,
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to ``section.key``; the free-form ``model.extra`` stays one value."""
    keys: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, dict) and name != "model.extra"
        keys.update(flat(value, f"{name}.") if nested else {name: value})
    return keys
