"""Model-state bytes of a phase: weights, gradients and optimizer states, one term for each component and kind.

A component is a group of tensors (``COMPONENTS``); a kind is what training stores for it (``KINDS``). Symbols in the
formulas: ``n_i`` trained layers, ``N_{i-1}`` frozen layers, ``P_layer`` parameters per layer, ``E`` adapter parameters
per layer. Layers and adapters follow STEP (arXiv 2504.04151), section 2.2. STEP's formula omits embeddings, final norm
and head; they are counted the same way here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain

from steplm.config import MemoryConfig, OptimConfig, RunConfig
from steplm.cost.formats import FROZEN_FORMATS, STATE_BLOCK, has_whole_blocks, state_bytes
from steplm.cost.rules import ADAMW, RULES, Setting, masters_of, matrices_of_layer, row_blocks, split_by_rule
from steplm.errors import ConfigError
from steplm.schedule import Adapter, Frozen, Phase, Role, Trained
from steplm.types import (
    HOST,
    HOST_GRADIENTS,
    HOST_OPTIMIZER,
    HOST_WEIGHTS,
    LinearShape,
    MemoryEstimate,
    MemoryTerm,
    ModelShape,
    TensorShape,
    local_size,
)
from steplm.units import nearest

WEIGHT_BYTES = {"bf16": 2, "fp32": 4}  # per weight, and per gradient element
MASTER_BYTES = {"fp32": 4, "8bit": 1, "none": 0}  # per bf16 weight
OUTER_COMPONENTS = ("embeddings", "final_norm", "head")
LANDING = "landing"  # component: host buffer that receives a gradient before it is added to the sum
FETCH_SLOTS = 2  # layers in host memory that are on the device at once


@dataclass(frozen=True)
class Subject:
    """Everything a term may depend on."""

    config: RunConfig
    shape: ModelShape
    phase: Phase

    @property
    def width(self) -> int:
        """Bytes per weight, and per gradient element."""
        return WEIGHT_BYTES[self.config.train.precision]

    @property
    def num_shards(self) -> int:
        """Ranks that share one copy of the model."""
        return self.config.distributed.num_shards

    @cached_property
    def components(self) -> dict[str, tuple[Tensors, ...]]:
        """The tensors of every component."""
        return {name: tuple(tensors_of(self)) for name, tensors_of in COMPONENTS.items()}

    @property
    def trained(self) -> Iterator[tuple[str, Tensors]]:
        """All trained tensors, each with its rule."""
        for tensors in chain.from_iterable(self.components.values()):
            if tensors.rule is not None:
                yield tensors.rule, tensors

    def setting(self, rule: str) -> Setting:
        """The setting in which this rule runs."""
        memory = self.config.memory
        return Setting(
            self.config.optim,
            states=memory.optimizer_states,
            masters=masters_of(rule, memory) if self.width == 2 else "fp32",
            width=self.width,
            compute_width=2 if self.config.train.device == "cuda" else 4,
            num_shards=self.num_shards,
            row_blocks=row_blocks(self.shape),
        )

    def master_bytes(self, rule: str) -> int:
        """Bytes per parameter of the master weights that this rule keeps."""
        return MASTER_BYTES[self.setting(rule).masters] if self.width == 2 else 0


@dataclass(frozen=True)
class Tensors:
    """The tensors of a component: ``count`` copies of a set of tensors with these shapes."""

    formula: str
    shapes: tuple[TensorShape, ...]
    count: int = 1
    rule: str | None = ADAMW  # updates the ``candidates`` that it takes, AdamW the rest; None: nothing is trained
    candidates: tuple[TensorShape, ...] = ()

    @cached_property
    def num_parameters(self) -> int:
        return self.local_parameters(1)

    def by_rule(self, optim: OptimConfig) -> tuple[tuple[TensorShape, ...], tuple[TensorShape, ...]]:
        """Of trained tensors: the shapes that the rule updates, and those that AdamW updates."""
        return split_by_rule(self.shapes, self.candidates, self.rule or ADAMW, optim)

    def local_parameters(self, num_shards: int) -> int:
        """Parameters on the first of the ranks that share them; see ``local_size``."""
        return self.count * _local_parameters(self.shapes, num_shards)


@cache
def _local_parameters(shapes: tuple[TensorShape, ...], num_shards: int) -> int:
    return sum(local_size(shape, num_shards) for shape in shapes)


def trained_layers(subject: Subject) -> Iterator[Tensors]:
    """Fully trained layers: ``n_i P_layer`` (STEP, section 2.2)."""
    for role, count in subject.phase.groups.items():
        if isinstance(role, Trained):
            symbol = "n_i" if role.rule == ADAMW else f"n_{role.rule}"
            candidates = matrices_of_layer(subject.shape)
            yield Tensors(f"{symbol} × P_layer", subject.shape.layer_shapes, count, role.rule, candidates)


def frozen_layers(subject: Subject) -> Iterator[Tensors]:
    """Frozen layers, without gradients or states: ``N_{i-1} P_layer`` (STEP, section 2.2)."""
    count = len(subject.phase.frozen_layers)
    yield Tensors("N_{i-1} × P_layer", subject.shape.layer_shapes, count, None)


def adapters(subject: Subject) -> Iterator[Tensors]:
    """Adapters of the frozen layers: ``N_{i-1} E`` (STEP, section 2.2).

    LoRA (arXiv 2106.09685) has ``E = Σ rank (in + out)``. The embeddings add ``rank (vocab_size + hidden_size)``, and
    an untied head adds as much again.
    """
    shape, outside = subject.shape, subject.phase.embeddings_and_head
    for role, count in subject.phase.groups.items():
        if isinstance(role, Adapter):
            factors = adapter_shapes(shape, role)
            yield Tensors("N_{i-1} × E", factors, count, role.rule, factors)
    if isinstance(outside, Adapter):
        count = 1 + (shape.head_parameters > 0)
        yield Tensors("rank × (vocab + hidden)", embedding_adapter_shapes(shape, outside.rank), count)


def embeddings(subject: Subject) -> Iterator[Tensors]:
    """Embeddings: ``vocab_size × hidden_size``; a tied head is counted here, once."""
    rule = ADAMW if isinstance(subject.phase.embeddings_and_head, Trained) else None
    yield Tensors("P_embeddings", subject.shape.other_shapes("embeddings"), rule=rule)


def final_norm(subject: Subject) -> Iterator[Tensors]:
    """Norm after the last layer: ``hidden_size`` weights."""
    rule = None if isinstance(subject.phase.embeddings_and_head, Frozen) else ADAMW
    yield Tensors("P_final_norm", subject.shape.other_shapes("final_norm"), rule=rule)


def head(subject: Subject) -> Iterator[Tensors]:
    """Untied head: ``hidden_size × vocab_size`` weights, and its bias if it has one."""
    rule = ADAMW if isinstance(subject.phase.embeddings_and_head, Trained) else None
    yield Tensors("P_head", subject.shape.other_shapes("head"), rule=rule)


# To add a component, write a function and add a line here; ``steplm.cost.measure`` must use the same name.
COMPONENTS: dict[str, Callable[[Subject], Iterator[Tensors]]] = {
    "trained_layers": trained_layers,
    "frozen_layers": frozen_layers,
    "adapters": adapters,
    "embeddings": embeddings,
    "final_norm": final_norm,
    "head": head,
}


def weights(subject: Subject, tensors: Tensors) -> tuple[int, str]:
    """Bytes and formula of the weights, in the precision of the forward pass."""
    return tensors.local_parameters(subject.num_shards) * subject.width, f"{subject.width} B"


def gradients(subject: Subject, tensors: Tensors) -> tuple[int, str]:
    """Gradients in the weights' dtype, or fp32 sums over micro-batches."""
    width = 4 if subject.config.sums_in_fp32 else subject.width
    return tensors.local_parameters(subject.num_shards) * width, f"{width} B"


