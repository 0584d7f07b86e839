"""Data classes shared by all modules: frozen, comparable and convertible to and from JSON.

Nothing here computes weights or reads files. ``to_json`` and ``from_json`` work with every class.
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

    Source: ``torch.distributed.fsdp.fully_shard``, which splits along dimension 0 like ``torch.chunk``.
    """
    return -(-shape[0] // num_shards) * prod(shape[1:])


@dataclass(frozen=True)
class LinearShape:
    """One linear module of a Transformer layer, with a weight of shape (out_features, in_features)."""

    name: str  # within the layer, as in Hugging Face: "self_attn.q_proj"
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def last_name(self) -> str:
        """The last component of the name: ``q_proj``."""
        return self.name.rpartition(".")[2]

    @property
    def weights(self) -> int:
        """Parameters without the bias."""
        return self.out_features * self.in_features

    @property
    def num_parameters(self) -> int:
        return self.weights + (self.out_features if self.bias else 0)

    @property
    def shapes(self) -> tuple[TensorShape, ...]:
        """Shapes of the weight and, if there is one, the bias."""
        return ((self.out_features, self.in_features), *(((self.out_features,),) if self.bias else ()))


@dataclass(frozen=True)
class ModelShape:
    """The sizes and names needed to count a model's parameters, without the model itself.

    ``head_parameters`` is 0 if the head is tied to the embeddings.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    tie_word_embeddings: bool
    linears: tuple[LinearShape, ...]
    other_layer_parameters: int  # norms of one layer
    embedding_parameters: int
    final_norm_parameters: int
    head_parameters: int
    layer_prefix: str = "model.layers"
    embedding_modules: tuple[str, ...] = ("model.embed_tokens",)
    final_norm_modules: tuple[str, ...] = ("model.norm",)
    head_modules: tuple[str, ...] = ("lm_head",)  # () if the head has no tensor of its own
    attention_size: int | None = None  # num_attention_heads * head_dim; None: hidden_size
    num_key_value_heads: int | None = None  # None: num_attention_heads
    other_layer_matrices: tuple[int, ...] = ()  # parameters of each matrix of a layer outside its linear modules
    # Tensors outside the layers' linear modules: component ("layer", "embeddings", "final_norm", "head") and shape.
    other_tensors: tuple[tuple[str, TensorShape], ...] = ()  # (): from an older version, which could not shard

    @property
    def outer_patterns(self) -> tuple[str, ...]:
        """Shell-style patterns over the names of the parameters outside the layers."""
        return tuple(f"{name}.*" for name in self.embedding_modules + self.final_norm_modules + self.head_modules)

    @property
    def layer_matrices(self) -> tuple[int, ...]:
        """Parameters of each matrix of one layer."""
        return (*(linear.weights for linear in self.linears), *self.other_layer_matrices)

    @property
    def linear_weights(self) -> int:
        """Parameters of the linear modules of one layer, without biases."""
        return sum(linear.weights for linear in self.linears)

    @property
    def query_size(self) -> int:
        """Width of the queries of all heads together."""
        return self.attention_size or self.hidden_size

    def linear(self, last_name: str) -> LinearShape:
        """The linear module whose name ends with ``last_name``."""
        return next(linear for linear in self.linears if linear.last_name == last_name)

    @property
    def layer_vectors(self) -> int:
        """Parameters of all norms and biases of one layer."""
        return self.other_layer_parameters + sum(linear.out_features for linear in self.linears if linear.bias)

    @cached_property
    def layer_shapes(self) -> tuple[TensorShape, ...]:
        """Shape of every tensor of one layer."""
        return (*(shape for linear in self.linears for shape in linear.shapes), *self.other_shapes("layer"))

    def other_shapes(self, component: str) -> tuple[TensorShape, ...]:
        """Shapes of the tensors of one component in ``other_tensors``."""
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

    A kept layer has one parent, itself in the old model. A new layer has its lower and upper neighbors as parents, and
    lies at ``fraction`` of the way between them (0.5 if it is alone in its gap). A new layer without an upper neighbor
    has one parent.
    """

    parents: tuple[int, ...]
    is_new: bool = False
    fraction: float = 0.0


@dataclass(frozen=True)
class LayerMap:
    """The origin of each layer of the grown model, bottom to top."""

    origins: tuple[LayerOrigin, ...]

    @classmethod
    def identity(cls, num_layers: int) -> LayerMap:
        """The map that keeps every layer and adds none."""
        return cls(tuple(LayerOrigin((index,)) for index in range(num_layers)))

    @property
    def num_layers(self) -> int:
        return len(self.origins)

    @property
    def new_layers(self) -> tuple[int, ...]:
        """Indices of the new layers in the grown model."""
        return tuple(i for i, origin in enumerate(self.origins) if origin.is_new)

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """Indices of the kept layers in the grown model."""
        return tuple(i for i, origin in enumerate(self.origins) if not origin.is_new)


@dataclass(frozen=True)
class MemoryTerm:
    """Bytes of one kind of tensor of one component, on one rank."""

    component: str  # "trained_layers", "frozen_layers", "adapters", "embeddings", "final_norm", "head", ...
    kind: str  # "weights", "gradients", "optimizer" (model state), "activations", "workspace", or one of HOST_KINDS
    num_bytes: int
    formula: str
    num_parameters: int = 0  # over all ranks; 0 if the bytes are not those of parameters


# Kinds of terms in host memory, which device totals exclude.
HOST = "host"  # frozen weights, activations, workspace
HOST_WEIGHTS, HOST_GRADIENTS, HOST_OPTIMIZER = "host_weights", "host_gradients", "host_optimizer"  # trained parameters
HOST_KINDS = (HOST, HOST_WEIGHTS, HOST_GRADIENTS, HOST_OPTIMIZER)


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one rank by term: at one instant, or of the model state alone."""

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
        """Bytes of ``weights``, ``gradients`` and ``optimizer`` without adapters, all ``adapters``, and the ``total``.

        Host memory, if any is used, is listed under ``host`` and is not part of the total.
        """
        kinds = ("weights", "gradients", "optimizer")
        proper = {kind: self.bytes_of(kind=kind) - self.bytes_of("adapters", kind) for kind in kinds}
        adapters = sum(self.bytes_of("adapters", kind) for kind in kinds)
        host = {HOST: self.host_bytes} if self.host_bytes else {}
        return {**proper, "adapters": adapters, "total": self.total_bytes, **host}


@dataclass(frozen=True)
class Instant:
    """A point in time of a phase, and the memory in use then."""

    name: str  # "loss", "backward of layer 23", "optimizer step"
    memory: MemoryEstimate
    in_pass: bool = False  # whether it is part of a forward and backward pass


@dataclass(frozen=True)
class PeakEstimate:
    """The instants at which memory can peak, in chronological order."""

    instants: tuple[Instant, ...]

    @property
    def highest(self) -> Instant:
        """The instant with the most bytes; the first if several are equal."""
        return max(self.instants, key=lambda instant: instant.memory.total_bytes)

    @property
    def highest_in_a_pass(self) -> Instant:
        """The highest instant of a forward and backward pass without an update, as in a dry run."""
        return PeakEstimate(tuple(instant for instant in self.instants if instant.in_pass)).highest

    @property
    def total_bytes(self) -> int:
        return self.highest.memory.total_bytes

    @property
    def host_bytes(self) -> int:
        """Peak bytes in host memory, over all instants."""
        return max(instant.memory.host_bytes for instant in self.instants)


@dataclass(frozen=True)
class LayerProvenance:
    """The history of one layer: the stage in which it was created, and the layers it was created from."""

    born_in_stage: int
    parents: tuple[int, ...]  # indices in the model of the previous stage
    operator: str | None  # None: initialized in stage 1


@dataclass(frozen=True)
class SourceLoss:
    """Loss of one source of a data mixture."""

    nats: float  # summed over ``tokens``
    tokens: int

    def __add__(self, other: SourceLoss) -> SourceLoss:
        return SourceLoss(self.nats + other.nats, self.tokens + other.tokens)


@dataclass(frozen=True)
class TrainState:
    """Training progress. Tokens are input positions, counted over all ranks."""

    stage_index: int  # from 1
    phase_index: int  # from 1, in the schedule
    step: int  # optimizer steps completed in this stage
    phase_step: int  # optimizer steps completed in this phase
    tokens_seen: int  # in the whole run
    skipped_in_a_row: int = 0  # number of most recent steps without an update
    grad_norm: float | None = None  # of the last step with an update, before clipping
    grad_norms: tuple[float, ...] = ()  # of recent steps, if spikes are skipped; see ``training.spikes``
    phase_done: bool = False
    stage_done: bool = False


def to_json(value: Any) -> Any:
    """Convert an object of any class above to plain dicts, lists and numbers."""
    return _adapter(type(value)).dump_python(value, mode="json")  # type: ignore[arg-type]


def from_json(cls: type[T], data: Any) -> T:
    """The inverse of ``to_json``.

    Raises:
        ValueError: ``data`` has missing, unknown or wrongly typed fields.
    """
    return _adapter(cls).validate_python(data)  # type: ignore[arg-type]


@cache
def _adapter(cls: Any) -> Any:
    from pydantic import TypeAdapter  # imported late, as it takes longer to load than the rest of this module

    return TypeAdapter(cls)
