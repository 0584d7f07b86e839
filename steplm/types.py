"""The values that travel between the parts: frozen, comparable, JSON in and out.

Nothing here computes weights or reads files. ``to_json`` and ``from_json`` work on every class.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import prod
from typing import Any, TypeVar

SCHEMA_VERSION = 2

T = TypeVar("T")

TensorShape = tuple[int, ...]


def local_size(shape: TensorShape, num_shards: int) -> int:
    """Parameters of a tensor on the first of the ranks that share it: ``⌈rows / num_shards⌉`` rows; no rank has more.

    Source: ``torch.distributed.fsdp.fully_shard``, which cuts along dimension 0 as ``torch.chunk`` does.
    """
    return -(-shape[0] // num_shards) * prod(shape[1:])


@dataclass(frozen=True)
class LinearShape:
    """One linear map of a Transformer layer, weight of shape (out_features, in_features)."""

    name: str  # below the layer, in Hugging Face spelling: "self_attn.q_proj"
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def num_parameters(self) -> int:
        return self.out_features * self.in_features + (self.out_features if self.bias else 0)

    @property
    def shapes(self) -> tuple[TensorShape, ...]:
        """Of the weight and, where there is one, the bias."""
        return ((self.out_features, self.in_features), *(((self.out_features,),) if self.bias else ()))


@dataclass(frozen=True)
class ModelShape:
    """The numbers that are needed to count parameters. Not a model.

    ``head_parameters`` is 0 where the head shares the embeddings' tensor.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    tie_word_embeddings: bool
    linears: tuple[LinearShape, ...]
    other_layer_parameters: int  # norms, one layer
    embedding_parameters: int
    final_norm_parameters: int
    head_parameters: int
    layer_prefix: str = "model.layers"
    embedding_modules: tuple[str, ...] = ("model.embed_tokens",)
    final_norm_modules: tuple[str, ...] = ("model.norm",)
    head_modules: tuple[str, ...] = ("lm_head",)  # () where the head has no tensor of its own
    attention_size: int | None = None  # num_attention_heads * head_dim; None: hidden_size
    num_key_value_heads: int | None = None  # None: num_attention_heads
    other_layer_matrices: tuple[int, ...] = ()  # parameters of each matrix of a layer that is no linear map
    # What is no linear map of a layer: its component ("layer", "embeddings", "final_norm", "head") and its shape.
    other_tensors: tuple[tuple[str, TensorShape], ...] = ()  # (): an older version's, which divided nothing

    @property
    def outer_patterns(self) -> tuple[str, ...]:
        """Shell-style patterns over the names of the parameters outside the layers."""
        return tuple(f"{name}.*" for name in self.embedding_modules + self.final_norm_modules + self.head_modules)

    @property
    def layer_matrices(self) -> tuple[int, ...]:
        """Parameters of each matrix of one layer."""
        return (*(linear.in_features * linear.out_features for linear in self.linears), *self.other_layer_matrices)

    @property
    def layer_vectors(self) -> int:
        """Parameters of all norms and biases of one layer."""
        return self.other_layer_parameters + sum(linear.out_features for linear in self.linears if linear.bias)

    @cached_property
    def layer_shapes(self) -> tuple[TensorShape, ...]:
        """Shape of every tensor of one layer."""
        return (*(shape for linear in self.linears for shape in linear.shapes), *self.other_shapes("layer"))

    def other_shapes(self, component: str) -> tuple[TensorShape, ...]:
        """Shapes of the tensors of a component of ``other_tensors``."""
        return tuple(shape for name, shape in self.other_tensors if name == component)

    @property
    def layer_parameters(self) -> int:
        """P_layer: parameters of one Transformer layer."""
        return sum(self.layer_matrices) + self.layer_vectors

    @property
    def outer_parameters(self) -> int:
        """Parameters outside the layers: embeddings, final norm, head."""
        return self.embedding_parameters + self.final_norm_parameters + self.head_parameters

    def num_parameters(self, num_layers: int | None = None) -> int:
        """All parameters of a model of ``num_layers`` layers (default: the full depth)."""
        depth = self.num_hidden_layers if num_layers is None else num_layers
        return depth * self.layer_parameters + self.outer_parameters


@dataclass(frozen=True)
class LayerOrigin:
    """Where one layer of the grown model comes from.

    A kept layer has one parent, itself in the old model. A new layer has the lower and the upper
    neighbour as parents, and stands at ``fraction`` of the way between them (0.5 where it is alone
    in its gap); a new layer without an upper neighbour has one parent.
    """

    parents: tuple[int, ...]
    is_new: bool = False
    fraction: float = 0.0


