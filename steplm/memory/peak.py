"""All that the device holds, at each moment of a stage that can be its highest.

Every moment holds the weights and the optimizer's states. Beside them: the loss holds the activations of all layers
and its own workspace; the backward pass of a layer holds the activations of the layers below it and the gradients of
those above it; the update holds all gradients. Left out: the device's context and libraries (``memory.reserve``).

N tokens of a micro-batch, d hidden size, V vocabulary, C rows of the loss at once, w bytes of a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from steplm.config import MemoryConfig, TrainConfig
from steplm.memory.activations import Workload, is_modelled, layer_activations, norm_backward, norm_saved
from steplm.memory.formats import STEP_CHUNK, step_bytes_per_element, unpack_bytes
from steplm.memory.terms import FETCH_SLOTS
from steplm.types import Instant, MemoryEstimate, MemoryTerm, ModelShape, PeakEstimate

GRADIENTS_OF = {"new_layers": "new_layers", "frozen_layers": "adapters"}  # kind of layer -> its trained part
KINDS_OF_LAYERS = tuple(GRADIENTS_OF)


def estimate_peak(
    shape: ModelShape,
    state: MemoryEstimate,
    *,
    train: TrainConfig,
    memory: MemoryConfig,
    num_layers: int,
    new_layers: Sequence[int],
    adapter_rank: int = 0,
    adapter_targets: tuple[str, ...] = (),
    outer: str = "trained",
    eval_batch_size: int | None = None,
) -> PeakEstimate | None:
    """The highest moments of one stage, per rank; None for families that ``activations`` does not count.

    Args:
        state: the stage's model state, embeddings and head counted.
        new_layers: indices of the layers that are trained as a whole.
        adapter_rank, adapter_targets: of the adapters on the others; rank 0: they have none.
        outer: embeddings, final norm and head are "trained", "frozen" or under "adapters".
        eval_batch_size: sequences at once in an evaluation; default: the training batch size.
    """
    if not is_modelled(shape):
        return None
    work = Workload(
        shape,
        train.precision,
        train.per_device_train_batch_size,
        train.sequence_length,
        adapter_rank,
        adapter_targets if adapter_rank else (),
    )
    moments = _Moments(work, state, train, memory, num_layers, frozenset(new_layers), outer)
    evaluation = moments.evaluation(eval_batch_size or train.per_device_train_batch_size)
    backward = (moments.final_norm(), moments.highest_layer(), moments.embeddings())
    return PeakEstimate((moments.growth(), moments.loss(), *backward, moments.update(), evaluation))


class _Moments:
    """The moments of a stage, each from the same few numbers."""

    def __init__(
        self,
        work: Workload,
        state: MemoryEstimate,
        train: TrainConfig,
        memory: MemoryConfig,
        num_layers: int,
        new_layers: frozenset[int],
        outer: str,
    ) -> None:
        self.work, self.shape, self.state = work, work.shape, state
        self.train, self.memory, self.outer = train, memory, outer
        self.num_layers = num_layers
        self.is_new = [index in new_layers for index in range(num_layers)]
        self.new_below = [0, *accumulate(self.is_new)]  # new layers among the lowest 0, 1, 2 ...
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
        self.sums_gradients = train.gradient_accumulation_steps > 1
        self.head_bytes = work.width * self.shape.vocab_size * self.shape.hidden_size

    def growth(self) -> Instant:
        """The grown model's plain weights, on which the loss is probed before there is an optimizer."""
        shape, layers = self.shape, self.num_layers
        packs = self.memory.frozen_weights != "full" or self.memory.offload_frozen
        layers = min(FETCH_SLOTS, layers) if packs else layers  # probed from host memory, layer by layer
        size = shape.num_parameters(layers)
        formula = f"{f'{layers} × P_layer' if packs else 'N_i × P_layer'} + P_outer × {self.work.width} B"
        weights = MemoryTerm("plain_weights", "weights", size * self.work.width, formula, size)
        return Instant("growth", MemoryEstimate((weights, *self._forward_alone(self.work.num_sequences))))

    def loss(self) -> Instant:
        """The chunked loss: all activations wait, and the head's gradient is made in the same pass."""
        w, N = self.work.width, self.work.num_tokens
        rows = min(self.train.loss_chunk_size, N) * self.shape.vocab_size
        matrix = self.shape.vocab_size * self.shape.hidden_size
        trained = self.outer == "trained"
        chunk = 6 * rows if w == 2 else 4 * rows
        if trained:  # the last product, of the matrix's size, comes when the chunk's logits are rounded
            chunk = max(chunk, 2 * rows + 2 * matrix, 2 * matrix) if w == 2 else chunk
        stream = self.work.stream_bytes
        terms = [
            _term("loss", "activations", self._final_norm_saved(), "final norm: 4 N d + w N d"),
            _term("loss", "workspace", 2 * stream, "hidden states and their gradient: 2 w N d"),
            _term("loss", "workspace", chunk, "chunk: 6 C V (fp32: 4 C V), or 2 C V + 2 V d"),
            _term("head", "gradients", 4 * matrix if trained else 0, "summed in fp32: 4 V d"),
        ]
        return self._instant("loss", self.num_layers, terms, self._summed_gradients())

    def final_norm(self) -> Instant:
        """The backward pass of the norm above the last layer: all activations still wait."""
        terms = [
            _term("loss", "activations", self._final_norm_saved(), "final norm: 4 N d + w N d"),
            _term("loss", "workspace", norm_backward(self.work), "16 N d + w N d"),
        ]
        top = self.num_layers
        return self._instant("backward of the final norm", top, terms, self._gradients_above(top))

    def highest_layer(self) -> Instant:
        """The backward pass of the layer at which most is held."""
        gradients = {kind: self.state.bytes_of(component, "gradients") for kind, component in GRADIENTS_OF.items()}
        per_layer = {kind: gradients[kind] // max(self._count(kind), 1) for kind in KINDS_OF_LAYERS}

        def held(index: int) -> int:
            kind = self._kind(index)
            inside = self.activations[kind].backward + self.recomputes[kind] * self.activations[kind].saved
            inside += self._unpacking(kind)
            below = sum(self.kept[kind] * self._count(kind, index + 1) for kind in KINDS_OF_LAYERS)
            above = (
                0
                if self.sums_gradients
                else sum(
                    per_layer[kind] * (self._count(kind) - self._count(kind, index + 1)) for kind in KINDS_OF_LAYERS
                )
            )
            return below + inside + above

        return self._layer(max(range(self.num_layers), key=held))

    def embeddings(self) -> Instant:
        """The end of the backward pass: no activations, all gradients."""
        terms = [_term("embeddings", "workspace", self.work.stream_bytes, "gradient of the hidden states: w N d")]
        if self.outer == "trained" and (self.memory.fused_backward or self.sums_gradients):
            terms.append(_term("embeddings", "gradients", self.head_bytes, "one more, before it is added: w V d"))
        elif self.outer == "trained" and self.shape.tie_word_embeddings:
            terms.append(_term("embeddings", "gradients", self.head_bytes, "the head's part: w V d"))
        return self._instant("backward of the embeddings", 0, terms, self._all_gradients())

    def update(self) -> Instant:
        """The optimizer's step."""
        terms = [] if self.memory.fused_backward else [self._step_workspace()]
        return self._instant("optimizer step", 0, terms, self._all_gradients(), in_pass=False)

    def evaluation(self, batch_size: int) -> Instant:
        """A forward pass that keeps nothing for a backward one, between two steps."""
        return self._instant("evaluation", 0, self._forward_alone(batch_size), [], in_pass=False)

    def _unpacking(self, kind: str) -> int:
        """The largest packed matrix, made whole for a product."""
        if kind == "new_layers":
            return 0
        largest = max(linear.in_features * linear.out_features for linear in self.shape.linears)
        return unpack_bytes(self.memory.frozen_weights, largest, self.work.width)

    def _final_norm_saved(self) -> int:
        return norm_saved(self.work, trained=self.outer != "frozen")

    def _layer(self, index: int) -> Instant:
        kind = self._kind(index)
        layer = self.activations[kind]
        terms = [_term(kind, "workspace", layer.backward - layer.backward_gradients, f"inside layer {index}")]
        if self.recomputes[kind]:
            terms.append(_term(kind, "activations", layer.saved, f"layer {index} computed again"))
        terms.append(_term(kind, "gradients", layer.backward_gradients, f"inside layer {index}"))
        terms.append(_term(kind, "workspace", self._unpacking(kind), "one matrix made whole"))
        if self.memory.fused_backward:
            terms.append(self._step_workspace())
        return self._instant(f"backward of layer {index}", index + 1, terms, self._gradients_above(index + 1))

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
        for kind in KINDS_OF_LAYERS:
            count = self._count(kind, num_below)
            each = "w N d" if self.recomputes[kind] else f"{self.kept[kind]:,} B"
            held.append(_term(kind, "activations", count * self.kept[kind], f"{count} layers × {each}"))
        if in_pass:
            held.append(_term("batch", "activations", 16 * self.work.num_tokens, "tokens and labels: 16 N"))
        present = tuple(term for term in (*held, *gradients, *terms) if term.num_bytes)
        return Instant(name, MemoryEstimate(present), in_pass)

    def _kind(self, index: int) -> str:
        return "new_layers" if self.is_new[index] else "frozen_layers"

    def _count(self, kind: str, num_below: int | None = None) -> int:
        """Layers of this kind among the lowest ``num_below``, or among all."""
        num_below = self.num_layers if num_below is None else num_below
        new = self.new_below[num_below]
        return new if kind == "new_layers" else num_below - new

    def _all_gradients(self) -> list[MemoryTerm]:
        return [term for term in self.state.terms if term.kind == "gradients"]

    def _summed_gradients(self) -> list[MemoryTerm]:
        return self._all_gradients() if self.sums_gradients else []

    def _gradients_above(self, index: int) -> list[MemoryTerm]:
        """Gradients that exist when the backward pass is about to enter layer ``index - 1``."""
        if self.sums_gradients:
            return self._all_gradients()
        tied = self.shape.tie_word_embeddings
        terms = []
        if self.outer == "trained" and (tied or not self.memory.fused_backward):
            name = "embeddings" if tied else "head"
            terms.append(_term(name, "gradients", self.head_bytes, "the head's: w V d"))
        for kind, component in GRADIENTS_OF.items():
            in_all, below = self._count(kind), self._count(kind, index)
            num_bytes = self.state.bytes_of(component, "gradients") * (in_all - below) // max(in_all, 1)
            terms.append(_term(component, "gradients", num_bytes, f"of {in_all - below} layers above"))
        return terms

    def _step_workspace(self) -> MemoryTerm:
        trained = sum(term.num_parameters for term in self.state.terms if term.kind == "optimizer")
        per_element = step_bytes_per_element(
            self.train.precision, states=self.memory.optimizer_states, master_weights=self.memory.master_weights
        )
        formula = f"{per_element} B × at most {STEP_CHUNK:,} elements at once"
        return _term("optimizer", "workspace", per_element * min(STEP_CHUNK, trained), formula)

    def _forward_alone(self, batch_size: int) -> list[MemoryTerm]:
        w, num_tokens = self.work.width, batch_size * self.work.sequence_length
        rows = min(self.train.loss_chunk_size, num_tokens) * self.shape.vocab_size
        linears = {linear.name.rpartition(".")[2]: linear for linear in self.shape.linears}
        layer = w * num_tokens * (3 * linears["gate_proj"].out_features + 2 * self.shape.hidden_size)
        loss = w * num_tokens * self.shape.hidden_size + (6 if w == 2 else 4) * rows
        formula = "a layer: 3 w N f + 2 w N d, or the loss: w N d + 6 C V (fp32: 4 C V)"
        return [_term("evaluation", "workspace", max(layer, loss), formula)]


def _term(component: str, kind: str, num_bytes: int, formula: str) -> MemoryTerm:
    return MemoryTerm(component, kind, num_bytes, formula)
