"""Every causal family of the installed transformers: planned, trained and grown right, or refused with a reason.

``docs/families.md`` has the result. ``STEPLM_UPDATE_GOLDEN=1 pytest -m slow tests/families`` writes its lists anew.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from steplm.config import ModelConfig
from steplm.errors import ConfigError, GrowthError, SteplmError
from steplm.growth.grow import grow
from steplm.growth.operators import OPERATORS
from steplm.models.build import (
    build_model,
    fresh_layers,
    grown_config,
    hf_config,
    initial_state,
    meta_model,
    plain_state,
)
from steplm.models.folder import load_config_and_state, save_folder
from steplm.models.forward import batch_loss, check_loss
from steplm.models.shape import shape_of
from steplm.models.trial import require_unchanged_function
from steplm.planner.positions import make_layer_map

PAGE = Path(__file__).parents[2] / "docs/families.md"
BLOCK = re.compile(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", re.DOTALL)
LIST = re.compile(r"\*\*(.+?):\*\*\n([^*<]*)")
ALL_OPERATORS = "With every growth operator"
EQUAL_LAYERS = "only where all layers have the same tensors, which is not so by default"
OTHER_FUNCTION = "not by operator `identity`, which would change its function"
# The lists of the page, and what the notes of their families say: two of supported ones, the others of refused ones.
GROUPS = {
    "Only with equal layers": EQUAL_LAYERS,
    "Not with the growth operator `identity`": OTHER_FUNCTION,
    "Encoder-decoders": "is an encoder-decoder",
    "More than text": "is more than a language model",
    "Not causal": "is not causal",
    "Layers of different shapes or tensors": "differ in",
}
# Of every kind: plain, old, soft-capped, with types of layers, with experts and routers' biases, and refused.
QUICK = (
    "llama", "gpt2", "opt", "gemma3_text", "smollm3", "qwen3_moe", "glm4_moe", "ernie4_5_moe", "deepseek_v3",
    "diffllama", "bert", "bart", "gemma3",
)  # fmt: skip
NUM_LAYERS = 8  # more than any family's pattern of layer types is long
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
# What no rule in ``tiny_values`` finds.
OWN_VALUES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], NUM_LAYERS // 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["full_attention"] * NUM_LAYERS},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 8},
}


class Outcome(NamedTuple):
    is_supported: bool
    note: str


def tiny_values(model_type: str) -> dict[str, Any]:
    """Configuration keys as a YAML file gives them, for a model of a few thousand parameters."""
    default = AutoConfig.for_model(model_type)
    default.allow_global_per_layer_attribute_access = True
    extra: dict[str, Any] = {}
    for key, value in default.to_dict().items():
        if type(value) is int and key not in ModelConfig.model_fields and key not in default.attribute_map.values():
            extra[key] = _tiny(key, value)
    sizes = dict(SIZES)
    if hasattr(default, "kv_lora_rank"):  # latent attention makes as many keys as queries
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    absent = {key: None for key in ModelConfig().hf_config() if key != "model_type" and not hasattr(default, key)}
    extra |= absent | OWN_VALUES.get(model_type, {})
    return ModelConfig(model_type=model_type, **sizes, extra=extra).hf_config()


def _tiny(key: str, value: int) -> int:
    if key.endswith("_token_id"):
        return 0 if key == "pad_token_id" else 1
    if key in ("n_group", "topk_group", "num_expert_group") or ("shared" in key and "expert" in key):
        return min(value, 1)
    if key.endswith("rank"):
        return min(value, 8)
    if key.endswith("head_dim"):
        return min(value, 8)
    if key.endswith(("size", "dim", "inner")):
        return min(value, 16)
    if "expert" in key or key in ("moe_k", "moe_topk"):
        return min(value, 2 if "per_tok" in key or "top" in key or key == "moe_k" else 4)
    return value


def with_equal_layers(values: dict[str, Any]) -> dict[str, Any]:
    """Every layer of the kind that most layers of the family have."""
    equal: dict[str, Any] = {}
    for key, value in hf_config(values).to_dict().items():
        if key in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"):
            equal[key] = 0
        elif key.endswith("types") and isinstance(value, list) and len(value) == NUM_LAYERS:
            equal[key] = [Counter(value).most_common(1)[0][0]] * NUM_LAYERS
    return values | equal


def outcome_of(model_type: str) -> Outcome:
    """What becomes of a family, from its plan to its grown folder."""
    try:
        values = tiny_values(model_type)
    except Exception:  # its default configuration cannot be made at all: neither can any other
        values = {"model_type": model_type, **SIZES}
    notes = []
    try:
        try:
            shape = shape_of(values)
        except ConfigError as error:
            if "differ" not in str(error):
                raise
            values = with_equal_layers(values)
            with contextlib.suppress(ConfigError):
                shape = shape_of(values)
                notes.append(EQUAL_LAYERS)
            if not notes:
                raise
        config = hf_config(values)
        model = meta_model(config)
        assert shape.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
        state = initial_state(config, seed=0, dtype=torch.float32)
        assert_it_trains(config, state)
        assert_it_grows(config, state)
    except SteplmError as error:
        return Outcome(False, _one_line(error))
    try:
        require_unchanged_function(config, "identity")
    except GrowthError:
        notes.append(OTHER_FUNCTION)
    return Outcome(True, "; ".join(notes))


def assert_it_trains(config: PretrainedConfig, state: dict[str, torch.Tensor]) -> None:
    model = build_model(config, {name: tensor.clone() for name, tensor in state.items()})
    check_loss(model, 16)
    tokens = torch.arange(32).view(2, 16)
    batch_loss(model.train(), tokens, tokens.roll(-1, 1), num_valid=32, chunk_size=8).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    embeddings = model.get_input_embeddings().weight
    assert embeddings.grad[:32].count_nonzero(dim=1).all(), "a token is not trained"


def assert_it_grows(config: PretrainedConfig, state: dict[str, torch.Tensor]) -> None:
    """By every operator; the folder that is written holds just the tensors of the model of its own config.json."""
    layer_map = make_layer_map(NUM_LAYERS, 2, "upper", seed=0)
    grown = grown_config(config, layer_map)
    for operator in OPERATORS:
        try:
            tensors = grow(state, layer_map, operator, fresh_layer=fresh_layers(grown, seed=0, dtype=torch.float32))
        except GrowthError:
            if OPERATORS[operator].function_preserving:
                continue  # told by ``outcome_of``
            raise
        with tempfile.TemporaryDirectory() as folder:
            save_folder(Path(folder), grown, tensors)
            read_config, read = load_config_and_state(folder)
        assert read_config.num_hidden_layers == NUM_LAYERS + 2
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items()), operator
        assert plain_state(meta_model(read_config)).keys() == tensors.keys()


def _one_line(error: Exception) -> str:
    sentence = str(error).split("\n")[0].split(": only models of equal")[0]
    return sentence.split(". ")[0].rstrip(".").replace("|", "\\|")[:200]


def blocks(outcomes: dict[str, Outcome]) -> dict[str, str]:
    """The Markdown between each pair of markers of the page."""
    groups: dict[str, list[str]] = {group: [] for group in (ALL_OPERATORS, *GROUPS)}
    others = []
    for name, outcome in outcomes.items():
        for note in outcome.note.split("; ") if outcome.is_supported else [outcome.note]:
            group = next((group for group, phrase in GROUPS.items() if phrase in note), ALL_OPERATORS)
            if group in GROUPS or outcome.is_supported:
                groups[group].append(f"`{name}`")
            else:
                others.append(f"| `{name}` | {note} |")
    listed = {group: textwrap.fill(", ".join(names), 128, break_on_hyphens=False) for group, names in groups.items()}
    count = sum(outcome.is_supported for outcome in outcomes.values())
    return {
        "count": f"Of the {len(outcomes)} causal families of transformers {transformers.__version__}, steplm supports "
        f"{count}.",
        "supported": "\n\n".join(f"**{group}:**\n{listed[group]}" for group in (ALL_OPERATORS, *list(GROUPS)[:2])),
        "refused": "\n\n".join(f"**{group}:**\n{listed[group]}" for group in list(GROUPS)[2:]),
        "others": "\n".join(["| `model_type` | reason |", "| --- | --- |", *others]),
    }


def filled(page: str, outcomes: dict[str, Outcome]) -> str:
    texts = blocks(outcomes)
    return BLOCK.sub(lambda match: f"<!-- {match[1]} -->\n{texts[match[1]]}\n<!-- /{match[1]} -->", page)


@pytest.mark.parametrize("model_type", QUICK)
def test_a_family_is_what_the_page_says(model_type: str) -> None:
    kept = dict(LIST.findall(PAGE.read_text(encoding="utf-8")))
    made = blocks({model_type: outcome_of(model_type)})
    lists = dict(LIST.findall("".join(made.values())))
    assert lists.keys() == kept.keys()
    for group, names in lists.items():
        assert (f"`{model_type}`" in kept[group]) == (f"`{model_type}`" in names), group


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_tells_of_every_causal_family_of_the_library() -> None:
    page = PAGE.read_text(encoding="utf-8")
    made = filled(page, {name: outcome_of(name) for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)})
    if os.environ.get("STEPLM_UPDATE_GOLDEN"):
        PAGE.write_text(made, encoding="utf-8")
    assert made == page