@dataclass(frozen=True)
class LayerMap:
    """For each layer of the grown model, bottom to top, its origin in the old one."""

    origins: tuple[LayerOrigin, ...]

    @classmethod
    def identity(cls, num_layers: int) -> LayerMap:
        """Every layer kept, none new."""
        return cls(tuple(LayerOrigin((index,)) for index in range(num_layers)))

    @property
    def num_layers(self) -> int:
        return len(self.origins)

    @property
    def new_layers(self) -> tuple[int, ...]:
        """Indices, in the grown model, of the layers that are new."""
        return tuple(i for i, origin in enumerate(self.origins) if origin.is_new)

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Indices, in the grown model, of the layers that were there before."""
        return tuple(i for i, origin in enumerate(self.origins) if not origin.is_new)


@dataclass(frozen=True)
class AdapterSpec:
    """Adapters of one stage: LoRA of ``rank`` on each of ``target_modules`` in each of ``layers``."""

    method: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]  # last part of the module's name: "q_proj"
    layers: tuple[int, ...]
    embeddings: bool = False  # also on the embeddings and the head

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class MemoryTerm:
    """Bytes of one kind of tensor of one component, on one rank."""

    component: str  # "new_layers", "frozen_layers", "adapters", "embeddings", "final_norm", "head", ...
    kind: str  # model state: "weights", "gradients", "optimizer"; beside it: "activations", "workspace", HOST
    num_bytes: int
    formula: str
    num_parameters: int = 0  # on all ranks together; 0 where the bytes are not those of parameters


HOST = "host"  # the kind of a term in the host's memory, no part of any total


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device at one instant, or of one stage's model state; per rank, by term."""

    terms: tuple[MemoryTerm, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes on the device."""
        return sum(term.num_bytes for term in self.terms if term.kind != HOST)

    def bytes_of(self, component: str | None = None, kind: str | None = None) -> int:
        """Bytes of the terms with this component and this kind (``None``: any)."""
        return sum(
            term.num_bytes for term in self.terms if component in (None, term.component) and kind in (None, term.kind)
        )

    def by_kind(self) -> dict[str, int]:
        """Bytes of the model proper as ``weights``, ``gradients``, ``optimizer``; all ``adapters``; the ``total``.

        And what is in ``host`` memory, where there is any, which is no part of the total.
        """
        proper = {
            kind: self.bytes_of(kind=kind) - self.bytes_of("adapters", kind)
            for kind in ("weights", "gradients", "optimizer")
        }
        host = {HOST: self.bytes_of(kind=HOST)} if self.bytes_of(kind=HOST) else {}
        return {**proper, "adapters": self.bytes_of("adapters"), "total": self.total_bytes, **host}


@dataclass(frozen=True)
class Instant:
    """One moment of a stage and all that the device then holds."""

    name: str  # "loss", "backward of layer 23", "optimizer step"
    memory: MemoryEstimate
    in_pass: bool = False  # in a forward and backward pass


@dataclass(frozen=True)
class PeakEstimate:
    """The moments of a stage at which its memory can be highest, in the order of time."""

    instants: tuple[Instant, ...]

    @property
    def highest(self) -> Instant:
        """The first of those with the most bytes."""
        return max(self.instants, key=lambda instant: instant.memory.total_bytes)

    @property
    def highest_in_a_pass(self) -> Instant:
        """The same of a forward and backward pass without an update: that of a dry run."""
        return PeakEstimate(tuple(instant for instant in self.instants if instant.in_pass)).highest

    @property
    def total_bytes(self) -> int:
        return self.highest.memory.total_bytes


@dataclass(frozen=True)
class Stage:
    """What one stage trains, on which model, for how long, in how many bytes."""

    index: int  # from 1
    num_new_layers: int  # 0: this stage grows nothing, and begins adapters anew
    num_hidden_layers: int  # after growth
    layer_map: LayerMap | None  # None: this stage starts from fresh or given weights
    frozen_layers: tuple[int, ...]  # not trained as a whole; they may have adapters
    trained_patterns: tuple[str, ...]  # shell-style patterns over parameter names
    adapters: AdapterSpec | None
    scheduled_tokens: int  # the learning-rate schedule runs over these
    tokens: int  # the stage stops after these
    memory: MemoryEstimate  # the model state
    peak: PeakEstimate | None = None  # all that the device holds; None where the family's layers are not known
    flops_per_token: int = 0  # of training
    num_growths: int = 0  # up to here: the entry of the configuration's lists of one value a stage
    schedule_start_tokens: int = 0  # of the schedule, that have passed when this stage begins
    low_rank_layers: tuple[int, ...] = ()  # of those trained as a whole; their matrices have low-rank states

    @property
    def whole_layers(self) -> tuple[int, ...]:
        """Indices of the layers that are trained as a whole."""
        return tuple(sorted(set(range(self.num_hidden_layers)) - set(self.frozen_layers)))

    @property
    def grows(self) -> bool:
        """Whether layers are added to an older model at its beginning."""
        return self.layer_map is not None and self.num_new_layers > 0

    @property
    def device_bytes(self) -> int:
        """The peak, or the model state where no more is known."""
        return self.memory.total_bytes if self.peak is None else self.peak.total_bytes


@dataclass(frozen=True)
class Plan:
    """The stages of a run and what they cost. Training obeys it."""

    shape: ModelShape
    precision: str  # "bf16" or "fp32"
    stages: tuple[Stage, ...]
    proved_optimal: bool
    vanilla_model_state_bytes: int
    vanilla_peak_bytes: int | None = None  # on the same batches, without any memory option
    schema_version: int = SCHEMA_VERSION

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def layers(self) -> tuple[int, ...]:
        """n_1 … n_K."""
        return tuple(stage.num_new_layers for stage in self.stages if stage.num_new_layers)

    @property
    def total_tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def training_flops(self) -> int:
        """Of all stages, without evaluation and without what is computed again."""
        return sum(stage.tokens * stage.flops_per_token for stage in self.stages)

    @property
    def peak_model_state_bytes(self) -> int:
        return max(stage.memory.total_bytes for stage in self.stages)

    @property
    def peak_bytes(self) -> int | None:
        """All bytes on the device, in the stage that has the most; None where the family is not modelled."""
        peaks = [stage.peak.total_bytes for stage in self.stages if stage.peak is not None]
        return max(peaks) if len(peaks) == self.num_stages else None

    @property
    def reduction(self) -> float:
        """Share of vanilla's model-state bytes that this plan saves, 0 … 1."""
        return 1.0 - self.peak_model_state_bytes / self.vanilla_model_state_bytes

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits of all that training obeys; bytes are not among it: they follow the devices."""
        return self.hash_until(self.num_stages)

    def hash_until(self, stage_index: int) -> str:
        """The same of the stages up to this one, as if the run ended there: plans that begin alike share it."""
        stages = [to_json(stage) for stage in self.stages[:stage_index]]
        for stage, made in zip(stages, self.stages, strict=False):
            del stage["memory"], stage["peak"]  # they depend on devices and micro-batch, which may change at a resume
            if made.low_rank_layers in ((), made.whole_layers):
                del stage["low_rank_layers"]  # no choice among layers: the hash is as before there was one
        shape = to_json(replace(self.shape, num_hidden_layers=self.stages[stage_index - 1].num_hidden_layers))
        text = json.dumps({"shape": shape, "precision": self.precision, "stages": stages}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LayerProvenance:
    """The history of one layer: the stage it was born in and the layers it was made of."""

    born_in_stage: int
    parents: tuple[int, ...]  # indices in the model of the stage before
    operator: str | None  # None: initialised in stage 1


@dataclass(frozen=True)
class TrainState:
    """Progress, and nothing else. Tokens count input positions, over all ranks."""

    stage_index: int  # from 1
    step: int  # optimizer steps done in this stage
    stage_tokens_seen: int
    tokens_seen: int  # in the whole run
    stage_done: bool = False


def to_json(value: Any) -> Any:
    """Plain dicts, lists and numbers from any of the classes above."""
    return _adapter(type(value)).dump_python(value, mode="json")  # type: ignore[arg-type]


def from_json(cls: type[T], data: Any) -> T:
    """The inverse of ``to_json``.

    Raises:
        ValueError: ``data`` has missing, unknown or ill-typed fields.
    """
    return _adapter(cls).validate_python(data)  # type: ignore[arg-type]


@cache
def _adapter(cls: Any) -> Any:
    from pydantic import TypeAdapter  # takes longer to load than all of this file

    return TypeAdapter(cls)
