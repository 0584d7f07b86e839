"""The values that travel between the parts: frozen, comparable, JSON in and out.

Nothing here computes weights or reads files. ``to_json`` and ``from_json`` work on every class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from typing import Any, TypeVar

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
class MemoryTerm:
    """Bytes of one kind of tensor of one component, on one rank."""

    component: str  # "trained_layers", "frozen_layers", "adapters", "embeddings", "final_norm", "head", ...
    kind: str  # model state: "weights", "gradients", "optimizer"; beside it: "activations", "workspace"; HOST_KINDS
    num_bytes: int
    formula: str
    num_parameters: int = 0  # on all ranks together; 0 where the bytes are not those of parameters


# Kinds of terms in the host's memory, no part of any total of the device.
HOST = "host"  # frozen weights, activations, workspace
HOST_WEIGHTS, HOST_GRADIENTS, HOST_OPTIMIZER = "host_weights", "host_gradients", "host_optimizer"  # of what is trained
HOST_KINDS = (HOST, HOST_WEIGHTS, HOST_GRADIENTS, HOST_OPTIMIZER)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device at one instant, or of one stage's model state; per rank, by term."""

    terms: tuple[MemoryTerm, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes on the device."""
        return sum(term.num_bytes for term in self.terms if term.kind not in HOST_KINDS)

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(term.num_bytes for term in self.terms if term.kind in HOST_KINDS)

    def bytes_of(self, component: str | None = None, kind: str | None = None) -> int:
        """Bytes of the terms with this component and this kind (``None``: any)."""
        return sum(
            term.num_bytes for term in self.terms if component in (None, term.component) and kind in (None, term.kind)
        )

    def by_kind(self) -> dict[str, int]:
        """Bytes of the model proper as ``weights``, ``gradients``, ``optimizer``; all ``adapters``; the ``total``.

        And what is in ``host`` memory, where there is any, which is no part of the total.
        """
        kinds = ("weights", "gradients", "optimizer")
        proper = {kind: self.bytes_of(kind=kind) - self.bytes_of("adapters", kind) for kind in kinds}
        adapters = sum(self.bytes_of("adapters", kind) for kind in kinds)
        host = {HOST: self.host_bytes} if self.host_bytes else {}
        return {**proper, "adapters": adapters, "total": self.total_bytes, **host}


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

    @property
    def host_bytes(self) -> int:
        """The most bytes in host memory, at any of the moments."""
        return max(instant.memory.host_bytes for instant in self.instants)


@dataclass(frozen=True)
class LayerProvenance:
    """The history of one layer: the stage it was born in and the layers it was made of."""

    born_in_stage: int
    parents: tuple[int, ...]  # indices in the model of the stage before
    operator: str | None  # None: initialised in stage 1


@dataclass(frozen=True)
class SourceLoss:
    """Of one source of a mixture."""

    nats: float  # the sum of the losses of
    tokens: int

    def __add__(self, other: SourceLoss) -> SourceLoss:
        return SourceLoss(self.nats + other.nats, self.tokens + other.tokens)


@dataclass(frozen=True)
class TrainState:
    """Progress, and nothing else. Tokens count input positions, over all ranks."""

    stage_index: int  # from 1
    phase_index: int  # from 1, in the schedule
    step: int  # optimizer steps done in this stage
    phase_step: int  # optimizer steps done in this phase
    tokens_seen: int  # in the whole run
    skipped_in_a_row: int = 0  # the last steps, without an update
    grad_norm: float | None = None  # of the last step that was updated, before clipping
    grad_norms: tuple[float, ...] = ()  # of the last steps, where spikes are skipped; see ``training.spikes``
    phase_done: bool = False
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
