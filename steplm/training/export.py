"""From a checkpoint to a plain Hugging Face folder: adapters merged, tokenizer and model card beside the weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import yaml
from transformers import GenerationConfig

from steplm.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from steplm.config import RunConfig, load_config
from steplm.errors import CheckpointError
from steplm.models.folder import save_folder
from steplm.pet.adapters import merge_state
from steplm.training.model_card import model_card
from steplm.types import Plan, from_json, to_json


def export(source: str | Path, output_dir: str | Path | None = None) -> Path:
    """Write the model of a run (its latest checkpoint) or of one checkpoint as a Hugging Face folder.

    The folder has ``config.json``, the weights, the tokenizer, ``generation_config.json``,
    ``provenance.json`` (where each layer comes from) and a model card that tells the plan.

    Args:
        source: a run directory, or a checkpoint inside one.
        output_dir: default ``RUN_DIR/export``. A folder there that is an earlier export is replaced.

    Raises:
        CheckpointError: no complete checkpoint, or the output folder holds something else.
    """
    source = Path(source)
    checkpoint_path = source if (source / "state.json").is_file() else latest_checkpoint(source / "checkpoints")
    if checkpoint_path is None:
        raise CheckpointError(f"{source} holds no complete checkpoint: is it a run directory?", path=str(source))
    run_dir = checkpoint_path.parent.parent
    checkpoint = load_checkpoint(checkpoint_path)
    config = load_config(run_dir / "config.yaml")
    plan = from_json(Plan, json.loads((run_dir / "plan.json").read_text()))
    final = Path(output_dir) if output_dir is not None else run_dir / "export"
    if final.exists() and any(final.iterdir()) and not (final / "provenance.json").is_file():
        raise CheckpointError(f"{final} exists and is no earlier export: choose another folder", path=str(final))

    temporary = final.with_name(f".{final.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    _write(temporary, checkpoint, config, plan)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    return final


def _write(folder: Path, checkpoint: Checkpoint, config: RunConfig, plan: Plan) -> None:
    weights = checkpoint.weights
    if checkpoint.state.adapters is not None:
        weights = merge_state(weights, checkpoint.adapters, checkpoint.state.adapters)
    hf_config = checkpoint.config
    hf_config.use_cache = True
    tokenizer_dir = config.prepared_dir / "tokenizer"
    special = {}
    if tokenizer_dir.is_dir():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, trust_remote_code=False)
        special = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        # The architecture's defaults name another tokenizer's ids; generation must stop at ours.
        for name, token_id in special.items():
            setattr(hf_config, name, token_id)
    save_folder(folder, hf_config, weights)
    if tokenizer_dir.is_dir():
        shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    GenerationConfig(**special, do_sample=True, temperature=0.8, top_p=0.95).save_pretrained(folder)
    provenance = [to_json(layer) for layer in checkpoint.state.provenance]
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
    (folder / "plan.json").write_text(json.dumps(to_json(plan), indent=1) + "\n")
    (folder / "training_config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    (folder / "README.md").write_text(model_card(config, plan, checkpoint.state))
