"""``ModelShape`` from Hugging Face configuration keys, without torch and without a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steplm.errors import ConfigError
from steplm.types import LinearShape, ModelShape
from steplm.units import nearest


@dataclass(frozen=True)
class Family:
    """How a Hugging Face model type differs from the plain Llama layer.

    ``defaults`` are the values of keys that a configuration leaves out. They include ``attention_bias`` and
    ``mlp_bias`` only if the family reads them.
    """

    defaults: Mapping[str, Any]
    qkv_bias: bool = False  # True: always present, regardless of the configuration
    qk_norm: str = "none"  # "head": over one head; "all": over all heads together
    norms_per_layer: int = 2  # each with hidden_size parameters
    final_norm: bool = True
    fused: bool = False  # qkv_proj and gate_up_proj


def _defaults(vocab: int, hidden: int, feed_forward: int, layers: int, heads: int, **rest: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": None,  # num_attention_heads
        "head_dim": None,  # hidden_size / num_attention_heads
        "tie_word_embeddings": False,
        **rest,
    }


FAMILIES: dict[str, Family] = {
    "llama": Family(_defaults(32000, 4096, 11008, 32, 32, attention_bias=False, mlp_bias=False)),
    "mistral": Family(_defaults(32000, 4096, 14336, 32, 32, num_key_value_heads=8)),
    "qwen2": Family(_defaults(151936, 4096, 22016, 32, 32, num_key_value_heads=32), qkv_bias=True),
    "qwen3": Family(
        _defaults(151936, 4096, 22016, 32, 32, num_key_value_heads=32, head_dim=128, attention_bias=False),
        qk_norm="head",
    ),
    "gemma": Family(
        _defaults(
            256000, 3072, 24576, 28, 16,
            num_key_value_heads=16, head_dim=256, tie_word_embeddings=True, attention_bias=False,
        )
    ),
    "gemma2": Family(
        _defaults(
            256000, 2304, 9216, 26, 8,
            num_key_value_heads=4, head_dim=256, tie_word_embeddings=True, attention_bias=False,
        ),
        norms_per_layer=4,
    ),
    "gemma3_text": Family(
        _defaults(
            262208, 2304, 9216, 26, 8,
            num_key_value_heads=4, head_dim=256, tie_word_embeddings=True, attention_bias=False,
        ),
        norms_per_layer=4,
        qk_norm="head",
    ),
    "granite": Family(_defaults(32000, 4096, 11008, 32, 32, attention_bias=False, mlp_bias=False)),
    "olmo": Family(
        _defaults(50304, 4096, 11008, 32, 32, attention_bias=False),
        norms_per_layer=0,
        final_norm=False,
    ),
    "olmo2": Family(_defaults(50304, 4096, 11008, 32, 32, attention_bias=False), qk_norm="all"),
    "phi3": Family(_defaults(32064, 3072, 8192, 32, 32), fused=True),
    "smollm3": Family(
        _defaults(
            128256, 2048, 11008, 36, 16,
            num_key_value_heads=4, tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
        )
    ),
}  # fmt: skip


def shape_from_hf_config(values: Mapping[str, Any]) -> ModelShape:
    """Count the parameters of the model that ``transformers`` builds from these configuration keys.

    Missing keys take the family's own Hugging Face defaults. Keys that do not change the number of
    parameters are ignored.

    Raises:
        ConfigError: ``model_type`` is unknown, or sizes are invalid or not divisible as required.
    """
    model_type = values.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        hint = nearest(str(model_type), FAMILIES, otherwise="")
        raise ConfigError(
            f"parameters of the model type {model_type!r} cannot be counted without the model.{hint} "
            f"Known: {', '.join(FAMILIES)}. For any other decoder-only family of transformers, pass "
            "shape=steplm.models.shape.shape_from_model(model) to plan().",
            model_type=model_type,
        )
    known = {**family.defaults, **{key: values[key] for key in family.defaults if key in values}}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        _require_positive(key, known[key])

    hidden, heads = known["hidden_size"], known["num_attention_heads"]
    kv_heads = heads if known["num_key_value_heads"] is None else known["num_key_value_heads"]
    _require_positive("num_key_value_heads", kv_heads)
    _require_divisible("hidden_size", hidden, "num_attention_heads", heads)
    _require_divisible("num_attention_heads", heads, "num_key_value_heads", kv_heads)
    head_dim = hidden // heads if known["head_dim"] is None else known["head_dim"]
    _require_positive("head_dim", head_dim)
    if head_dim % 2:
        raise ConfigError(
            f"head_dim is {head_dim}, but rotary position embeddings need an even number "
            f"(hidden_size={hidden}, num_attention_heads={heads}).",
            head_dim=head_dim,
        )

    query_size, kv_size = heads * head_dim, kv_heads * head_dim
    qk_norm = {"none": (), "head": (head_dim, head_dim), "all": (query_size, kv_size)}[family.qk_norm]
    norms = (*[hidden] * family.norms_per_layer, *qk_norm)
    matrix, tied = (known["vocab_size"], hidden), bool(known["tie_word_embeddings"])
    embeddings = known["vocab_size"] * hidden
    others = [*(("layer", (size,)) for size in norms), ("embeddings", matrix)]
    others += [("final_norm", (hidden,))] * family.final_norm + [("head", matrix)] * (not tied)
    return ModelShape(
        model_type=str(model_type),
        vocab_size=known["vocab_size"],
        hidden_size=hidden,
        num_hidden_layers=known["num_hidden_layers"],
        num_attention_heads=heads,
        tie_word_embeddings=tied,
        linears=_linears(family, known, query_size, kv_size),
        other_layer_parameters=sum(norms),
        embedding_parameters=embeddings,
        final_norm_parameters=hidden if family.final_norm else 0,
        head_parameters=0 if tied else embeddings,
        final_norm_modules=("model.norm",) if family.final_norm else (),
        head_modules=() if tied else ("lm_head",),
        attention_size=query_size,
        num_key_value_heads=kv_heads,
        other_tensors=tuple(sorted(others)),
    )


def _linears(family: Family, known: Mapping[str, Any], query_size: int, kv_size: int) -> tuple[LinearShape, ...]:
    """The linear layers of one Transformer layer, in the model's module order."""
    hidden, feed_forward = known["hidden_size"], known["intermediate_size"]
    attention_bias, mlp_bias = bool(known.get("attention_bias")), bool(known.get("mlp_bias"))
    if family.fused:
        return (
            LinearShape("self_attn.o_proj", query_size, hidden),
            LinearShape("self_attn.qkv_proj", hidden, query_size + 2 * kv_size),
            LinearShape("mlp.gate_up_proj", hidden, 2 * feed_forward),
            LinearShape("mlp.down_proj", feed_forward, hidden),
        )
    qkv_bias = attention_bias or family.qkv_bias
    return (
        LinearShape("self_attn.q_proj", hidden, query_size, qkv_bias),
        LinearShape("self_attn.k_proj", hidden, kv_size, qkv_bias),
        LinearShape("self_attn.v_proj", hidden, kv_size, qkv_bias),
        LinearShape("self_attn.o_proj", query_size, hidden, attention_bias),
        LinearShape("mlp.gate_proj", hidden, feed_forward, mlp_bias),
        LinearShape("mlp.up_proj", hidden, feed_forward, mlp_bias),
        LinearShape("mlp.down_proj", feed_forward, hidden, mlp_bias),
    )


def _require_positive(key: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"model.{key} must be a whole number of at least 1, not {value!r}.", key=key, value=value)


def _require_divisible(key: str, value: int, divisor_key: str, divisor: int) -> None:
    if value % divisor:
        raise ConfigError(
            f"model.{key}={value} is not divisible by {divisor_key}={divisor}.",
            **{key: value, divisor_key: divisor},
        )
