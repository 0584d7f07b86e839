"""The folder of a run: its settings, whether it may resume, and its complete checkpoints.

config.yaml     the settings: model, data, every key
metrics.jsonl   one object per step and per evaluation
checkpoints/    what the trainer saves; complete if ``steplm.json`` is there, which is written last
export/         the result
result.json     the numbers of a finished run
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steplm.data.shards import LOCK
from steplm.data.sources import Source, find_sources
from steplm.errors import CheckpointMismatch
from steplm.files import write_atomically
from steplm.models.names import short_name
from steplm.sft.config import FREE_AT_RESUME, SftConfig
from steplm.yaml_files import dump_yaml, read_yaml

MARKER = "steplm.json"


def default_output_dir(model: str) -> Path:
    return Path("runs") / f"{short_name(model)}-sft"


def check_same_run(
    folder: Path, model: str, data: Sequence[str], config: SftConfig, resolved: Mapping[str, Any]
) -> None:
    """Write ``config.yaml``; if a run left a checkpoint or a result, first check that the settings are the same.

    Args:
        resolved: values that defaults resolved to, such as the sequence length.

    Raises:
        CheckpointMismatch: the folder holds another run (the message names every difference), or something else.
    """
    path = folder / "config.yaml"
    begun = read_yaml(path) if path.is_file() else {}
    if "inputs" not in begun and {entry.name for entry in folder.iterdir()} - {LOCK}:
        raise CheckpointMismatch(
            f"{folder} holds something other than an instruction-tuning run: name a new folder with --output",
            path=str(folder),
        )
    now = {
        "model": model,
        "data": list(data),
        "inputs": {"model": _files_of_model(model), "data": [source.describe() for source in find_sources(data)]},
        "config": {**config.model_dump(mode="json"), **resolved},
    }
    if (folder / "result.json").is_file() or last_checkpoint(folder / "checkpoints"):
        before, after = _compared(begun), _compared(now)
        differing = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        if differing:
            lines = [f"  {key}: {before.get(key)} there, {after.get(key)} now" for key in differing]
            raise CheckpointMismatch(
                f"{folder} holds a run with other settings:\n"
                + "\n".join(lines)
                + "\nResume it as it was started, or name another folder with --output.",
                differing=differing,
            )
    write_atomically(path, dump_yaml(now))


def _compared(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that must agree; a folder may have moved, but its files must be the same."""
    config = {key: value for key, value in values.get("config", {}).items() if key not in FREE_AT_RESUME}
    return {**values.get("inputs", {}), **config}


def _files_of_model(model: str) -> str | list[str]:
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return model
    names = ("config.json", "*.safetensors", "tokenizer*", "chat_template.jinja")
    files = sorted(file for name in names for file in folder.glob(name) if file.is_file())
    return [Source(str(file), file).describe() for file in files]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones, left by a killed process, are removed."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    complete = [path for path in checkpoints if (path / MARKER).is_file()]
    for path in checkpoints:
        if path not in complete:
            shutil.rmtree(path)
    return complete[-1] if complete else None


def mark_complete(checkpoint: Path, values: Mapping[str, Any]) -> None:
    write_atomically(checkpoint / MARKER, json.dumps(values))


def read_marker(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MARKER).read_text())