def host_gradients(subject: Subject, tensors: Tensors) -> tuple[int, str]:
    """Gradients in host memory: fp32 sums of several micro-batches, or one gradient in the weights' dtype."""
    width = 4 if subject.config.micro_batches > 1 else subject.width
    return tensors.local_parameters(subject.num_shards) * width, f"{width} B"


def optimizer(subject: Subject, tensors: Tensors) -> tuple[int, str]:
    """States of the update rule and, for bf16 weights, their master weights."""
    rule = tensors.rule or ADAMW
    if rule == ADAMW:
        return _adamw_states(subject, tensors.shapes, tensors.count)
    setting, master = subject.setting(rule), subject.master_bytes(rule)
    taken, rest = tensors.by_rule(setting.optim)
    of_taken = sum(RULES[rule].state_bytes(matrix, setting) for matrix in taken)
    of_taken += master * sum(local_size(shape, subject.num_shards) for shape in taken)
    of_rest, per_parameter = _adamw_states(subject, rest, tensors.count)
    states = f"states of {rule}{f' + {master}' if master else ''}"
    return tensors.count * of_taken + of_rest, f"({states}) B, the rest {per_parameter}"


def _adamw_states(subject: Subject, shapes: Sequence[TensorShape], count: int) -> tuple[int, str]:
    """Adam's two moments (arXiv 1412.6980) and the master weights."""
    master = subject.master_bytes(ADAMW)
    sizes = [local_size(shape, subject.num_shards) for shape in shapes]
    if subject.config.memory.optimizer_states == "fp32":
        return count * sum(sizes) * (8 + master), f"{8 + master} B"
    is_matrix = [len(shape) > 1 for shape in shapes]
    moments = sum(2 * state_bytes(n) if quantized else 8 * n for n, quantized in zip(sizes, is_matrix, strict=True))
    note = f"(2 × (1 + 4/256){f' + {master}' if master else ''}) B, vectors {8 + master} B"
    return count * (moments + master * sum(sizes)), note


