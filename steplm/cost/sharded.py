"""Memory of one rank when PyTorch's FSDP2 shards the model: shards, all-gathers, reduce-scatters.

FSDP2 gathers and reduces tensors in groups: one group per layer, and one for everything outside the layers, which stays
gathered for a whole forward or backward pass. Let n be the number of ranks that share one copy of the model, P the
parameters of a group with the rows of each tensor padded to a multiple of n, T the trained ones among them, and w the
bytes per element:

    gathered                    w P        while a group computes
    all-gather                  w P        receive buffer, copied into the gathered weights: of the group itself in a
                                           forward pass, of the next group in a backward pass
    gradients                   w T        unsharded, until they are reduced
    reduce-scatter, in          4 T        in fp32, until the next group's begins
    reduce-scatter, out         4 T / n    and w T / n if it is rounded
    all-reduce                  4 T / n    between copies of the model, for every group until the backward pass ends

This follows ``torch/distributed/fsdp/_fully_shard`` of PyTorch 2.13 and was checked tensor by tensor on a CPU, where
nothing is sent (``tests/cost/test_sharded.py``). It is not confirmed on an accelerator, whose allocator may hold more
for its streams.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import product
from math import prod

from steplm.config import RunConfig
from steplm.cost.activations import norm_backward, norm_saved
from steplm.cost.peak import Instants
from steplm.cost.terms import WEIGHT_BYTES, adapter_shapes, component_of, embedding_adapter_shapes
from steplm.schedule import Adapter, Phase, Role, Trained
from steplm.types import Instant, MemoryEstimate, MemoryTerm, ModelShape, TensorShape, local_size

REDUCED_BYTES = 4  # per gradient element in a reduction: fp32
GATHERED, COMMUNICATION = "gathered", "communication"  # components


@dataclass(frozen=True)
class Group:
    """Tensors that are gathered together; see the table in the module docstring."""

    shapes: tuple[TensorShape, ...]
    trained: tuple[TensorShape, ...]  # those that get gradients, in the model's order
    num_shards: int
    num_replicas: int
    width: int  # bytes per parameter, and per gradient element

    @cached_property
    def local_parameters(self) -> int:
        """``P / n``."""
        return sum(local_size(shape, self.num_shards) for shape in self.shapes)

    @cached_property
    def local_trained(self) -> int:
        """``T / n``."""
        return sum(local_size(shape, self.num_shards) for shape in self.trained)

    @property
    def gathered_bytes(self) -> int:
        """``w P``; FSDP2 makes this copy even with a single shard."""
        return self.width * self.num_shards * self.local_parameters

    @property
    def all_gather_bytes(self) -> int:
        """``w P``; 0 with a single shard."""
        return self.gathered_bytes if self.num_shards > 1 else 0

    @cached_property
    def gradient_bytes(self) -> int:
        """``w T``, without padding rows."""
        return self.width * sum(prod(shape) for shape in self.trained)

    @property
    def reduce_input_bytes(self) -> int:
        """``4 T``."""
        return REDUCED_BYTES * self.num_shards * self.local_trained

    @property
    def reduction_bytes(self) -> int:
        """Peak of a reduction: ``4 T``, plus either ``w T`` or the output.

        Along with the output, PyTorch holds the last gradient of the group or, with a single shard, a scaled copy of
        the input.
        """
        out, rounded = REDUCED_BYTES * self.local_trained, self.width * self.local_trained
        if self.num_shards == 1:
            out *= 2
        elif self.trained:
            out += self.width * prod(self.trained[-1]) + rounded * (self.width < REDUCED_BYTES)
        return self.reduce_input_bytes + max(self.gradient_bytes, out)

    @property
    def all_reduce_bytes(self) -> int:
        """``4 T / n``; 0 with a single copy of the model."""
        return REDUCED_BYTES * self.local_trained if self.num_replicas > 1 else 0


@dataclass(frozen=True)
class Groups:
    """All groups of a model in one phase."""

    layers: dict[Role, Group]
    plain_layer: Group  # fully trained
    outer: Group
    plain_outer: Group  # without adapters

    @classmethod
    def of(cls, config: RunConfig, shape: ModelShape, phase: Phase) -> Groups:
        """The groups that FSDP2 gathers in a phase."""
        n, width = config.distributed.num_shards, WEIGHT_BYTES[config.train.precision]

        def group(shapes: tuple[TensorShape, ...], trained: tuple[TensorShape, ...]) -> Group:
            return Group(shapes, trained, n, config.distributed.world_size // n, width)

        layer, frozen = shape.layer_shapes, shape.layer_shapes
        if config.memory.packs_frozen:  # then the matrices of frozen layers are not parameters
            biases = tuple((linear.out_features,) for linear in shape.linears if linear.bias)
            frozen = (*biases, *shape.other_shapes("layer"))

        def group_of(role: Role) -> Group:
            if isinstance(role, Trained):
                return group(layer, layer)
            factors = adapter_shapes(shape, role) if isinstance(role, Adapter) else ()
            return group((*frozen, *factors), factors)

        embeddings, norm, head = (shape.other_shapes(name) for name in ("embeddings", "final_norm", "head"))
        plain, outside = (*embeddings, *norm, *head), phase.embeddings_and_head
        factors = embedding_adapter_shapes(shape, outside.rank) if isinstance(outside, Adapter) else ()
        head_factors = factors if head else ()
        trained: tuple[TensorShape, ...] = ()
        if isinstance(outside, Trained):
            trained = plain
        elif isinstance(outside, Adapter):
            trained = (*factors, *norm, *head_factors)
        return cls(
            {role: group_of(role) for role in phase.groups},
            group(layer, layer),
            group((*plain, *factors, *head_factors), trained),
            group(plain, ()),
        )


class ShardedInstants(Instants):
    """The instants of one rank: as on one device, but with shards, gathered weights and communication buffers."""

    def __init__(self, config: RunConfig, shape: ModelShape, phase: Phase, state: MemoryEstimate | None = None) -> None:
        super().__init__(config, shape, phase, state)
        self.groups = Groups.of(config, shape, phase)
        self.frees_gradients = False  # gradients stay unsharded until they are reduced

    def in_order(self, *, grows: bool) -> tuple[Instant, ...]:
        growth = (self.growth(),) if grows else ()
        forward = (self.gathering(), self.loss(), self.gathering_again())
        backward = (self.final_norm(), self.highest_layer(), self.embeddings(), self.outer_reduction())
        return (*growth, *forward, *backward, self.update(), self.evaluation())

    def growth(self) -> Instant:
        """The loss probe on the grown model's plain weights, which are sharded too."""
        outer, layer = self.groups.plain_outer, self.groups.plain_layer
        return _with(super().growth(), [_gathered("P_outer", outer), _gathered("P_layer", layer), _arriving(layer)])

    def gathering(self) -> Instant:
        """The start of the forward pass: the embedding lookup, while the first layer is gathered."""
        outer, layer = self.groups.outer, self._group(0)
        terms = [self._outer, _arriving(outer, "P_outer"), _arriving(layer)]
        terms.append(MemoryTerm("embeddings", "workspace", self.work.stream_bytes, "hidden states: w N d"))
        return self._instant("first all-gather", 0, terms, self._all_gradients() if self.sums_gradients else [])

    def loss(self) -> Instant:
        """The loss, which is part of the forward pass: the last layer's all-gather buffer is freed after it."""
        return _with(super().loss(), [self._outer, _arriving(self._group(self.num_layers - 1))])

    def gathering_again(self) -> Instant:
        """The start of the backward pass: everything outside the layers is gathered again."""
        streams = 2 if isinstance(self.outside, Adapter) else 1  # the head's adapter needs its input again
        terms = [
            self._outer,
            _arriving(self.groups.outer, "P_outer"),
            MemoryTerm("loss", "activations", self._final_norm_saved(), "final norm: 4 N d + w N d"),
            MemoryTerm("loss", "workspace", streams * self.work.stream_bytes, "gradient of the hidden states: w N d"),
        ]
        top = self.num_layers
        return self._instant("second all-gather", top, terms, self._gradients_above(top))

    def final_norm(self) -> Instant:
        """The backward pass of the final norm, while the last layer is gathered."""
        return _with(super().final_norm(), [self._outer, _arriving(self._group(self.num_layers - 1))])

    def highest_layer(self) -> Instant:
        """The peak over all layers: inside the backward pass, at its end, or when the gradients are reduced."""
        around = (self._layer, self._end_of_layer, self._reduction_of_layer)
        # The memory of a layer and its neighbors depends only on their kinds.
        inside = cache(lambda moment, index: sum(term.num_bytes for term in around[moment](index)[2]))
        alike: dict[tuple[Role | None, ...], int] = {}
        kept = {kind: 0 if self.memory.offload_activations else self.kept[kind] for kind in self.kinds}
        left = {
            kind: self._gradients_of_one(kind) * (not self.sums_gradients) + self._held_of_one(kind)
            for kind in self.kinds
        }

        def held(index: int, moment: int) -> int:
            near = (index, index - 1, index + 1)
            kinds = tuple(self.roles[i] if 0 <= i < self.num_layers else None for i in near)
            num_bytes = inside(moment, alike.setdefault(kinds, index))
            for kind in self.kinds:
                num_bytes += kept[kind] * self._saving(kind, index if moment else index + 1)
                num_bytes += left[kind] * self._above(kind, index + 1)
            return num_bytes

        index, moment = max(product(self._candidates(), range(len(around))), key=lambda found: held(*found))
        name, num_below, terms = around[moment](index)
        return self._instant(name, num_below, terms, self._gradients_above(index + 1))

    def embeddings(self) -> Instant:
        """The end of the backward pass, with unsharded gradients of everything outside the layers."""
        width, tied = self.work.width, self.shape.tie_word_embeddings
        terms = [
            self._outer,
            self._left_over,
            _being_reduced(self._group(self.unreached)),
            MemoryTerm("embeddings", "workspace", self.work.stream_bytes, "gradient of the hidden states: w N d"),
            MemoryTerm("outer", "gradients", self.groups.outer.gradient_bytes, "whole: w T"),
        ]
        if tied and self.trains_outside:
            terms.append(MemoryTerm("embeddings", "gradients", self.matrix * width, "the head's part: w V d"))
        return self._instant("backward of the embeddings", 0, terms, self._reduced_above(0))

    def outer_reduction(self) -> Instant:
        """The last reduction: gradients of everything outside the layers."""
        terms = [self._left_over, self._reduction(self.groups.outer)]
        return self._instant("reduction of the embeddings", 0, terms, self._reduced_above(0))

    def evaluation(self) -> Instant:
        """A forward pass that saves nothing for a backward pass."""
        largest = max((self.groups.layers[kind] for kind in self.kinds), key=lambda group: group.gathered_bytes)
        return _with(super().evaluation(), [self._outer, _gathered("P_layer", largest), _arriving(largest)])

    def _layer(self, index: int) -> tuple[str, int, list[MemoryTerm]]:
        """Inside a layer's backward pass: name, number of layers with saved activations, and other terms."""
        return f"backward of layer {index}", index + 1, [*self._whole(index), *self._inside(index)]

    def _end_of_layer(self, index: int) -> tuple[str, int, list[MemoryTerm]]:
        """The end of a layer's backward pass, in its first norm, when all of its gradients exist."""
        kind, stream = self.roles[index], self.work.stream_bytes
        component = component_of(kind)
        saved = norm_saved(self.work, trained=isinstance(kind, Trained)) + stream * self.recomputes[kind]
        terms = [
            *self._whole(index),
            MemoryTerm(component, "activations", saved, "first norm: 4 N d + w N d"),
            MemoryTerm(component, "workspace", norm_backward(self.work) + stream, "16 N d + 2 w N d"),
            MemoryTerm(component, "gradients", self._gradients_inside(kind), f"of layer {index}, whole: w T"),
        ]
        return f"end of the backward of layer {index}", index, terms

    def _reduction_of_layer(self, index: int) -> tuple[str, int, list[MemoryTerm]]:
        """The reduction of a layer's gradients, after its gathered weights are freed."""
        terms = [self._outer, *self._next(index), self._reduction(self._group(index), self.roles[index])]
        stream = self.work.stream_bytes
        terms.append(
            MemoryTerm(component_of(self.roles[index]), "workspace", stream, "gradient of the hidden states: w N d")
        )
        return f"reduction of layer {index}", index, terms

    def _whole(self, index: int) -> list[MemoryTerm]:
        """A gathered layer, the all-gather of the next one, and the reduction of the previous one's gradients."""
        reducing = [_being_reduced(self._group(index + 1))] if index + 1 < self.num_layers else []
        return [self._outer, _gathered("P_layer", self._group(index)), *self._next(index), *reducing]

    def _next(self, index: int) -> list[MemoryTerm]:
        return [_arriving(self._group(index - 1))] if index else []

    @property
    def _outer(self) -> MemoryTerm:
        return _gathered("P_outer", self.groups.outer)

    @property
    def _left_over(self) -> MemoryTerm:
        """The all-gather of a layer that the backward pass does not reach but FSDP2 prefetches."""
        group = self._group(self.unreached - 1) if self.unreached else self.groups.outer
        return _arriving(group) if self.unreached else MemoryTerm(COMMUNICATION, "workspace", 0, "")

    def _group(self, index: int) -> Group:
        return self.groups.layers[self.roles[index]]

    def _reduction(self, group: Group, kind: Role | None = None) -> MemoryTerm:
        """Workspace of reducing a group's gradients; ``kind`` is the role of its layer, if it is a layer."""
        num_bytes, formula = group.reduction_bytes, "reduce-scatter: 4 T, and w T or 4 T / n + w T / n + one gradient"
        if self.memory.fused_backward:
            piece = max((local_size(shape, group.num_shards) for shape in group.trained), default=0)
            local = group.reduce_input_bytes + self.work.width * group.local_trained
            update = self._fused_update(piece)
            if isinstance(kind, (Trained, Adapter)):
                update = max(update, self._largest_step_bytes(kind))
            num_bytes = max(num_bytes, local + update)
            formula += ", or w T / n and the update"
        return MemoryTerm(COMMUNICATION, "workspace", num_bytes, formula)

    def _gradients_of_one(self, kind: Role) -> int:
        return 0 if self.memory.fused_backward else self.work.width * self.groups.layers[kind].local_trained

    def _gradients_inside(self, kind: Role) -> int:
        return self.groups.layers[kind].gradient_bytes

    def _gradients_above(self, index: int) -> list[MemoryTerm]:
        return [*self._head_gradients(), *self._reduced_above(index)]

    def _reduced_above(self, index: int) -> list[MemoryTerm]:
        """Reduced gradients, and the memory that their all-reduces still hold."""
        terms = self._all_gradients() if self.sums_gradients else list(self._gradients_of_layers_above(index))
        held = sum(self._above(kind, index) * self._held_of_one(kind) for kind in self.kinds)
        return [*terms, MemoryTerm(COMMUNICATION, "workspace", held, "all-reduce of the layers above: 4 T / n each")]

    def _held_of_one(self, kind: Role) -> int:
        """All-reduce output of one layer: an fp32 gradient is that output itself; a rounded or summed one is not."""
        is_apart = self.work.width < REDUCED_BYTES or self.sums_gradients
        return self.groups.layers[kind].all_reduce_bytes if is_apart else 0

    def _plain_weights(self) -> MemoryTerm:
        layer, outer = self.groups.plain_layer, self.groups.plain_outer
        if layer.num_shards == 1:
            return super()._plain_weights()
        size = self.num_layers * layer.local_parameters + outer.local_parameters
        formula = f"(N_i × P_layer + P_outer) × {self.work.width} B ÷ {layer.num_shards}, rows rounded up"
        whole = self.shape.num_parameters(self.num_layers)
        return MemoryTerm("plain_weights", "weights", size * self.work.width, formula, whole)


def _gathered(name: str, group: Group) -> MemoryTerm:
    return MemoryTerm(GATHERED, "weights", group.gathered_bytes, f"all-gathered: w {name}")


def _arriving(group: Group, name: str = "P_layer") -> MemoryTerm:
    return MemoryTerm(COMMUNICATION, "workspace", group.all_gather_bytes, f"all-gather: w {name}")


def _being_reduced(group: Group) -> MemoryTerm:
    return MemoryTerm(COMMUNICATION, "workspace", group.reduce_input_bytes, "reduce-scatter of the layer above: 4 T")


def _with(instant: Instant, terms: list[MemoryTerm]) -> Instant:
    added = tuple(term for term in terms if term.num_bytes)
    return replace(instant, memory=MemoryEstimate((*instant.memory.terms, *added)))
