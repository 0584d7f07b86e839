"""Device memory at every point of a phase that can be its peak, for an unsharded model.

Weights and optimizer states are always in memory. In addition, the loss needs the activations of all layers and its own
workspace; the backward pass of a layer needs the activations of the layers below it and the gradients of those above
it; the update needs all gradients. Excludes the device's context and libraries (``memory.reserve``).

Symbols: N tokens per micro-batch, d hidden size, V vocabulary size, C rows per chunk of the loss, w bytes per element.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate, chain
from math import prod

from steplm.config import RunConfig
from steplm.cost.activations import Workload, layer_activations, norm_backward, norm_saved, recomputes
from steplm.cost.formats import (
    CODE_BOOK_BYTES,
    MIN_OFFLOADED_BYTES,
    STEP_CHUNK,
    largest_bucket,
    step_bytes,
    unpack_bytes,
)
from steplm.cost.rules import ADAMW, RULES, matrices_of_layer, split_by_rule
from steplm.cost.terms import (
    FETCH_SLOTS,
    Subject,
    adapter_shapes,
    component_of,
    embedding_adapter_shapes,
    model_state,
)
from steplm.schedule import Adapter, Frozen, Phase, Role, Trained
from steplm.types import HOST, Instant, MemoryEstimate, MemoryTerm, ModelShape, TensorShape, local_size


class Instants:
    """Builds the instants of a phase."""

    def __init__(self, config: RunConfig, shape: ModelShape, phase: Phase, state: MemoryEstimate | None = None) -> None:
        train, memory = config.train, config.memory
        self.config, self.shape, self.phase = config, shape, phase
        self.train, self.memory, self.optim = train, memory, config.optim
        self.work = Workload.of(config, shape)
        self.subject, self.state = Subject(config, shape, phase), state or model_state(config, shape, phase)
        self.outside, self.num_layers = phase.embeddings_and_head, phase.num_hidden_layers
        self.trains_outside = isinstance(self.outside, Trained)
        self.outside_rank = self.outside.rank if isinstance(self.outside, Adapter) else 0
        self.updates_on_device_in_pass = memory.fused_backward and not memory.offload_optimizer
        self.frees_gradients = memory.fused_backward or memory.offload_optimizer  # each one once it is complete
        self.kinds = tuple(phase.groups)  # the distinct roles of layers
        one_of = {kind: kind for kind in self.kinds}
        same = {id(role): one_of[role] for role in {id(role): role for role in phase.layers}.values()}
        self.roles = [same[id(role)] for role in phase.layers]  # equal roles become one object, compared by identity
        # For each kind, how many of its layers are among the lowest 0, 1, 2 ...
        self.below = {kind: [0, *accumulate(role is kind for role in self.roles)] for kind in self.kinds}
        self.recomputes = {kind: recomputes(config, kind) for kind in self.kinds}
        self.activations = {kind: layer_activations(self.work, kind) for kind in self.kinds}
        self.kept = {
            kind: self.work.stream_bytes if self.recomputes[kind] else self.activations[kind].saved
            for kind in self.kinds
        }
        # With gradient accumulation, all gradients exist at all times from the second micro-batch on.
        self.sums_gradients = config.micro_batches > 1 and not memory.offload_optimizer
        # Layers that the backward pass does not reach save no activations.
        self.unreached = phase.num_layers_without_backward
        self.matrix = shape.vocab_size * shape.hidden_size  # parameters of the embeddings, or of the head

    def in_order(self, *, grows: bool) -> tuple[Instant, ...]:
        """All instants in chronological order; ``grows``: whether the phase begins with a growth or a merge."""
        growth = (self.growth(),) if grows else ()
        backward = (self.final_norm(), self.highest_layer(), self.embeddings())
        return (*growth, self.loss(), *backward, self.update(), self.evaluation())

    def growth(self) -> Instant:
        """The loss probe on the grown model's plain weights, before the optimizer exists."""
        return Instant("growth", MemoryEstimate((self._plain_weights(), *self._forward_alone())))

    def loss(self) -> Instant:
        """The chunked loss, with all activations saved; the same pass computes the head's gradient."""
        w, N, V = self.work.width, self.work.num_tokens, self.shape.vocab_size
        chunk = self._chunk_bytes(N)
        if self.trains_outside and w == 2:  # the head's gradient is computed from logits already rounded to bf16
            chunk = max(chunk, self._chunk_rows(N) * 2 * V + 2 * self.matrix)
        adapted = self.outside_rank
        saved = 0 if self.memory.offload_activations else self._final_norm_saved()
        size = "8 C V" if self.work.caps_logits else "6 C V (fp32: 4 C V)"
        terms = [
            MemoryTerm("loss", "activations", saved, "final norm: 4 N d + w N d"),
            MemoryTerm("loss", "workspace", 2 * self.work.stream_bytes, "hidden states and their gradient: 2 w N d"),
            MemoryTerm("loss", "workspace", chunk, f"chunk: {size}, or 2 C V + 2 V d"),
            MemoryTerm("loss", "workspace", 3 * w * N * adapted, "adapter of the head: 3 w N r"),
            MemoryTerm("head", "gradients", 4 * self.matrix * self.trains_outside, "summed in fp32: 4 V d"),
            MemoryTerm("adapters", "gradients", 4 * V * adapted, "of the head, summed in fp32: 4 V r"),
        ]
        return self._instant("loss", self.num_layers, terms, self._all_gradients() if self.sums_gradients else [])

    def final_norm(self) -> Instant:
        """The backward pass of the norm after the last layer, with all activations still saved.

        With a fused backward pass, the head is updated just before.
        """
        backward, formula = norm_backward(self.work), "16 N d + w N d"
        update = self._fused_update(self.matrix) if self.trains_outside else 0
        saved = self._final_norm_saved()
        if update and not self.shape.tie_word_embeddings:
            before = self.work.stream_bytes + self.matrix * self.work.width + update
            saved_before = 0 if self.memory.offload_activations else saved  # fetched only for the norm's backward
            if before + saved_before > backward + saved:
                backward, saved = before, saved_before
                formula = "update of the head: w N d + w V d and the optimizer's workspace"
        terms = [MemoryTerm("loss", "activations", saved, "final norm: 4 N d + w N d")]
        terms.append(MemoryTerm("loss", "workspace", backward, formula))
        top = self.num_layers
        # At the peak of the norm's backward, the head's gradient has left and the norm's own is in transfer.
        if not isinstance(self.outside, Frozen):
            terms.append(self._leaving(self.work.width * self.shape.hidden_size, "the norm's"))
        return self._instant("backward of the final norm", top, terms, self._gradients_above(top))

    def highest_layer(self) -> Instant:
        """The backward pass of the layer with the highest memory."""
        per_layer = {kind: self._gradients_of_one(kind) * (not self.sums_gradients) for kind in self.kinds}
        inside = {
            kind: sum(term.num_bytes for term in self._inside(self.roles.index(kind)) if term.kind != HOST)
            for kind in self.kinds
        }

        def held(index: int) -> int:
            kept = 0 if self.memory.offload_activations else 1
            below = sum(self.kept[kind] * self._saving(kind, index + 1) for kind in self.kinds)
            above = sum(per_layer[kind] * self._above(kind, index + 1) for kind in self.kinds)
            return kept * below + inside[self.roles[index]] + above

        index = max(self._candidates(), key=held)
        name, above = f"backward of layer {index}", self._gradients_above(index + 1)
        return self._instant(name, index + 1, self._inside(index), above)

    def embeddings(self) -> Instant:
        """The end of the backward pass: no activations, all gradients."""
        terms = [MemoryTerm("embeddings", "workspace", self.work.stream_bytes, "gradient of the hidden states: w N d")]
        matrix_bytes = self.matrix * self.work.width
        if self.trains_outside and (self.frees_gradients or self.sums_gradients):
            terms.append(MemoryTerm("embeddings", "gradients", matrix_bytes, "one more, before it is added: w V d"))
        if self.trains_outside and self.shape.tie_word_embeddings:
            terms.append(MemoryTerm("embeddings", "gradients", matrix_bytes, "the head's part: w V d"))
        update = self._fused_update(self.matrix) if self.trains_outside else 0
        if update and self.shape.tie_word_embeddings:  # the head's part has been added by then
            update = max(update - matrix_bytes, 0)
        terms.append(MemoryTerm("optimizer", "workspace", update, self._step_formula()))
        terms.append(self._leaving(self.work.width * self.shape.hidden_size, "the lowest norm's"))
        terms.append(self._products_in_pass())
        return self._instant("backward of the embeddings", 0, terms, self._all_gradients())

    def update(self) -> Instant:
        """The optimizer's step."""
        terms = [] if self.memory.delay_update else self._update_terms()
        return self._instant("optimizer step", 0, terms, self._all_gradients(), in_pass=False)

    def evaluation(self) -> Instant:
        """A forward pass between two steps that saves nothing for a backward pass."""
        whole = max(map(self._unpacking, self.kinds))
        terms = [*self._forward_alone(), MemoryTerm("evaluation", "workspace", whole, "one matrix, dequantized")]
        return self._instant("evaluation", 0, terms, [], in_pass=False)

    def _update_terms(self) -> list[MemoryTerm]:
        sizes = [min(size, STEP_CHUNK) for size in self._adamw_matrices()]
        rules = [RULES[rule].step_bytes(shapes, self.subject.setting(rule)) for rule, shapes in self._taken().items()]
        workspace = max([self._step_bytes(largest_bucket(sizes), max(sizes, default=0)), *rules])  # one after the other
        held = 0 if self.updates_on_device_in_pass else workspace
        where = HOST if self.memory.offload_optimizer else "workspace"
        terms = [MemoryTerm("optimizer", where, held, self._step_formula())]
        if self.memory.offload_optimizer:
            terms.append(
                MemoryTerm("optimizer", "workspace", self._product_bytes(), "Newton–Schulz of matrices of one shape")
            )
        return terms

    def _plain_weights(self) -> MemoryTerm:
        fetches = self.memory.fetches_layers
        # With quantized or offloaded weights, the probe fetches the layers from host memory one by one.
        layers = min(FETCH_SLOTS, self.num_layers) if fetches else self.num_layers
        size = self.shape.num_parameters(layers)
        formula = f"({f'{layers} × P_layer' if fetches else 'N_i × P_layer'} + P_outer) × {self.work.width} B"
        return MemoryTerm("plain_weights", "weights", size * self.work.width, formula, size)

    def _inside(self, index: int) -> list[MemoryTerm]:
        """Memory of a layer's backward pass beyond what this layer and those below it have saved."""
        kind, component = self.roles[index], component_of(self.roles[index])
        layer, gradient = self.activations[kind], self.activations[kind].first_gradient
        backward, recomputed = layer.backward, layer.saved if self.recomputes[kind] else 0
        update = self._fused_update(gradient // self.work.width)
        if self.updates_on_device_in_pass and not isinstance(kind, Frozen):
            update = max(update, self._largest_step_bytes(kind))
        if self.memory.offload_activations:  # the layer's saved tensors, or its input, are back on the device
            if recomputed:
                backward = layer.backward + self.work.stream_bytes
            else:
                backward, all_gradients = layer.fetched_backward, self._gradients_inside(kind)
                if layer.fetched_norm + all_gradients > backward + gradient:
                    backward, gradient = layer.fetched_norm, all_gradients
        leaving = 0
        if self.memory.offload_optimizer:  # a gradient is computed while the previous one is in transfer
            leaving = layer.first_gradient
        elif self.frees_gradients:
            at_update = layer.product_gradient + layer.first_gradient + update
            if recomputed or not self.memory.offload_activations:  # one of the saved tensors has been freed by then
                at_update -= layer.saved_product
            if recomputed and self.memory.offload_activations:
                at_update += self.work.stream_bytes
            backward, gradient = max(backward, at_update), 0
        if self.memory.offload_activations and not recomputed:
            attention = layer.fetched_attention
        else:
            attention = layer.attention_backward + self.work.stream_bytes * self.memory.offload_activations
        attention_gradient = 0 if self.frees_gradients or self.sums_gradients else layer.attention_gradient
        if self.work.num_scores and attention + attention_gradient > backward + gradient:
            backward, gradient = attention, attention_gradient
        return [
            self._leaving(leaving, f"inside layer {index}"),
            self._products_in_pass(),
            MemoryTerm(component, "activations", recomputed, f"layer {index} computed again"),
            MemoryTerm(component, "workspace", backward, f"gradients of activations inside layer {index}"),
            MemoryTerm(component, "workspace", self._unpacking(kind), "one matrix, dequantized"),
            MemoryTerm(component, "gradients", gradient, f"inside layer {index}"),
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
        """Weights, states, activations of the lowest ``num_below`` layers, ``gradients`` and the other ``terms``."""
        held = [term for term in self.state.terms if term.kind != "gradients"]
        if self.memory.optimizer_states == "8bit":
            where = HOST if self.memory.offload_optimizer else "workspace"
            held.append(MemoryTerm("optimizer", where, CODE_BOOK_BYTES, "tables of the 8-bit code"))
        if self.memory.delay_update:  # the previous step's update runs at the same time
            held += self._update_terms()
        where = HOST if self.memory.offload_activations else "activations"
        for kind in self.kinds:
            count = self._saving(kind, num_below)
            each = "w N d" if self.recomputes[kind] else f"{self.kept[kind]:,} B"
            num_bytes, formula = count * self.kept[kind], f"{count} layers × {each}"
            if count and kind == self.roles[0] and self._lowest_norm_saves_no_input:
                num_bytes -= norm_saved(self.work, trained=False)
                formula += " - the lowest norm's input"
            held.append(MemoryTerm(component_of(kind), where, num_bytes, formula))
        if self.memory.offload_activations:
            scale, normalizer = 4 * self.work.num_tokens, 4 * self.work.num_tokens * self.shape.num_attention_heads
            small = sum(size for size in (scale, scale, normalizer) if size < MIN_OFFLOADED_BYTES)
            count = sum(self._saving(kind, num_below) for kind in self.kinds if not self.recomputes[kind])
            held.append(MemoryTerm("all_layers", "activations", count * small, "too small to be moved"))
        if in_pass and self.work.mask_bytes and any(self.recomputes.values()):
            held.append(MemoryTerm("batch", "activations", self.work.mask_bytes, "mask: N S, or S S for all sequences"))
        if in_pass:
            formula = "tokens, labels and rotary angles: 16 N + 2 w S q/h"
            held.append(MemoryTerm("batch", "activations", self.work.batch_bytes, formula))
        present = tuple(term for term in (*held, *gradients, *terms) if term.num_bytes)
        return Instant(name, MemoryEstimate(present), in_pass)

    def _candidates(self) -> list[int]:
        """Layers that can be the peak: within a run of layers of one kind, memory changes linearly.

        Excludes layers that no gradient reaches.
        """
        ends = (0, 1, self.num_layers - 2, self.num_layers - 1)
        return [
            index
            for index, role in enumerate(self.roles)
            if index >= self.unreached
            if index in ends or not (self.roles[index - 1] is role is self.roles[index + 1])
        ]

    def _above(self, kind: Role, index: int) -> int:
        """How many layers of this kind there are from layer ``index`` up."""
        return self.below[kind][-1] - self.below[kind][index]

    @property
    def _lowest_norm_saves_no_input(self) -> bool:
        """Whether no gradient goes below the lowest layer's first norm, which then needs no saved input."""
        return isinstance(self.outside, Frozen) and not self.unreached and not self.recomputes[self.roles[0]]

    def _saving(self, kind: Role, num_below: int) -> int:
        """How many of these layers save something for the backward pass."""
        unreached = min(self.unreached, num_below) if isinstance(kind, Frozen) else 0
        return self.below[kind][num_below] - unreached

    def _all_gradients(self) -> list[MemoryTerm]:
        return [term for term in self.state.terms if term.kind == "gradients"]

    def _trained_shapes(self, kind: Role) -> tuple[TensorShape, ...]:
        """Shapes of all trained tensors of a layer of this kind."""
        if isinstance(kind, Adapter):
            return adapter_shapes(self.shape, kind)
        return self.shape.layer_shapes if isinstance(kind, Trained) else ()

    def _gradients_of_one(self, kind: Role) -> int:
        """Bytes of the gradients of one layer of this kind that stay after its backward pass."""
        return 0 if self.frees_gradients else self.work.width * sum(map(prod, self._trained_shapes(kind)))

    def _gradients_inside(self, kind: Role) -> int:
        """Gradient bytes of one layer at the end of its backward pass."""
        return self._gradients_of_one(kind)

    def _gradients_above(self, index: int) -> list[MemoryTerm]:
        """Gradients that exist when the backward pass is about to enter layer ``index - 1``."""
        if self.sums_gradients:
            return self._all_gradients()
        return [*self._head_gradients(), *self._gradients_of_layers_above(index)]

    def _head_gradients(self) -> list[MemoryTerm]:
        tied, terms = self.shape.tie_word_embeddings, []
        if self.trains_outside and (tied or not self.frees_gradients):
            name = "embeddings" if tied else "head"
            terms.append(MemoryTerm(name, "gradients", self.matrix * self.work.width, "the head's: w V d"))
        adapter = self.outside_rank * (self.shape.vocab_size + self.shape.hidden_size) * (not self.frees_gradients)
        return [*terms, MemoryTerm("adapters", "gradients", self.work.width * adapter, "the head's: w r (V + d)")]

    def _gradients_of_layers_above(self, index: int) -> Iterator[MemoryTerm]:
        for kind in self.kinds:
            above = self._above(kind, index)
            component = "adapters" if isinstance(kind, Adapter) else component_of(kind)
            yield MemoryTerm(component, "gradients", above * self._gradients_of_one(kind), f"of {above} layers above")

    def _adamw_matrices(self) -> Iterator[int]:
        """Parameters, on this rank, of each matrix that AdamW updates, in the model's order."""

        def sizes(shapes: Iterable[TensorShape]) -> list[int]:
            return [local_size(shape, self.subject.num_shards) for shape in shapes if len(shape) > 1]

        outside: list[int] = []
        if self.trains_outside:
            outside = sizes([(self.shape.vocab_size, self.shape.hidden_size)])
        elif isinstance(self.outside, Adapter):
            outside = sizes(embedding_adapter_shapes(self.shape, self.outside.rank))
        in_layer = {kind: [] if isinstance(kind, Frozen) else sizes(self._split(kind)[1]) for kind in self.kinds}
        yield from outside
        yield from chain.from_iterable(map(in_layer.__getitem__, self.roles))
        yield from () if self.shape.tie_word_embeddings else outside

    def _split(self, kind: Trained | Adapter) -> tuple[tuple[TensorShape, ...], tuple[TensorShape, ...]]:
        """Shapes that the rule of a layer of this kind updates, and shapes that AdamW updates."""
        shapes = self._trained_shapes(kind)
        candidates = shapes if isinstance(kind, Adapter) else matrices_of_layer(self.shape)
        return split_by_rule(shapes, candidates, kind.rule, self.optim)

    def _step_bytes(self, bucket: int, piece: int) -> int:
        setting = self.subject.setting(ADAMW)
        return step_bytes(bucket, piece, states=setting.states, masters=setting.masters)

    def _taken(self) -> dict[str, list[TensorShape]]:
        """For each rule, the shapes that it updates in all layers."""
        taken: dict[str, list[TensorShape]] = defaultdict(list)
        for kind, count in self.phase.groups.items():
            if not isinstance(kind, Frozen):
                taken[kind.rule] += [*self._split(kind)[0]] * count
        return taken

    def _largest_step_bytes(self, kind: Trained | Adapter) -> int:
        """The largest workspace of updating a single matrix in a layer of this kind."""
        setting = self.subject.setting(kind.rule)
        return max((RULES[kind.rule].step_bytes([shape], setting) for shape in self._split(kind)[0]), default=0)

    def _step_formula(self) -> str:
        return f"{self._step_bytes(1, 1)} B at most × {STEP_CHUNK:,} elements at once at most"

    def _fused_update(self, num_elements: int) -> int:
        """Workspace of an update inside the backward pass."""
        piece = min(STEP_CHUNK, num_elements)
        return self._step_bytes(piece, piece) if self.updates_on_device_in_pass else 0

    def _leaving(self, num_bytes: int, whose: str) -> MemoryTerm:
        """A gradient in transfer to the host, which stays in memory until the next one is complete."""
        return MemoryTerm("leaving", "gradients", num_bytes * self.memory.offload_optimizer, f"{whose}, to the host")

    def _products_in_pass(self) -> MemoryTerm:
        """Device workspace of updates in host memory that are made during the backward pass."""
        held = self._product_bytes() * (self.memory.fused_backward and self.memory.offload_optimizer)
        return MemoryTerm("optimizer", "workspace", held, "Newton–Schulz of matrices of one shape")

    def _product_bytes(self) -> int:
        """Device workspace of updating matrices that are in host memory."""
        held = [0]
        for rule, shapes in self._taken().items():
            if (product_bytes := RULES[rule].product_bytes) is not None:
                held.append(product_bytes(shapes, self.subject.setting(rule)))
        return max(held)

    def _unpacking(self, kind: Role) -> int:
        """Bytes of dequantizing the largest frozen matrix for a matmul."""
        if isinstance(kind, Trained) or self.memory.frozen_weights == "full":
            return 0
        largest = max(linear.weights for linear in self.shape.linears)
        return unpack_bytes(self.memory.frozen_weights, largest, self.work.width)

    def _final_norm_saved(self) -> int:
        return norm_saved(self.work, trained=not isinstance(self.outside, Frozen))

    def _chunk_bytes(self, num_tokens: int) -> int:
        per_logit = 8 if self.work.caps_logits else 6 if self.work.width == 2 else 4
        return per_logit * self._chunk_rows(num_tokens) * self.shape.vocab_size

    def _chunk_rows(self, num_tokens: int) -> int:
        return min(self.train.loss_chunk_size, num_tokens)

    def _forward_alone(self) -> list[MemoryTerm]:
        """A forward pass that saves nothing: the peak inside a layer, or the loss."""
        work = replace(self.work, num_sequences=self.config.eval_batch_size)
        layer = work.forward_bytes
        loss = work.stream_bytes + self._chunk_bytes(work.num_tokens)
        formula = "inside a layer: 4 w N d + 3 w N f or its attention; or the loss: w N d + 6 C V (fp32: 4 C V)"
        return [
            MemoryTerm("evaluation", "activations", work.batch_bytes, "tokens, labels and rotary angles"),
            MemoryTerm("evaluation", "workspace", max(layer, loss), formula),
        ]