KINDS: dict[str, Callable[[Subject, Tensors], tuple[int, str]]] = {
    "weights": weights,
    "gradients": gradients,
    "optimizer": optimizer,
    # ZeRO-Offload (arXiv 2101.06840), section 4: the update writes this copy, then the device receives it.
    HOST_WEIGHTS: weights,
    HOST_GRADIENTS: host_gradients,
    HOST_OPTIMIZER: optimizer,
}


def _stored(memory: MemoryConfig, tensors: Tensors) -> tuple[str, ...]:
    """The kinds that training stores for these tensors."""
    if tensors.rule is None:
        return ("weights",)
    if memory.offload_optimizer:
        return "weights", HOST_WEIGHTS, HOST_GRADIENTS, HOST_OPTIMIZER
    return ("weights", "optimizer") if memory.fused_backward else ("weights", "gradients", "optimizer")


def check_shards(config: RunConfig, shape: ModelShape, phase: Phase) -> None:
    """Check that the shards of 8-bit states do not divide a block, so that any number of ranks can read them.

    Raises:
        ConfigError: the shards of a matrix do.
    """
    subject = Subject(config, shape, phase)
    if config.memory.optimizer_states != "8bit" or subject.num_shards == 1:
        return
    for rule, tensors in subject.trained:
        taken, rest = tensors.by_rule(config.optim)
        has_states = [matrix for matrix in taken if RULES[rule].state_bytes(matrix, subject.setting(rule))]
        for matrix in (*has_states, *(tensor for tensor in rest if len(tensor) > 1)):
            if not has_whole_blocks(matrix, subject.num_shards):
                raise ConfigError(
                    f"memory.optimizer_states=8bit stores blocks of {STATE_BLOCK} elements, and {subject.num_shards} "
                    f"shards of a matrix of {' x '.join(map(str, matrix))} would divide some: change "
                    f"distributed.shard_size or the shape (rows of a multiple of {STATE_BLOCK} elements always work), "
                    "or leave memory.optimizer_states out.",
                    shape=matrix,
                    num_shards=subject.num_shards,
                )


