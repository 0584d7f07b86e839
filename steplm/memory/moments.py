"""All that a device holds, at each moment of a stage that can be its highest, where it holds the whole model.

Every moment holds the weights and the optimizer's states. Beside them: the loss holds the activations of all layers
and its own workspace; the backward pass of a layer holds the activations of the layers below it and the gradients of
those above it; the update holds all gradients. Left out: the device's context and libraries (``memory.reserve``).

N tokens of a micro-batch, d hidden size, V vocabulary, C rows of the loss at once, w bytes of a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from steplm.config import MemoryConfig, OptimConfig, TrainConfig
from steplm.memory.activations import Workload, layer_activations, norm_backward, norm_saved
from steplm.memory.formats import (
    CODE_BOOK_BYTES,
    MIN_OFFLOADED_BYTES,
    STEP_CHUNK,
    largest_bucket,
    low_rank_step_bytes,
    step_bytes,
    unpack_bytes,
)
from steplm.memory.terms import FETCH_SLOTS, low_rank_maps
from steplm.types import HOST, Instant, MemoryEstimate, MemoryTerm

GRADIENTS_OF = {"new_layers": "new_layers", "frozen_layers": "adapters"}  # kind of layer -> its trained part
KINDS_OF_LAYERS = tuple(GRADIENTS_OF)


@dataclass(frozen=True)
class Pass:
    """What the moments of a stage depend on."""

    work: Workload
    state: MemoryEstimate  # of the stage, embeddings and head counted
    train: TrainConfig
    memory: MemoryConfig
    optim: OptimConfig
    num_layers: int
    new_layers: frozenset[int]  # indices of those that are trained as a whole
    low_rank_layers: frozenset[int]  # of these, those whose matrices have low-rank states
    outer: str  # embeddings, final norm and head: "trained", "frozen" or "adapters"
    micro_batches: int
    eval_batch_size: int


class Moments:
    """The moments of a stage, each from the same few numbers."""

    def __init__(self, of: Pass) -> None:
        work, train, new_layers, num_layers, outer = of.work, of.train, of.new_layers, of.num_layers, of.outer
        self.work, self.shape, self.state = work, work.shape, of.state
        self.train, self.memory, self.optim, self.outer = train, of.memory, of.optim, outer
        self.num_layers, self.eval_batch_size = num_layers, of.eval_batch_size
        self.frees_gradients = of.memory.fused_backward  # each as soon as it is there
        self.is_new = [index in new_layers for index in range(num_layers)]
        self.has_low_rank = [index in of.low_rank_layers for index in range(num_layers)]
        self.new_below = [0, *accumulate(map(int, self.is_new))]  # new layers among the lowest 0, 1, 2 ...
        self.recomputes = {
            "new_layers": train.gradient_checkpointing in (True, "new"),
            "frozen_layers": train.gradient_checkpointing in (True, "frozen"),
        }
        self.activations = {
            "new_layers": layer_activations(work, trained=True),
            "frozen_layers": layer_activations(work, trained=False),
        }
        self.kept = {
            kind: work.stream_bytes if self.recomputes[kind] else self.activations[kind].saved
            for kind in KINDS_OF_LAYERS
        }
        # Gradients of all micro-batches are summed: from the second one on they all exist, all the time.
        self.sums_gradients = of.micro_batches > 1
        # Where nothing below is trained, the backward pass ends early, and these layers save nothing for it.
        below = outer == "frozen" and not work.adapter_targets
        self.silent = min(new_layers, default=num_layers) if below else 0
        self.matrix = self.shape.vocab_size * self.shape.hidden_size  # of the embeddings, or of the head

    def in_order(self, *, grows: bool) -> tuple[Instant, ...]:
        """All of them; ``grows``: whether the stage begins with a growth."""
        growth = (self.growth(),) if grows else ()
        backward = (self.final_norm(), self.highest_layer(), self.embeddings())
        return (*growth, self.loss(), *backward, self.update(), self.evaluation())

    def growth(self) -> Instant:
        """The grown model's plain weights, on which the loss is probed before there is an optimizer."""
        return Instant("growth", MemoryEstimate((self._plain_weights(), *self._forward_alone())))

    def loss(self) -> Instant:
        """The chunked loss: all activations wait, and the head's gradient is made in the same pass."""
        w, N, V = self.work.width, self.work.num_tokens, self.shape.vocab_size
        chunk = self._chunk_bytes(N)
        if self.outer == "trained" and w == 2:  # its last product comes when the chunk's logits are rounded
            chunk = max(chunk, self._chunk_rows(N) * 2 * V + 2 * self.matrix)
        adapted = self.work.adapter_rank if self.outer == "adapters" else 0
        saved = 0 if self.memory.offload_activations else self._final_norm_saved()
        terms = [
            term("loss", "activations", saved, "final norm: 4 N d + w N d"),
            term("loss", "workspace", 2 * self.work.stream_bytes, "hidden states and their gradient: 2 w N d"),
            term("loss", "workspace", chunk, "chunk: 6 C V (fp32: 4 C V), or 2 C V + 2 V d"),
            term("loss", "workspace", 3 * w * N * adapted, "adapter of the head: 3 w N r"),
            term("head", "gradients", 4 * self.matrix * (self.outer == "trained"), "summed in fp32: 4 V d"),
            term("adapters", "gradients", 4 * V * adapted, "of the head, summed in fp32: 4 V r"),
        ]
        return self._instant("loss", self.num_layers, terms, self._all_gradients() if self.sums_gradients else [])

    def final_norm(self) -> Instant:
        """The backward pass of the norm above the last layer: all activations still wait.

        Where the update is fused into the backward pass, the head's comes just before.
        """
        backward, formula = norm_backward(self.work), "16 N d + w N d"
        update = self._fused_update(self.matrix) if self.outer == "trained" else 0
        saved = self._final_norm_saved()
        if update and not self.shape.tie_word_embeddings:
            before = self.work.stream_bytes + self.matrix * self.work.width + update
            saved_before = 0 if self.memory.offload_activations else saved  # it comes back with the norm's backward
            if before + saved_before > backward + saved:
                backward, saved = before, saved_before
                formula = "update of the head: w N d + w V d and the optimizer's workspace"
        terms = [term("loss", "activations", saved, "final norm: 4 N d + w N d")]
        terms.append(term("loss", "workspace", backward, formula))
        top = self.num_layers
        return self._instant("backward of the final norm", top, terms, self._gradients_above(top))

    def highest_layer(self) -> Instant:
        """The backward pass of the layer at which most is held."""
        per_layer = {
            kind: self._trained_in(kind) // max(self._count(kind), 1) * (not self.sums_gradients)
            for kind in KINDS_OF_LAYERS
        }

        def held(index: int) -> int:
            inside = sum(term.num_bytes for term in self._inside(index) if term.kind != HOST)
            kept = 0 if self.memory.offload_activations else 1
            below = sum(self.kept[kind] * self._saving(kind, index + 1) for kind in KINDS_OF_LAYERS)
            above = sum(per_layer[k] * (self._count(k) - self._count(k, index + 1)) for k in KINDS_OF_LAYERS)
            return kept * below + inside + above

        index = max(self._candidates(), key=held)
        name, above = f"backward of layer {index}", self._gradients_above(index + 1)
        return self._instant(name, index + 1, self._inside(index), above)

    def embeddings(self) -> Instant:
        """The end of the backward pass: no activations, all gradients."""
        terms = [term("embeddings", "workspace", self.work.stream_bytes, "gradient of the hidden states: w N d")]
        matrix_bytes = self.matrix * self.work.width
        if self.outer == "trained" and (self.frees_gradients or self.sums_gradients):
            terms.append(term("embeddings", "gradients", matrix_bytes, "one more, before it is added: w V d"))
        if self.outer == "trained" and self.shape.tie_word_embeddings:
            terms.append(term("embeddings", "gradients", matrix_bytes, "the head's part: w V d"))
        update = self._fused_update(self.matrix) if self.outer == "trained" else 0
        if update and self.shape.tie_word_embeddings:  # both parts are one by then
            update = max(update - matrix_bytes, 0)
        terms.append(term("optimizer", "workspace", update, self._step_formula()))
        return self._instant("backward of the embeddings", 0, terms, self._all_gradients())

    def update(self) -> Instant:
        """The optimizer's step."""
        sizes = [min(size, STEP_CHUNK) for size in self._trained_matrices()]
        workspace = max(self._step_bytes(largest_bucket(sizes), max(sizes, default=0)), self._low_rank_step_bytes())
        held = 0 if self.memory.fused_backward else workspace
        terms = [term("optimizer", "workspace", held, self._step_formula())]
        return self._instant("optimizer step", 0, terms, self._all_gradients(), in_pass=False)

    def evaluation(self) -> Instant:
        """A forward pass that keeps nothing for a backward one, between two steps."""
        whole = self._unpacking("frozen_layers") if self._count("frozen_layers") else 0
        terms = [*self._forward_alone(), term("evaluation", "workspace", whole, "one matrix made whole")]
        return self._instant("evaluation", 0, terms, [], in_pass=False)

    def _plain_weights(self) -> MemoryTerm:
        packs = self.memory.packs_frozen
        # Probed from host memory, layer by layer.
        layers = min(FETCH_SLOTS, self.num_layers) if packs else self.num_layers
        size = self.shape.num_parameters(layers)
        formula = f"({f'{layers} × P_layer' if packs else 'N_i × P_layer'} + P_outer) × {self.work.width} B"
        return MemoryTerm("plain_weights", "weights", size * self.work.width, formula, size)

    def _inside(self, index: int) -> list[MemoryTerm]:
        """What the backward pass of a layer holds beside what all layers below and at it have saved."""
        kind = self._kind(index)
        layer, gradient = self.activations[kind], self.activations[kind].first_gradient
        backward, recomputed = layer.backward, layer.saved if self.recomputes[kind] else 0
        update = self._fused_update(gradient // self.work.width)
        if self.has_low_rank[index] and self.frees_gradients:
            update = max(update, self._low_rank_step_bytes())
        if self.memory.offload_activations:  # what the layer saved, or its input, is back
            if recomputed:
                backward = layer.backward + self.work.stream_bytes
            else:
                backward, all_gradients = layer.fetched_backward, self._gradients_inside(kind)
                if layer.fetched_norm + all_gradients > backward + gradient:
                    backward, gradient = layer.fetched_norm, all_gradients
        if self.frees_gradients:
            at_update = layer.product_gradient + layer.first_gradient + update
            if recomputed or not self.memory.offload_activations:  # one of the saved is gone by then
                at_update -= layer.saved_product
            if recomputed and self.memory.offload_activations:
                at_update += self.work.stream_bytes
            backward, gradient = max(backward, at_update), 0
        return [
            term(kind, "activations", recomputed, f"layer {index} computed again"),
            term(kind, "workspace", backward, f"gradients of activations inside layer {index}"),
            term(kind, "workspace", self._unpacking(kind), "one matrix made whole"),
            term(kind, "gradients", gradient, f"inside layer {index}"),
        ]

    def _instant(
        self,
        name: str,
        num_below: int,
        terms: Iterable[MemoryTerm],
        gradients: Iterable[MemoryTerm],
        *,
        in_pass: bool = True,
    ) -> Instant:
        """Weights and states, activations of the lowest ``num_below`` layers, and what else there is."""
        held = [term for term in self.state.terms if term.kind != "gradients"]
        if self.memory.optimizer_states == "8bit":
            tables = CODE_BOOK_BYTES * (2 if self.optim.name == "badam" else 1)  # of the layer, and of all else
            held.append(term("optimizer", "workspace", tables, "tables of the 8-bit code"))
        where = HOST if self.memory.offload_activations else "activations"
        for kind in KINDS_OF_LAYERS:
            count = self._saving(kind, num_below)
            each = "w N d" if self.recomputes[kind] else f"{self.kept[kind]:,} B"
            num_bytes, formula = count * self.kept[kind], f"{count} layers × {each}"
            if count and kind == self._kind(0) and self._lowest_norm_is_silent:
                num_bytes -= norm_saved(self.work, trained=False)
                formula += " - the lowest norm's input"
            held.append(term(kind, where, num_bytes, formula))
        if self.memory.offload_activations:
            scale, normaliser = 4 * self.work.num_tokens, 4 * self.work.num_tokens * self.shape.num_attention_heads
            small = sum(size for size in (scale, scale, normaliser) if size < MIN_OFFLOADED_BYTES)
            count = sum(self._saving(kind, num_below) for kind in KINDS_OF_LAYERS if not self.recomputes[kind])
            held.append(term("all_layers", "activations", count * small, "too small to be moved"))
        if in_pass and self.work.has_mask and any(self.recomputes.values()):
            held.append(term("batch", "activations", self.work.num_tokens * self.work.sequence_length, "mask: N S"))
        if in_pass:
            formula = "tokens, labels and rotary angles: 16 N + 2 w S q/h"
            held.append(term("batch", "activations", self.work.batch_bytes, formula))
        present = tuple(term for term in (*held, *gradients, *terms) if term.num_bytes)
        return Instant(name, MemoryEstimate(present), in_pass)

    def _candidates(self) -> list[int]:
        """Layers of which one is the highest: between two of one kind the bytes rise or fall evenly.

        Not those that no gradient reaches.
        """
        ends = (0, 1, self.num_layers - 2, self.num_layers - 1)
        kinds = list(zip(self.is_new, self.has_low_rank, strict=True))
        return [
            index
            for index, kind in enumerate(kinds)
            if index >= self.silent
            if index in ends or not kinds[index - 1] == kind == kinds[index + 1]
        ]

    def _kind(self, index: int) -> str:
        return "new_layers" if self.is_new[index] else "frozen_layers"

    def _count(self, kind: str, num_below: int | None = None) -> int:
        """Layers of this kind among the lowest ``num_below``, or among all."""
        num_below = self.num_layers if num_below is None else num_below
        new = self.new_below[num_below]
        return new if kind == "new_layers" else num_below - new

    @property
    def _lowest_norm_is_silent(self) -> bool:
        """No gradient goes below the lowest layer's first norm, so that it saves no input."""
        return self.outer == "frozen" and not self.silent and not self.recomputes[self._kind(0)]

    def _saving(self, kind: str, num_below: int) -> int:
        """Of these, layers that save something for the backward pass."""
        silent = min(self.silent, num_below) if kind == "frozen_layers" else 0
        return self._count(kind, num_below) - silent

    def _all_gradients(self) -> list[MemoryTerm]:
        return [term for term in self.state.terms if term.kind == "gradients"]

    def _head_adapter(self) -> int:
        """Bytes of the gradients of the head's adapter; the embeddings' has as many."""
        if self.outer != "adapters" or self.frees_gradients:
            return 0
        return self.work.width * self.work.adapter_rank * (self.shape.vocab_size + self.shape.hidden_size)

    def _trained_in(self, kind: str) -> int:
        """Bytes of the gradients of all layers of a kind, or of their adapters."""
        if kind == "new_layers":
            return sum(self.state.bytes_of(name, "gradients") for name in ("new_layers", "low_rank_layers"))
        outer = self._head_adapter() * (1 if self.shape.tie_word_embeddings else 2)
        return self.state.bytes_of("adapters", "gradients") - outer

    def _gradients_inside(self, kind: str) -> int:
        """Bytes of all gradients of one layer, when its backward pass ends."""
        return self._trained_in(kind) // max(self._count(kind), 1)

    def _gradients_above(self, index: int) -> list[MemoryTerm]:
        """Gradients that exist when the backward pass is about to enter layer ``index - 1``."""
        if self.sums_gradients:
            return self._all_gradients()
        return [*self._head_gradients(), *self._gradients_of_layers_above(index)]

    def _head_gradients(self) -> list[MemoryTerm]:
        tied, terms = self.shape.tie_word_embeddings, []
        if self.outer == "trained" and (tied or not self.frees_gradients):
            name = "embeddings" if tied else "head"
            terms.append(term(name, "gradients", self.matrix * self.work.width, "the head's: w V d"))
        return [*terms, term("adapters", "gradients", self._head_adapter(), "the head's: w r (V + d)")]

    def _gradients_of_layers_above(self, index: int) -> Iterator[MemoryTerm]:
        for kind, component in GRADIENTS_OF.items():
            in_all, below = self._count(kind), self._count(kind, index)
            num_bytes = self._trained_in(kind) * (in_all - below) // max(in_all, 1)
            yield term(component, "gradients", num_bytes, f"of {in_all - below} layers above")

    def _trained_matrices(self) -> Iterator[int]:
        """Parameters of each trained matrix, in the model's order."""
        shape, rank = self.shape, self.work.adapter_rank
        outer_adapter = (rank * shape.hidden_size, shape.vocab_size * rank)
        outer = {"trained": (self.matrix,), "adapters": outer_adapter, "frozen": ()}[self.outer]
        adapted = [linear for linear in shape.linears if linear.name.rpartition(".")[2] in self.work.adapter_targets]
        in_frozen = [rank * side for linear in adapted for side in (linear.in_features, linear.out_features)]
        yield from outer
        for new, low_rank in zip(self.is_new, self.has_low_rank, strict=True):
            in_whole = shape.other_layer_matrices if low_rank else shape.layer_matrices
            yield from in_whole if new else in_frozen
        yield from () if shape.tie_word_embeddings else outer

    def _step_bytes(self, bucket: int, piece: int) -> int:
        has_master = self.train.precision == "fp32" or self.memory.master_weights is not False
        return step_bytes(bucket, piece, states=self.memory.optimizer_states, has_master=has_master)

    def _low_rank_step_bytes(self) -> int:
        """Workspace of the update of the largest of them; they are updated one after the other."""
        has_master = self.train.precision == "fp32" or self.memory.master_weights is True
        width, rank = self.work.width, self.optim.state_rank
        steps = [
            low_rank_step_bytes(self.optim.name, rows, columns, rank, width=width, has_master=has_master)
            for rows, columns in (low_rank_maps(self.shape, self.optim) if any(self.has_low_rank) else ())
        ]
        return max(steps, default=0)

    def _step_formula(self) -> str:
        return f"{self._step_bytes(1, 1)} B at most × {STEP_CHUNK:,} elements at once at most"

    def _fused_update(self, num_elements: int) -> int:
        """Workspace of an update inside the backward pass."""
        piece = min(STEP_CHUNK, num_elements)
        return self._step_bytes(piece, piece) if self.frees_gradients else 0

    def _unpacking(self, kind: str) -> int:
        """The largest packed matrix, made whole for a product."""
        if kind == "new_layers" or self.memory.frozen_weights == "full":
            return 0
        largest = max(linear.in_features * linear.out_features for linear in self.shape.linears)
        return unpack_bytes(self.memory.frozen_weights, largest, self.work.width)

    def _final_norm_saved(self) -> int:
        return norm_saved(self.work, trained=self.outer != "frozen")

    def _chunk_bytes(self, num_tokens: int) -> int:
        return (6 if self.work.width == 2 else 4) * self._chunk_rows(num_tokens) * self.shape.vocab_size

    def _chunk_rows(self, num_tokens: int) -> int:
        return min(self.train.loss_chunk_size, num_tokens)

    def _forward_alone(self) -> list[MemoryTerm]:
        """A forward pass that keeps nothing: the widest moment inside a layer, or the loss."""
        work = replace(self.work, num_sequences=self.eval_batch_size)
        layer = work.forward_bytes
        loss = work.stream_bytes + self._chunk_bytes(work.num_tokens)
        formula = "inside a layer: 4 w N d + 3 w N f or its attention; or the loss: w N d + 6 C V (fp32: 4 C V)"
        return [
            term("evaluation", "activations", work.batch_bytes, "tokens, labels and rotary angles"),
            term("evaluation", "workspace", max(layer, loss), formula),
        ]


def term(component: str, kind: str, num_bytes: int, formula: str) -> MemoryTerm:
    """Not of parameters."""
    return MemoryTerm(component, kind, num_bytes, formula)
