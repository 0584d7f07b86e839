"""Compute and memory traffic of one step of a phase on one device, by kind; ``steplm.cost.seconds`` times it.

The counts follow PyTorch's operations one by one, as the layers of ``transformers`` call them. A matmul ``m × k × n``
has ``2 m k n`` FLOPs and moves its three matrices; an elementwise operation moves what it reads and writes. Views cost
nothing.

Symbols: N tokens per micro-batch, S sequence length, d hidden size, q and k widths of queries and keys, f feed-forward
size, V vocabulary size, C rows per chunk of the loss, r adapter rank, w bytes per element.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

from steplm.config import RunConfig
from steplm.cost.activations import MODELED, Workload, is_modeled, layer_activations, recomputes
from steplm.cost.flops import newton_schulz_flops
from steplm.cost.formats import NEWTON_SCHULZ_STEPS, STEP_CHUNK, RowBlocks
from steplm.cost.rules import ADAMW
from steplm.cost.terms import Subject, adapted_linears, packed_layer_bytes
from steplm.cost.transfers import fetched_bytes, host_transfers
from steplm.schedule import Adapter, Frozen, Phase, Role, Trained
from steplm.types import ModelShape, TensorShape

# Kinds of work and their units.
KINDS = {
    "bf16 products": "FLOPs",
    "fp32 products": "FLOPs",
    "bf16 attention": "FLOPs",
    "fp32 attention": "FLOPs",
    "operands": "bytes",  # read and written by matmuls
    "elements": "bytes",  # by elementwise operations
    "logits": "bytes",  # by the loss; a kind of its own because a CPU is slow at exponentials
    "update": "bytes",  # by the optimizer's update
    "8-bit states": "bytes",  # by quantizing and dequantizing them
    "rounding": "bytes",  # by stochastic rounding of bf16 weights
    "8-bit masters": "bytes",  # by splitting and joining them
    "int8 weights": "bytes",  # by dequantizing them
    "nf4 weights": "bytes",
    "bus": "bytes",  # between host and device
    "host update": "bytes",  # by an update in host memory, for a model on an accelerator
    "launches": "kernels",
}


@dataclass(frozen=True)
class Work:
    """An amount of one kind of work in one step."""

    part: str  # "layers forward", "layers backward", "recomputation", "loss", "update", ...
    kind: str  # a key of ``KINDS``
    amount: float
    formula: str = ""


@dataclass(frozen=True)
class _Elementwise:
    """Memory traffic per activation element in the forward and the backward pass of a layer, in bytes."""

    norm: tuple[int, int]  # per element of the norm's input, with a frozen weight
    norm_weight: int  # extra in the backward pass if the norm's weight is trained
    rotary: tuple[int, int]  # per element of queries and keys
    gate: tuple[int, int]  # per element of the feed-forward's inner activations
    residual: tuple[int, int]  # per element of the hidden states: both residual additions, and the sums of gradients


# Eager operations one by one, and compiled operations, which are fused: they read inputs and write outputs once.
_PLAIN = {
    "bf16": _Elementwise((36, 88), 8, (20, 30), (10, 18), (12, 30)),
    "fp32": _Elementwise((28, 80), 16, (40, 60), (20, 36), (24, 60)),
}
_COMPILED = {
    "bf16": _Elementwise((4, 12), 0, (4, 4), (6, 10), (10, 12)),
    "fp32": _Elementwise((8, 24), 0, (8, 8), (12, 20), (20, 24)),
}
# Per materialized attention score, in the forward and the backward pass; and elements of w bytes for a soft-cap.
_SCORE_BYTES = {"bf16": (28, 28), "fp32": (24, 20)}
_CAP_ELEMENTS = (6, 7)
_LOGIT_BYTES = {"bf16": 36, "fp32": 24}  # per logit: fp32 copy, log-softmax, exponential, scale, rounding

# Bytes per matrix element in an update: of the rule itself, and what memory options add.
_RULE_BYTES = {ADAMW: 40, "muon": 90, "scale": 58}
_FP32_WEIGHT_SAVES = {ADAMW: 12, "muon": 6, "scale": 6}
_STATE_BYTES, _ROUNDING_BYTES, _MASTER_BYTES = 84, 48, 107
_UNPACK_BYTES = {"int8": 19, "nf4": 19}  # per weight element, dequantized to bf16
_NUM_MOMENTS = {ADAMW: 2, "muon": 1, "scale": 0}

# Kernel launches. A compiled layer launches a few per matmul.
_LAYER_LAUNCHES = (38, 60)
_TRAINED_LAUNCHES = 11  # extra in the backward pass: weight gradients
_ADAPTER_LAUNCHES = (2, 4)  # extra per adapted linear layer
_COMPILED_LAUNCHES = 0.4
_CHUNK_LAUNCHES = 21
_STEP_LAUNCHES = 40  # embeddings, final norm, loss, norm of the gradients
_PIECE_LAUNCHES = {ADAMW: 2, "muon": 13, "scale": 6}  # of an update, per chunk of a matrix
_OPTION_LAUNCHES = {"8-bit states": 13, "rounding": 6, "8-bit masters": 14}


def step_work(config: RunConfig, shape: ModelShape, phase: Phase, *, on_cuda: bool) -> tuple[Work, ...] | None:
    """The work of one step on one device; None for families whose layers are not counted.

    Excludes data loading, evaluation, checkpoints, communication between devices, and the computation of new
    projections in ``galore`` and ``apollo``.

    Args:
        on_cuda: whether Newton–Schulz runs in bf16, as on CUDA, or in fp32.
    """
    if not is_modeled(shape):
        return None
    return tuple(work for work in _Step(config, shape, phase, on_cuda).terms() if work.amount)


class _Step:
    def __init__(self, config: RunConfig, shape: ModelShape, phase: Phase, on_cuda: bool) -> None:
        train = config.train
        self.config, self.shape, self.phase, self.on_cuda = config, shape, phase, on_cuda
        self.train, self.memory, self.precision = train, config.memory, train.precision
        self.batch = Workload.of(config, shape)
        self.N, self.w, self.passes = self.batch.num_tokens, self.batch.width, config.micro_batches
        self.bytes = (_COMPILED if train.compile else _PLAIN)[train.precision]
        self.launched = _COMPILED_LAUNCHES if train.compile else 1.0
        self.subject = Subject(config, shape, phase)

    def terms(self) -> Iterator[Work]:
        for role, count in self.phase.groups.items():
            reached = self._reached(role, count)
            yield from self._layers("layers forward", self._forward(role), count)
            yield from self._layers("layers backward", self._backward(role), reached)
            if recomputes(self.config, role):
                yield from self._layers("recomputation", self._forward(role), reached)
        yield from self._embeddings()
        yield from self._loss()
        yield from self._host()
        for work in self._update():
            on_host = self.memory.offload_optimizer and self.on_cuda and KINDS[work.kind] == "bytes"
            yield replace(work, kind="host update") if on_host and work.part == "update" else work

    def _layers(self, part: str, each: Iterable[Work], count: int) -> Iterator[Work]:
        for work in each:
            passes = f"{self.passes} × " if self.passes > 1 else ""
            formula = work.formula and f"{count} × {passes}{work.formula}"
            yield Work(part, work.kind, work.amount * count * self.passes, formula)

    def _reached(self, role: Role, count: int) -> int:
        """How many of these layers the backward pass reaches."""
        return count - (self.phase.num_layers_without_backward if isinstance(role, Frozen) else 0)

    def _forward(self, role: Role) -> Iterator[Work]:
        """Work of the forward pass of one layer, for one micro-batch."""
        norm, adapted = self.bytes.norm[0], adapted_linears(self.shape, role)
        yield from self._products(((self.N, x.in_features, x.out_features) for x in self.shape.linears), "2 N M")
        yield from self._adapter_products(role, 1)
        added = sum(linear.out_features for linear in adapted)
        yield Work("", "operands", self.w * self.N * added, "w N out: a frozen map's output, added to")
        yield self._elements(norm, self.bytes.residual[0], self.bytes.rotary[0], self.bytes.gate[0])
        yield from self._attention(1.0)
        yield from self._unpacking(role)
        launches = _LAYER_LAUNCHES[0] + _ADAPTER_LAUNCHES[0] * len(adapted)
        yield Work("", "launches", launches * self.launched)

    def _backward(self, role: Role) -> Iterator[Work]:
        trained, adapted = isinstance(role, Trained), adapted_linears(self.shape, role)
        norm = self.bytes.norm[1] + self.bytes.norm_weight * trained
        times = 2 if trained else 1
        maps = [(self.N, x.out_features, x.in_features) for x in self.shape.linears]
        yield from self._products(maps * times, f"{2 * times} N M")
        yield from self._adapter_products(role, 2)
        yield self._elements(norm, self.bytes.residual[1], self.bytes.rotary[1], self.bytes.gate[1])
        added = self.w * self.N * sum(linear.in_features for linear in adapted)
        if self.train.compile:  # a compiled layer has the adapters' products as separate operations
            yield Work("", "elements", 3 * added, "3 w N in: an adapted input has two gradients")
        else:
            yield Work("", "operands", added, "w N in: added to the gradient through the frozen layer")
        yield from self._attention(2.5)  # the backward pass recomputes the scores
        yield from self._unpacking(role)
        launches = _LAYER_LAUNCHES[1] + _TRAINED_LAUNCHES * trained + _ADAPTER_LAUNCHES[1] * len(adapted)
        yield Work("", "launches", launches * self.launched)

    def _elements(self, norm: int, residual: int, rotary: int, gate: int) -> Work:
        """Elementwise operations of a layer, from their bytes per element."""
        d, f = self.shape.hidden_size, self.shape.linear("gate_proj").out_features
        qk = sum(self.shape.linear(name).out_features for name in ("q_proj", "k_proj"))
        kind = MODELED[self.shape.model_type]
        hidden, heads = (4 if kind.norms_after else 2) * norm + residual, rotary + norm * kind.normalizes_heads
        formula = f"N ({hidden} d + {heads} (q + k) + {gate} f)"
        return Work("", "elements", self.N * (hidden * d + heads * qk + gate * f), formula)

    def _adapter_products(self, role: Role, times: int) -> Iterator[Work]:
        if not isinstance(role, Adapter):
            return
        for linear in adapted_linears(self.shape, role):
            down, up = (self.N, linear.in_features, role.rank), (self.N, role.rank, linear.out_features)
            yield from self._products([down, up] * times, f"{2 * times} N r (in + out)")

    def _products(
        self, products: Iterable[tuple[int, int, int]], formula: str, precision: str | None = None, part: str = ""
    ) -> Iterator[Work]:
        """FLOPs and bytes of matmuls ``(m, k, n)``."""
        precision = precision or self.precision
        width, flops, moved = 2 if precision == "bf16" else 4, 0, 0
        for m, k, n in products:
            flops += 2 * m * k * n
            moved += width * (m * k + k * n + m * n)
        yield Work(part, f"{precision} products", flops, formula)
        yield Work(part, "operands", moved)

    def _attention(self, times: float) -> Iterator[Work]:
        """PyTorch's fused attention, counted as if masks skipped no scores; a document mask adds its own traffic."""
        size = self.shape.query_size
        S = self.train.sequence_length
        if scores := self.batch.num_scores:
            yield from self._materialized_scores(scores, 4 * self.N * S * size, is_backward=times > 1)
            return
        yield Work("", f"{self.precision} attention", times * 4 * self.N * S * size, f"{4 * times:g} N S q")
        if self.batch.has_mask:
            yield Work("", "elements", (self.w + 1) * self.N * S, "mask: (w + 1) N S")

    def _materialized_scores(self, scores: int, flops: int, *, is_backward: bool) -> Iterator[Work]:
        """Attention as two matmuls with a softmax in between."""
        products = 2 if is_backward else 1
        yield Work("", f"{self.precision} products", products * flops, f"{4 * products} N S q")
        yield Work("", "operands", products * 2 * self.w * scores)
        each = _SCORE_BYTES[self.precision][is_backward]
        each += _CAP_ELEMENTS[is_backward] * self.w * self.batch.caps_scores
        yield Work("", "elements", scores * each, f"N h S × {each} B: scores, softmax and soft-cap")

    def _unpacking(self, role: Role) -> Iterator[Work]:
        """Dequantizing frozen weights, once for each matmul."""
        fmt = self.memory.frozen_weights
        if fmt != "full" and not isinstance(role, Trained):
            yield Work(
                "",
                f"{fmt} weights",
                self.shape.linear_weights * (_UNPACK_BYTES[fmt] + self.w - 2),
                "M × bytes of making one whole",
            )

    def _embeddings(self) -> Iterator[Work]:
        d, size = self.shape.hidden_size, self.shape.vocab_size * self.shape.hidden_size
        moved = 2 * self.w * self.N * d + sum(self.bytes.norm) * self.N * d
        if not isinstance(self.phase.embeddings_and_head, Frozen):
            moved += 2 * self.w * self.N * d
        if isinstance(self.phase.embeddings_and_head, Trained):
            moved += self.w * size
        yield Work("embeddings", "elements", self.passes * moved, "look-up and final norm: N d; gradient: w V d")
        yield Work("embeddings", "launches", self.passes * _STEP_LAUNCHES)

    def _loss(self) -> Iterator[Work]:
        outside, V, d = self.phase.embeddings_and_head, self.shape.vocab_size, self.shape.hidden_size
        C = min(self.train.loss_chunk_size, self.N)
        chunks = self.passes * -(-self.N // C)
        products = [(C, d, V), (C, V, d)]
        if isinstance(outside, Trained):
            products.append((V, C, d))
        if isinstance(outside, Adapter):
            products += [(C, outside.rank, V), (C, V, outside.rank), (V, C, outside.rank)]
        for work in self._products(products, f"{2 * len(products)} N V d"):
            yield Work("loss", work.kind, work.amount * chunks, work.formula)
        yield Work("loss", "logits", self.passes * self.N * V * _LOGIT_BYTES[self.precision], "N V × bytes of a logit")
        if isinstance(outside, Trained):
            summed = 12 if self.precision == "bf16" else 8
            yield Work("loss", "elements", chunks * summed * V * d, "head's gradient, summed for each chunk of C rows")
        yield Work("loss", "launches", chunks * _CHUNK_LAUNCHES)

    def _host(self) -> Iterator[Work]:
        """Transfers between host and device."""
        if self.memory.offload_frozen:
            moved = len(self.phase.frozen_layers) * packed_layer_bytes(self.shape, self.memory, self.w)
            yield Work("frozen from host", "bus", 2 * self.passes * moved, "2 × frozen layers' matrices")
        fetched = fetched_bytes(self.config, self.shape, self.phase)
        yield Work("weights from host", "bus", fetched, "trained layers' matrices, up and down the layers")
        transfers = host_transfers(self.config, self.shape, self.phase)
        others = transfers.to_host + transfers.to_device - fetched
        yield Work("optimizer on host", "bus", others, "gradients to the host, weights to the device")
        if self.memory.offload_activations:
            saved = 0
            for role, count in self.phase.groups.items():
                keeps_inputs = recomputes(self.config, role)
                each = self.batch.stream_bytes if keeps_inputs else layer_activations(self.batch, role).saved
                saved += self._reached(role, count) * each
            yield Work("activations to host", "bus", 2 * self.passes * saved, "2 × saved activations")

    def _update(self) -> Iterator[Work]:
        trained = 0
        for rule, tensors in self.subject.trained:
            trained += tensors.num_parameters
            taken, rest = tensors.by_rule(self.config.optim)
            yield from self._rule(rule, taken, tensors.count)
            yield from self._rule(ADAMW, rest, tensors.count)
        yield Work("update", "update", self.w * trained, "norm of the gradients: w P")
        summed = 3 * self.w * trained * (self.passes - 1)
        yield Work("layers backward", "elements", summed, "sums of the micro-batches' gradients: 3 w P")

    def _rule(self, rule: str, shapes: Iterable[TensorShape], count: int) -> Iterator[Work]:
        matrices = [shape for shape in shapes if len(shape) > 1]
        size = count * sum(map(prod, matrices))
        if not size:
            return
        setting = self.subject.setting(rule)
        each = _RULE_BYTES.get(rule, 60) - (0 if self.w == 2 else _FP32_WEIGHT_SAVES.get(rule, 6))
        pieces = count * sum(-(-prod(shape) // STEP_CHUNK) for shape in matrices)
        launches = _PIECE_LAUNCHES.get(rule, 20)
        yield Work("update", "update", size * each, f"{rule}: {each} B × P")
        options = {
            "8-bit states": _STATE_BYTES * _NUM_MOMENTS.get(rule, 0) * (setting.states == "8bit"),
            "rounding": _ROUNDING_BYTES * (self.w == 2 and setting.masters == "none"),
            "8-bit masters": _MASTER_BYTES * (self.w == 2 and setting.masters == "8bit"),
        }
        for kind, num_bytes in options.items():
            yield Work("update", kind, size * num_bytes, f"{num_bytes} B × P")
            launches += _OPTION_LAUNCHES[kind] * (num_bytes > 0)
        if rule == "muon":
            yield from self._newton_schulz(matrices, count, setting.row_blocks)
        if rule in ("galore", "apollo", "apollo_mini"):
            rank = 1 if rule == "apollo_mini" else self.config.optim.rank
            products = [(min(shape), max(shape), min(rank, *shape)) for shape in matrices] * (2 * count)
            yield from self._products(products, "to the subspace and back: 4 r P", "fp32", "update")
        yield Work("update", "launches", pieces * launches)

    def _newton_schulz(self, matrices: Iterable[TensorShape], count: int, row_blocks: RowBlocks) -> Iterator[Work]:
        precision = "bf16" if self.on_cuda else "fp32"
        flops = moved = 0
        for shape in matrices:
            maps = count * prod(shape[:-2])
            for rows in row_blocks.get(shape, shape[-2:-1]):
                s, l = sorted((rows, shape[-1]))  # noqa: E741
                flops += maps * newton_schulz_flops(s, l)
                moved += maps * NEWTON_SCHULZ_STEPS * (2 if self.on_cuda else 4) * (5 * s * l + 6 * s * s)
        yield Work("update", f"{precision} products", flops, "Newton–Schulz: 5 (4 s² l + 2 s³)")
        yield Work("update", "update", moved, "Newton–Schulz's operands")
