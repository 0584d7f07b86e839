"""Activations of a layer: by hand, and against what autograd saves in the layer of ``transformers``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from steplm.config import load_config
from steplm.cost.activations import (
    MODELED,
    Workload,
    is_modeled,
    layer_activations,
    norm_backward,
    norm_saved,
    sliding_window,
)
from steplm.pet.adapters import attach
from steplm.planner.shape import FAMILIES, shape_from_hf_config
from steplm.schedule import Adapter, Frozen, Phase, Role, Trained

SIZES = {
    "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None, "head_dim": 8,
}  # fmt: skip
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
B, S = 3, 16


def workload(model_type: str = "llama", precision: str = "bf16") -> Workload:
    return Workload(shape_from_hf_config({"model_type": model_type, **SIZES}), precision, B, S)


def adapted_on(*targets: str) -> Adapter | Frozen:
    return Adapter(4, 4.0, targets) if targets else Frozen()


def test_a_trained_layer_by_hand() -> None:
    N, d, q, k, f, h = B * S, 32, 32, 16, 80, 4
    expected = {
        "two norms: fp32 input, its scale, the normalised input for the weight": 2 * (4 * N * d + 4 * N + 2 * N * d),
        "query, key, value and output of the attention": 2 * N * (q + k + k + q),
        "its normaliser": 4 * N * h,
        "inputs of the attention's maps and of gate and up": 2 * (2 * N * d),
        "gate, its activation, up and their product": 4 * (2 * N * f),
    }
    layer = layer_activations(workload(), Trained())
    assert layer.saved == sum(expected.values())
    assert layer.backward == 2 * N * d + 2 * (2 * N * f)
    assert layer.product_gradient == 2 * N * d + 2 * N * f
    assert layer.first_gradient == 2 * f * d


def test_a_frozen_layer_saves_no_input_that_only_a_weights_gradient_needs() -> None:
    N, d, f, r = B * S, 32, 80, 4
    trained = layer_activations(workload(), Trained())
    frozen = layer_activations(workload(), Frozen())
    inputs = 2 * (2 * N * d) + 2 * N * f
    normalised = 2 * (2 * N * d)
    assert trained.saved - frozen.saved == inputs + normalised
    assert (frozen.first_gradient, frozen.backward) == (0, 2 * N * d + 3 * (2 * N * f))
    adapted = layer_activations(workload(), adapted_on(*ALL))
    assert adapted.saved - frozen.saved == inputs + 7 * 2 * N * r
    assert adapted.first_gradient == 2 * r * (d + f)
    only_down = layer_activations(workload(), adapted_on("down_proj"))
    assert only_down.saved - frozen.saved == 2 * N * f + 2 * N * r
    only_values = layer_activations(workload(), adapted_on("v_proj"))
    assert only_values.saved - frozen.saved == 2 * N * d + 2 * N * r
    assert only_values.first_gradient == 0


def test_norms_of_heads_and_a_mask_are_saved_too() -> None:
    N, q, k = B * S, 32, 16
    llama, qwen3 = (layer_activations(workload(name), Trained()).saved for name in ("llama", "qwen3"))
    assert qwen3 - llama == (4 + 2) * N * (q + k) + 4 * (N * 4 + N * 2)
    masked = replace(workload(), has_mask=True)
    assert layer_activations(masked, Trained()).saved - llama == 2 * N * S
    assert masked.batch_bytes - workload().batch_bytes == 8 * N + 2 * 2 * (N - S) * 8


def test_a_batch_and_the_norm_above_all_layers_by_hand() -> None:
    N, d = B * S, 32
    assert workload().batch_bytes == 16 * N + 2 * 2 * S * 8 + 4 * (8 + 2)
    assert norm_saved(workload(), trained=True) == 4 * N * d + 4 * N + 2 * N * d
    assert norm_saved(workload(), trained=False) == 4 * N * d + 4 * N
    assert norm_backward(workload()) == 16 * N * d + 2 * N * d
    assert workload().stream_bytes == 2 * N * d
    assert workload("llama", "fp32").feed_forward_bytes == 4 * N * 80


def test_the_families_are_those_that_have_such_layers() -> None:
    assert set(MODELED) <= set(FAMILIES)
    for model_type in FAMILIES:
        shape = shape_from_hf_config({"model_type": model_type})
        assert is_modeled(shape) == (model_type in MODELED)
        if is_modeled(shape):
            kind = MODELED[model_type]
            assert kind.normalizes_heads == (FAMILIES[model_type].qk_norm == "head")
            assert [linear.name.rpartition(".")[2] for linear in shape.linears] == list(ALL)
            assert FAMILIES[model_type].norms_per_layer == (4 if kind.norms_after else 2)


def saved_bytes(model: PreTrainedModel) -> int:
    """Storages that autograd holds after the forward pass of the one layer, each once; no parameters."""
    layer = model.model.layers[0]
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    hidden = torch.randn(B, S, SIZES["hidden_size"], dtype=model.dtype, requires_grad=True)
    kinds = model.config.layer_types[:1] if MODELED[model.config.model_type].num_rotary > 1 else []
    cosine_and_sine = model.model.rotary_emb(hidden, torch.arange(S).unsqueeze(0), *kinds)
    given_from_outside = {tensor.untyped_storage().data_ptr() for tensor in cosine_and_sine}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters | given_from_outside:
            kept[address] = tensor
        return tensor

    # Not a leaf: a layer's input is the output of the one below, and nobody else keeps it.
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(hidden * 1, position_embeddings=cosine_and_sine)
    kept.pop(hidden.untyped_storage().data_ptr(), None)  # of the multiplication
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert output.requires_grad
    return total


def model_of(model_type: str, phase: Phase) -> PreTrainedModel:
    """One bf16 layer in its role; nothing outside is trained."""
    config = AutoConfig.for_model(model_type, **SIZES)
    attention = "eager" if MODELED[model_type].eager_attention else "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    attach(model, phase, "model.layers", seed=0)
    if phase.frozen_layers:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name)
    return model


ROLES = {
    "trained": Trained(),
    "frozen": Frozen(),
    **{" ".join(targets): adapted_on(*targets) for targets in (ALL, ("down_proj",), ("q_proj", "v_proj"))},
}


@pytest.mark.parametrize("role", ROLES.values(), ids=ROLES)
@pytest.mark.parametrize("model_type", MODELED)
def test_autograd_saves_what_is_counted(make_phase: Callable[..., Phase], model_type: str, role: Role) -> None:
    planned = layer_activations(workload(model_type), role).saved
    saved = saved_bytes(model_of(model_type, make_phase([role])))
    assert abs(saved - planned) <= 64, "but for a few scalars"


def test_layers_that_do_not_see_all_tokens_before_save_a_mask_each() -> None:
    N = B * S
    for model_type in ("mistral", "gemma3_text"):
        near, far = (replace(workload(model_type), sliding_window=window) for window in (S, S + 1))
        assert (near.mask_bytes, far.mask_bytes) == (S * S, 0), "one for all sequences"
        assert layer_activations(near, Trained()).saved - layer_activations(far, Trained()).saved == 2 * N * S


@pytest.mark.parametrize("slides", [True, False])
@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "qwen2", "qwen3", "smollm3", "llama"])
def test_the_window_is_the_models_own(model_type: str, slides: bool) -> None:
    extra: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if model_type in ("qwen2", "qwen3", "smollm3"):
        extra |= {"sliding_window": 8, "use_sliding_window": slides}
    if model_type.startswith("qwen") and slides:
        extra |= {"max_window_layers": 1}
    if model_type == "mistral" and not slides:
        extra |= {"sliding_window": None}
    if model_type == "gemma3_text" and not slides:
        extra |= {"layer_types": ["full_attention"] * 4}
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = load_config({"model": {"model_type": model_type, "vocab_size": 50, **sizes, "extra": extra}})
    model = AutoConfig.for_model(**config.model.hf_config())
    default = {"mistral": ["sliding_attention"], "llama": []}.get(model_type)
    types = getattr(model, "layer_types", None) or default
    expected = model.sliding_window if "sliding_attention" in types else None
    assert sliding_window(config, shape_from_hf_config(config.model.hf_config())) == expected


def test_materialized_scores_by_hand() -> None:
    N, q, h, d, f = B * S, 32, 4, 32, 80
    scores = N * h * S
    work = workload("gemma2")
    assert (work.num_scores, work.mask_bytes, workload().num_scores) == (scores, 2 * 2 * N * S, 0)
    layer, capless = (layer_activations(each, Trained()) for each in (work, replace(work, caps_scores=False)))
    assert layer.saved - capless.saved == 2 * scores, "the output of the tanh"
    fused = layer_activations(workload("gemma3_text"), Trained()).saved
    of_heads = 8 * N * (32 + 16) + 4 * N * (4 + 2) + 2 * 4 * 8  # gemma3 normalizes queries and keys
    assert layer.saved - (fused - of_heads) == 2 * N * (2 * q - 2 * 16) - 4 * N * h + (2 + 4 + 2) * scores
    # Its output, its gradient and its input's in fp32, beside the tanh's output, query, key and the value's gradient.
    first_norm = 8 * N * d + 4 * N + 4 * d
    held = 2 * N * d + 3 * 2 * N * q + (12 + 2) * scores + first_norm + 2 * N * d
    assert layer.attention_backward == max(held - layer.saved, 0)
    assert layer.attention_gradient == 2 * (q * d + 3 * d * f + 3 * d)


@settings(max_examples=60, deadline=None)
@given(
    model_type=st.sampled_from(list(MODELED)),
    precision=st.sampled_from(["bf16", "fp32"]),
    targets=st.lists(st.sampled_from(ALL), unique=True),
    sequences=st.integers(1, 64),
    length=st.integers(2, 4096),
    trained=st.booleans(),
)
def test_activations_grow_with_tokens_and_training_and_no_number_is_negative(
    model_type: str, precision: str, targets: list[str], sequences: int, length: int, trained: bool
) -> None:
    work = replace(workload(model_type, precision), num_sequences=sequences, sequence_length=length)
    role = Trained() if trained else adapted_on(*targets)
    here = layer_activations(work, role)
    assert min(vars(here).values()) >= 0
    twice = layer_activations(replace(work, num_sequences=2 * sequences), role)
    once = 4 * work.shape.other_layer_parameters if MODELED[model_type].fp32_norm_weights else 0
    assert twice.saved - once == 2 * (here.saved - once), "each sequence is alone"
    longer = layer_activations(replace(work, sequence_length=length + 1), role)
    assert longer.saved > here.saved
    assert here.product_gradient <= here.backward <= here.fetched_backward + here.saved
    assert layer_activations(work, Frozen()).saved <= here.saved