def model_state(config: RunConfig, shape: ModelShape, phase: Phase, *, count_outer: bool = True) -> MemoryEstimate:
    """Model-state bytes of a phase on the first rank, which has the most; terms of zero bytes are left out.

    Under AdamW in bf16, a trained parameter takes 16 bytes (2 + 2 + 12) and a frozen one 2; in fp32, 16 and 4.
    Excludes activations, logits, workspace and the device context: see ``steplm.cost.peak``.

    Args:
        count_outer: whether to count embeddings, final norm and head; without them this is the source's own formula.

    Source: STEP (arXiv 2504.04151), section 2.2.
    """
    if count_outer:
        subject = Subject(config, shape, phase)
        return MemoryEstimate((*_terms(subject), *_fetched_layers(subject), *_landing(subject)))
    subject = Subject(config, shape, replace(phase, embeddings_and_head=Frozen()))
    terms = (*_terms(subject), *_fetched_layers(subject))
    return MemoryEstimate(tuple(term for term in terms if term.component not in OUTER_COMPONENTS))


def _terms(subject: Subject) -> Iterator[MemoryTerm]:
    memory = subject.config.memory
    for component, groups in subject.components.items():
        for kind, bytes_of in KINDS.items():
            for tensors in groups:
                if kind not in _stored(memory, tensors):
                    continue
                if component == "frozen_layers" and memory.packs_frozen:
                    yield from _packed_layers(subject, tensors)
                    continue
                if component == "trained_layers" and kind == "weights" and memory.offload_weights:
                    yield from _vectors_on_device(subject, component, tensors)
                    continue
                num_bytes, per_parameter = bytes_of(subject, tensors)
                if num_bytes:
                    formula = f"{tensors.formula} × {per_parameter}{_divided(subject)}"
                    yield MemoryTerm(component, kind, num_bytes, formula, tensors.num_parameters)


def _vectors_on_device(subject: Subject, component: str, tensors: Tensors) -> Iterator[MemoryTerm]:
    """Device weights of layers whose matrices are in host memory."""
    size = tensors.num_parameters - tensors.count * subject.shape.linear_weights
    if size:
        formula = f"{tensors.formula.replace('P_layer', 'vectors')} × {subject.width} B"
        yield MemoryTerm(component, "weights", size * subject.width, formula, size)


def _fetched_layers(subject: Subject) -> Iterator[MemoryTerm]:
    """Device memory that trained layers are fetched to."""
    slots = min(FETCH_SLOTS, len(subject.phase.trained_layers))
    if subject.config.memory.offload_weights and slots:
        num_bytes = slots * subject.shape.linear_weights * subject.width
        yield MemoryTerm("fetched_layers", "weights", num_bytes, f"{slots} layers × matrices × {subject.width} B")


def _landing(subject: Subject) -> Iterator[MemoryTerm]:
    """Host buffer for one gradient at a time, before it is added to the sum: as large as the largest tensor."""
    if not subject.config.memory.offload_optimizer or subject.config.micro_batches == 1:
        return
    trained = chain.from_iterable(tensors.shapes for _, tensors in subject.trained if tensors.count)
    largest = max((local_size(shape, subject.num_shards) for shape in trained), default=0)
    yield MemoryTerm(LANDING, HOST_GRADIENTS, largest * subject.width, f"the largest tensor × {subject.width} B")


def _divided(subject: Subject) -> str:
    return f" ÷ {subject.num_shards}, rows rounded up" if subject.num_shards > 1 else ""


def packed_layer_bytes(shape: ModelShape, memory: MemoryConfig, width: int) -> int:
    """Bytes of the linear weights of one frozen layer, in their storage format."""
    pack = FROZEN_FORMATS.get(memory.frozen_weights, lambda rows, columns: rows * columns * width)
    return sum(pack(linear.out_features, linear.in_features) for linear in shape.linears)


