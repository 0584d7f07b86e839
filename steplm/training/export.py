"""Export a checkpoint to a plain Hugging Face folder: merged adapters, weights, tokenizer, and model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from steplm.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from steplm.config import RunConfig, load_written_config
from steplm.data.tokenizer import load_tokenizer
from steplm.errors import CheckpointError, DataError
from steplm.files import replacing
from steplm.models.folder import save_folder, save_generation_config
from steplm.pet.adapters import merge_state
from steplm.planner.plan import Plan
from steplm.training.folder import RunFolder
from steplm.training.model_card import model_card, public_name
from steplm.types import to_json
from steplm.units import reason
from steplm.yaml_files import dump_yaml


def export(source: str | Path, output_dir: str | Path | None = None) -> Path:
    """Write the model of a run (its latest checkpoint) or of one checkpoint as a Hugging Face folder.

    The folder contains ``config.json``, the weights, the tokenizer, ``generation_config.json``,
    ``provenance.json`` (where each layer comes from), and a model card that describes the plan.

    Args:
        source: a run directory, or a checkpoint inside one.
        output_dir: default ``RUN_DIR/export``; an earlier export there is replaced.

    Raises:
        CheckpointError: no complete checkpoint, no tokenizer, or the output folder cannot be replaced.
    """
    source = Path(source)
    checkpoint_path: Path | None
    if (source / "state.json").is_file():
        checkpoint_path, run_dir = source, source.resolve().parent.parent
    else:
        checkpoint_path, run_dir = latest_checkpoint(source / "checkpoints"), source
    if checkpoint_path is None:
        raise CheckpointError(f"{source} holds no complete checkpoint: is it a run directory?", path=str(source))
    checkpoint = load_checkpoint(checkpoint_path, with_optimizer=False)
    config, plan = load_written_config(run_dir / "config.yaml"), RunFolder.open(run_dir).plan
    output_dir = Path(output_dir) if output_dir is not None else run_dir / "export"
    final = output_dir.resolve()  # "." has no name
    _require_replaceable(final)
    tokenizer_dir = _tokenizer_dir(run_dir, config)
    with replacing(final) as temporary:
        _write(temporary, checkpoint, config, plan, tokenizer_dir)
    return output_dir


def _require_replaceable(folder: Path) -> None:
    """Require a folder that is absent, empty, or an earlier export, and does not contain the working directory."""
    if Path.cwd().is_relative_to(folder):
        raise CheckpointError(
            f"{folder} is the current folder or above it, and an export replaces its folder: name a new one inside it",
            path=str(folder),
        )
    if not folder.exists():
        return
    is_earlier_export = all((folder / name).is_file() for name in ("training_config.yaml", "plan.json"))
    if not folder.is_dir() or (any(folder.iterdir()) and not is_earlier_export):
        raise CheckpointError(f"{folder} exists and is not an earlier export: choose another folder", path=str(folder))


def _tokenizer_dir(run_dir: Path, config: RunConfig) -> Path:
    """The run's own copy of the tokenizer, or else that of the prepared data."""
    candidates = [run_dir / "tokenizer"]
    if config.data.prepared_dir is not None:
        candidates.append(config.prepared_dir / "tokenizer")
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise CheckpointError(
        f"no tokenizer in {' or '.join(map(str, candidates))}: a model without it is of no use. Copy the folder "
        f"'tokenizer' of the run's prepared data to {candidates[0]}, or call this where the run was started.",
        candidates=[str(folder) for folder in candidates],
    )


def _public(config: RunConfig) -> dict[str, Any]:
    """The config as published, without folder names from this machine."""
    values = config.model_dump(mode="json")
    data = values["data"]
    values["output_dir"] = data["prepared_dir"] = None
    data["train"], data["validation"] = _public_texts(data["train"]), _public_texts(data["validation"])
    data["tokenizer"] = public_name(data["tokenizer"], may_be_on_hub=True)
    if config.init_from is not None:
        values["init_from"] = public_name(config.init_from, may_be_on_hub=True)
    return values


def _public_texts(texts: Any) -> Any:
    """Strip folders from all entries of nested lists and mappings."""
    if isinstance(texts, list):
        return [_public_texts(entry) for entry in texts]
    if isinstance(texts, dict):
        return {key: _public_texts(value) if key not in ("name", "weight") else value for key, value in texts.items()}
    return public_name(texts)


def _write(folder: Path, checkpoint: Checkpoint, config: RunConfig, plan: Plan, tokenizer_dir: Path) -> None:
    weights = checkpoint.weights
    if checkpoint.state.phase.has_adapters:
        weights = merge_state(weights, checkpoint.adapters, checkpoint.state.phase)
    hf_config = checkpoint.config
    hf_config.use_cache = True
    try:
        tokenizer = load_tokenizer(tokenizer_dir)
    except DataError as error:
        raise CheckpointError(
            f"the tokenizer in {tokenizer_dir} cannot be used: {reason(error)}. "
            "Copy the folder 'tokenizer' of the run's prepared data in its place.",
            path=str(tokenizer_dir),
        ) from None
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # The architecture's default IDs belong to another tokenizer; generation must stop at ours.
    for name, token_id in special.items():
        setattr(hf_config, name, token_id)
    save_folder(folder, hf_config, weights)
    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    save_generation_config(_generation_config(config, special), folder)
    provenance = [to_json(layer) for layer in checkpoint.state.provenance]
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
    (folder / "plan.json").write_text(json.dumps(to_json(plan), indent=1) + "\n")
    (folder / "training_config.yaml").write_text(dump_yaml(_public(config)), encoding="utf-8")
    (folder / "README.md").write_text(model_card(config, plan, checkpoint.state))


def _generation_config(config: RunConfig, special: Mapping[str, Any]) -> GenerationConfig:
    """The generation config of the initial model, which may have several EOS tokens; else plain sampling."""
    generation = GenerationConfig(do_sample=True, temperature=0.8, top_p=0.95)
    if config.init_from is not None:
        with suppress(OSError):  # the model has none or no longer exists
            generation = GenerationConfig.from_pretrained(config.init_from)
    given = generation.eos_token_id
    ends = sorted({*(given if isinstance(given, list) else [given]), special["eos_token_id"]} - {None})
    generation.update(**{**special, "eos_token_id": ends if len(ends) > 1 else ends[0]})
    return generation
