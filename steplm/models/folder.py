"""Read and write Hugging Face folders (``config.json`` and ``model*.safetensors``) as plain named tensors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import logging as transformers_logging

from steplm.errors import CheckpointError, ConfigError, HubUnavailable
from steplm.models.build import (
    check_state,
    describe_misfit,
    dtype_of,
    meta_model,
    no_padding_index,
    plain_state,
    require_decoder_only,
    require_possible_dropout,
    without_extra_outputs,
)
from steplm.models.device import resolve_device
from steplm.models.forward import check_causal
from steplm.units import in_one_line, reason, shortened

MAX_SHARD_SIZE = "5GB"
# Files copied along with a model, whatever happens to its weights.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "encoder.json",
    "spiece.model", "sentencepiece*.model", "chat_template*", "additional_chat_templates/*", "generation_config.json",
)  # fmt: skip
MOST_LAYERS = 1000  # deeper configs are refused if they also have more layers than stored tensors
# Where transformers looks for weights; the first that exists is used.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def save_folder(folder: Path, config: PretrainedConfig, state: Mapping[str, Tensor]) -> None:
    """Write ``config.json`` and the weights, sharded above 5 GB, and check that they form a complete model.

    Raises:
        ConfigError: the written ``config.json`` describes different tensors.
    """
    save_checked_config(folder, config, state)
    save_torch_state_dict(dict(state), folder, max_shard_size=MAX_SHARD_SIZE)


def save_checked_config(folder: Path, config: PretrainedConfig, state: Mapping[str, Tensor]) -> None:
    """Write ``config.json``, and check that these tensors are exactly those of the model it describes.

    Raises:
        ConfigError: they are not.
    """
    save_hf_config(folder, config, dtype_of(state))
    check_state(load_hf_config(folder), {name: tuple(tensor.shape) for name, tensor in state.items()})


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder, in any format, and the index files of their shards."""
    return sorted(file for file in folder.iterdir() if file.is_file() and file.name.endswith(WEIGHT_SUFFIXES))