def _packed_layers(subject: Subject, tensors: Tensors) -> Iterator[MemoryTerm]:
    """Weights of frozen layers whose matrices are quantized or in host memory; the rest is stored as in training."""
    memory, width, count = subject.config.memory, subject.width, tensors.count
    if not count:
        return
    name, matrices = "frozen_layers", count * subject.shape.linear_weights
    packed = packed_layer_bytes(subject.shape, memory, width)
    fmt = f"matrices in {memory.frozen_weights}" if memory.frozen_weights != "full" else f"matrices × {width} B"
    if not memory.offload_frozen:
        num_bytes = count * packed + (tensors.num_parameters - matrices) * width
        formula = f"N_{{i-1}} × ({fmt} + vectors × {width} B)"
        yield MemoryTerm(name, "weights", num_bytes, formula, tensors.num_parameters)
        return
    yield from _vectors_on_device(subject, name, tensors)
    yield MemoryTerm(name, HOST, count * packed, f"N_{{i-1}} × {fmt}", matrices)
    slots = min(FETCH_SLOTS, count)
    yield MemoryTerm("fetched_layers", "weights", slots * packed, f"{slots} layers × {fmt}")


def component_of(role: Role) -> str:
    """The component that a layer's own weights belong to."""
    return "trained_layers" if isinstance(role, Trained) else "frozen_layers"


def resolve_target_modules(shape: ModelShape, target_modules: str | Sequence[str]) -> tuple[str, ...]:
    """Last name components of the linear layers to adapt, in the layer's order; "all-linear" selects all of them.

    Raises:
        ConfigError: a Transformer layer has no linear layer of that name.
    """
    known = tuple(dict.fromkeys(linear.last_name for linear in shape.linears))
    if target_modules == "all-linear":
        return known
    for target in target_modules:
        if target not in known:
            hint = nearest(target.rpartition(".")[2], known, otherwise=f" Known: {', '.join(known)}, or all-linear.")
            raise ConfigError(
                f"pet.target_modules: a {shape.model_type} layer has no linear map {target!r}.{hint}",
                target=target,
                known=known,
            )
    return tuple(name for name in known if name in target_modules)


def adapted_linears(shape: ModelShape, role: Role) -> tuple[LinearShape, ...]:
    """The linear modules of a layer that the role's adapter is on; () if it has none."""
    targets = role.target_modules if isinstance(role, Adapter) else ()
    return tuple(linear for linear in shape.linears if linear.last_name in targets)


def adapter_shapes(shape: ModelShape, adapter: Adapter) -> tuple[TensorShape, ...]:
    """Shapes of the LoRA factors of one layer: ``rank × in_features`` and ``out_features × rank`` per target.

    E is the sum of their sizes.

    Source: LoRA (arXiv 2106.09685), section 4.1.

    Raises:
        ConfigError: the rank is larger than a side of a target's matrix.
    """
    rank, factors = adapter.rank, list[TensorShape]()
    for linear in adapted_linears(shape, adapter):
        smaller_side = min(linear.in_features, linear.out_features)
        if rank > smaller_side:
            raise ConfigError(
                f"pet.rank={rank} is larger than the smaller side, {smaller_side}, of {linear.name} "
                f"({linear.out_features} x {linear.in_features}). Set pet.rank to {smaller_side} or less, "
                f"or take {linear.last_name} out of pet.target_modules.",
                rank=rank,
                largest_rank=smaller_side,
                target=linear.name,
            )
        factors += [(rank, linear.in_features), (linear.out_features, rank)]
    return tuple(factors)


def embedding_adapter_shapes(shape: ModelShape, rank: int) -> tuple[TensorShape, ...]:
    """Shapes of both LoRA factors of the embeddings, or of the head."""
    return (rank, shape.hidden_size), (shape.vocab_size, rank)