def save_hf_config(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Write ``config.json`` for weights of this dtype."""
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = dtype
    config.save_pretrained(folder)


def load_state(folder: Path) -> dict[str, Tensor]:
    """Load all tensors of ``model*.safetensors`` in a folder, on the CPU.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return load_tensors(folder / "model.safetensors")
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        files = sorted(folder / Path(name).name for name in names)
    except Exception as error:  # the file can contain anything
        raise CheckpointError(f"{index} is damaged: {reason(error)}", path=str(index)) from None
    return {name: tensor for file in files for name, tensor in load_tensors(file).items()}


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Load all tensors of one safetensors file, on the CPU."""
    if not file.is_file():
        raise CheckpointError(f"no file {file}", path=str(file))
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{file} is damaged: {reason(error)}", path=str(file)) from None


def load_for_inference(name: str | Path, device: str, *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load a complete model in evaluation mode on ``auto``, ``cpu`` or ``cuda``, and check that it is causal.

    Raises:
        ConfigError: the model is not causal or cannot be run, or there is no such device.
        CheckpointError, HubUnavailable: as ``load_pretrained``.
    """
    model = load_pretrained(name, dtype=dtype).to(resolve_device(device)).eval()
    check_causal(model)
    return model


def load_pretrained(name: str | Path, *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load a complete model from a Hugging Face folder or the hub, without running remote code.

    Embeddings have no padding index, so that further training updates every row.

    Raises:
        CheckpointError: the folder contains no model, its tensors do not match its ``config.json``, or their values
            are not valid weights (integers, NaN).
        HubUnavailable: it is not a folder, and the hub cannot be reached or does not have it.
    """
    load_hf_config(name)
    _require_one_set_of_weights(Path(name))
    try:
        with without_bars(), no_padding_index():
            model, report = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # any type: transformers hardly validates config.json before using it
        raise _cannot_load(name, error) from None
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or unexpected:
        raise CheckpointError(
            f"the weights in {name} are not those of its config.json: {describe_misfit(missing, unexpected)}",
            path=str(name),
            missing=missing,
            unexpected=unexpected,
        )
    _check_values(model, name)
    _check_generation_config(model, name)
    without_extra_outputs(model.config)
    return model


def _require_one_set_of_weights(folder: Path) -> None:
    """Refuse two sets of weights, or an adapter beside a model: transformers would silently use one or both."""
    if not folder.is_dir():
        return
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file() and index.is_file():
        raise CheckpointError(
            f"{folder} holds two sets of weights, {whole.name} and the shards of {index.name}. Remove one of them.",
            path=str(folder),
        )
    if _is_adapter(folder):
        raise CheckpointError(
            f"{folder} holds an adapter beside the model (adapter_config.json). Merge it into the weights, or move its "
            "files away to use the model without it.",
            path=str(folder),
        )


def _check_values(model: PreTrainedModel, name: str | Path) -> None:
    for key, tensor in plain_state(model).items():
        # The sum needs no temporary tensor, and finite weights almost always have a finite sum.
        if not tensor.sum(dtype=torch.float32).isfinite() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"the weights in {name} are not all numbers: {key} holds NaN or infinity", tensor=key)
    if Path(name).is_dir() and getattr(model, "hf_quantizer", None) is None:
        _check_stored(Path(name), {key for key, _ in model.named_parameters()}, model.base_model_prefix)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not embeddings.weight:
        raise CheckpointError(
            f"config.json of {name} ties the head to the embeddings (tie_word_embeddings), but the weights hold a head "
            "with other values. Set tie_word_embeddings to false, or remove the head from the weights.",
            path=str(name),
        )


def _check_generation_config(model: PreTrainedModel, name: str | Path) -> None:
    """Refuse what transformers passes over: a generation_config.json that is no JSON, end tokens that are no numbers.

    A chat model would not stop at the end of its turn.
    """
    file = Path(name) / "generation_config.json"
    try:
        given = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {reason(error)}", path=str(file)) from None
    if given is None:
        given = getattr(model.generation_config, "eos_token_id", None)
    if not all(type(token) is int for token in as_token_list(given)):
        raise CheckpointError(
            f"generation_config.json of {name} has eos_token_id={shortened(given)}, but it must be a token's number, "
            "or a list of such numbers.",
            path=str(name),
        )


def as_token_list(value: Any) -> list[Any]:
    """The tokens of an ``eos_token_id``: a number, a list of numbers, or None."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _check_stored(folder: Path, parameters: set[str], prefix: str) -> None:
    """Refuse weights that transformers would use as they are: not floats, or with different values in two files."""
    found: dict[str, Path] = {}
    for file in _files_in_use(folder):
        try:
            stored = load_state_dict(file, map_location="meta")
        except ValueError as error:  # a type that PyTorch converts although transformers does not know it
            raise CheckpointError(f"cannot load the model in {folder}: {error}", path=str(file)) from None
        for key, tensor in stored.items():
            # Weights of experts may have another name in the file than in the model.
            is_weight = key.endswith(".weight") or not parameters.isdisjoint((key, f"{prefix}.{key}"))
            if is_weight and not tensor.is_floating_point():
                kind = str(tensor.dtype).removeprefix("torch.")
                raise CheckpointError(f"{file} holds {key} as {kind}, which is no floating-point type.", path=str(file))
            other = found.setdefault(key, file)
            if other != file and not torch.equal(load_state_dict(other)[key], load_state_dict(file)[key]):
                raise CheckpointError(f"{other} and {file} hold different values of {key}.", path=str(file))


def _files_in_use(folder: Path) -> list[Path]:
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None or file.suffix != ".json":
        return [] if file is None else [file]
    return [folder / name for name in sorted(set(json.loads(file.read_text())["weight_map"].values()))]


def save_generation_config(generation: GenerationConfig, folder: Path) -> None:
    """Write ``generation_config.json``.

    ``save_pretrained`` refuses settings that published folders have, such as a temperature without ``do_sample``.
    """
    generation.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


def copy_companions(model: str | Path, folder: Path) -> None:
    """Copy a model's files other than config and weights: tokenizer, chat templates, generation defaults.

    Raises:
        CheckpointError: a file cannot be copied.
        HubUnavailable: the model is on the hub, which cannot be reached.
    """
    source = Path(model)
    if not source.is_dir():
        try:
            source = Path(snapshot_download(str(model), allow_patterns=list(COMPANIONS)))
        except Exception as error:  # any type, as in load_pretrained
            raise _cannot_load(model, error) from None
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            try:
                shutil.copyfile(file, target)
            except OSError as error:
                raise CheckpointError(f"cannot copy {file}: {error.strerror}", path=str(file)) from None


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence transformers: its progress bars would break ours, and its tensor report repeats our own checks."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


def load_config_and_state(
    name: str | Path, *, dtype: torch.dtype | None = None
) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """Load the configuration and tensors of a Hugging Face folder or hub model, by default in the file's dtype.

    Raises:
        ConfigError: it is not a decoder-only language model, or its weights are quantized.
        CheckpointError, HubUnavailable: as ``load_pretrained``.
    """
    require_plain_weights(load_hf_config(name), name)
    model = load_pretrained(name, dtype=dtype or "auto")
    return model.config, plain_state(model)


def require_plain_weights(config: PretrainedConfig, name: str | Path) -> None:
    """Require a text decoder without quantized weights, which cannot be trained or grown.

    Raises:
        ConfigError: it is not.
    """
    require_decoder_only(config)
    if (how := getattr(config, "quantization_config", None)) is not None:
        method = how.get("quant_method") if isinstance(how, dict) else None
        raise ConfigError(
            f"the weights of {name} are quantized ({method or 'quantization_config in config.json'}), and such weights "
            "are neither trained nor grown here. Use the folder from which they were made, or one in bf16.",
            name=str(name),
        )


def load_hf_config(name: str | Path) -> PretrainedConfig:
    """Load only the configuration; raises errors as ``load_pretrained``."""
    _require_model(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # any type, as in load_pretrained
        raise _cannot_load(name, error) from None
    if config.dtype is not None and not (isinstance(config.dtype, torch.dtype) and config.dtype.is_floating_point):
        raise CheckpointError(
            f"config.json of {name} has dtype={shortened(config.dtype)}, but it must be a floating-point type, such as "
            "bfloat16.",
            path=str(name),
        )
    try:
        require_possible_dropout(config)
    except ConfigError as error:
        raise CheckpointError(f"config.json of {name}: {error}", path=str(name)) from None
    without_extra_outputs(config)
    num_layers, num_tensors = getattr(config, "num_hidden_layers", None), len(_stored_shapes(Path(name)))
    if isinstance(num_layers, int) and num_layers > max(num_tensors, MOST_LAYERS):
        # Building that many layers would exhaust memory before anything is compared.
        raise CheckpointError(
            f"{name}/config.json says num_hidden_layers={num_layers:,}, and the weights hold {num_tensors:,} tensors.",
            path=str(name),
        )
    return config


def _require_model(name: str | Path) -> None:
    path = Path(name)
    if os.path.isdir(path) and not (path / "config.json").is_file():
        hint = ", but an adapter. Merge the adapter into its base model" if _is_adapter(path) else ""
        raise CheckpointError(f"{path} is not a Hugging Face folder: it has no config.json{hint}", path=str(path))
    # "a/b" may be a hub name; anything deeper, absolute, or starting with a dot can only be a folder.
    if not os.path.exists(path) and (len(path.parts) != 2 or str(name).startswith((".", "/", "~"))):
        raise CheckpointError(f"no folder {path}", path=str(path))


def _cannot_load(name: str | Path, error: Exception) -> CheckpointError | HubUnavailable:
    if os.path.isdir(name):
        why = in_one_line(error)
        if "ignore_mismatched_sizes" in why:  # the error does not name the tensors
            why = "; ".join(_wrong_shapes(Path(name))[:3]) or "tensors have other shapes than config.json says"
        if pointers := [file.name for file in weight_files(Path(name)) if _is_lfs_pointer(file)]:
            why = f"{pointers[0]} is a pointer of Git LFS, not the weights. Run git lfs pull in that folder."
        return CheckpointError(f"cannot load the model in {name}: {why}", path=str(name))
    return HubUnavailable(
        f"{name} is not a local folder, and the hub did not return it ({reason(error)}). "
        "Check the name and the network, or pass a folder.",
        name=str(name),
    )


def _stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Tensor shapes from the headers of a folder's safetensors files; damaged files are skipped."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with suppress(SafetensorError, OSError), safe_open(file, framework="pt") as tensors:
            shapes |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    return shapes


def _wrong_shapes(folder: Path) -> list[str]:
    wanted = {key: list(tensor.shape) for key, tensor in meta_model(load_hf_config(folder)).state_dict().items()}
    held = {key: shape for key, shape in _stored_shapes(folder).items() if shape != wanted.get(key, shape)}
    return [f"{key} is {shape}, not {wanted[key]}" for key, shape in sorted(held.items())]


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def _is_lfs_pointer(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(42) == b"version https://git-lfs.github.com/spec/v1"
