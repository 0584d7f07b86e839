"""The work of a step: FLOPs are the plan's, bytes are those of the real operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from steplm.config import RunConfig, load_config
from steplm.cost.flops import recomputed_flops_per_token, training_flops_per_token
from steplm.cost.transfers import host_transfers
from steplm.cost.work import KINDS, Work, step_work
from steplm.models.build import hf_config
from steplm.optim.adamw import AdamW
from steplm.optim.muon import Muon
from steplm.optim.scale import SCALE
from steplm.planner.shape import shape_from_hf_config
from steplm.schedule import Adapter, Frozen, Phase, Trained
from steplm.training.speeds import make_trial
from steplm.types import LinearShape, ModelShape

VALUES: dict[str, Any] = {
    "model": {
        "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 320,
    },
    "data": {"train": "unused"},
    "plan": {"num_stages": 2, "layers": [2, 1], "total_tokens": "1M"},
    "pet": {"rank": 8},
    "train": {"sequence_length": 32, "per_device_train_batch_size": 4, "loss_chunk_size": 64, "device": "cpu"},
}  # fmt: skip
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER = Adapter(8, 32.0, TARGETS)
SHAPE = shape_from_hf_config(load_config(VALUES).model.hf_config())


def work_of(phase: Phase, *overrides: str, config: RunConfig | None = None) -> tuple[Work, ...]:
    work = step_work(config or load_config(VALUES, overrides), SHAPE, phase, on_cuda=False)
    assert work is not None
    return work


def total(work: Iterable[Work], kind: str, part: str | None = None) -> float:
    return sum(each.amount for each in work if kind in each.kind and part in (None, each.part))


@pytest.mark.parametrize(
    ("layers", "outside"),
    [
        ({Trained(): 3}, Trained()),
        ({ADAPTER: 2, Trained(): 1}, Trained()),
        ({ADAPTER: 2, Trained(): 1}, Adapter(8, 32.0, ())),
        ({Trained(): 1, Frozen(): 2}, Frozen()),
        ({Adapter(8, 32.0, ("q_proj",)): 2, Trained(): 1}, Trained()),
    ],
)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_flops_of_products_and_attention_are_the_plans(
    make_phase: Callable[..., Phase], layers: Any, outside: Any, micro_batches: int
) -> None:
    config = load_config(
        VALUES, [f"train.gradient_accumulation_steps={micro_batches}", "train.gradient_checkpointing=frozen"]
    )
    phase = make_phase(layers, outside)
    work = work_of(phase, config=config)
    # The backward pass of the attention makes the scores again: 2.5 times the forward's, where the plan has 2.
    attention = total(work, "attention") - 0.2 * total(work, "attention", "layers backward")
    low_rank = 0 if not isinstance(outside, Adapter) else 6 * 8 * SHAPE.hidden_size * config.step_tokens  # in no loss
    flops = total(work, "products") + attention + low_rank
    length = config.train.sequence_length
    expected = training_flops_per_token(SHAPE, phase, length) + recomputed_flops_per_token(SHAPE, phase, config)
    assert flops == pytest.approx(expected * config.step_tokens, rel=1e-9)


NO_BYTES = {
    "view", "_unsafe_view", "t", "transpose", "expand", "slice", "unsqueeze", "squeeze", "detach", "alias", "split",
    "unbind", "select", "as_strided", "empty_like", "empty", "split_with_sizes",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}


class Count(TorchDispatchMode):
    """Bytes of the arguments and results of each operation, by name, and how many there are that are no view."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.number = Counter[str](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name not in NO_BYTES:
            self.number += 1
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.bytes[name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result

    @property
    def elementwise(self) -> int:
        return sum(size for name, size in self.bytes.items() if name not in PRODUCTS and "attention" not in name)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["trained", "adapters", "frozen"])
def test_bytes_and_kernels_of_a_layer_are_those_of_its_operations(precision: str, kind: str) -> None:
    overrides = [f"train.precision={precision}", *(["pet.method=none"] if kind == "frozen" else [])]
    trial = make_trial(load_config(VALUES, overrides), torch.device("cpu"))
    role = Trained() if kind == "trained" else Frozen() if kind == "frozen" else ADAPTER
    index = next(i for i, each in enumerate(trial.phase.layers) if type(each) is type(role))
    model: Any = trial.assembled.model.model
    x = torch.randn(4, 32, 96, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, requires_grad=True)
    angles = model.rotary_emb(x, torch.arange(32)[None])
    with Count() as forward:
        output = model.layers[index](x, position_embeddings=angles)
        output = output[0] if isinstance(output, tuple) else output
    gradient = torch.ones_like(output)
    with Count() as backward:
        output.backward(gradient)

    one = Phase(1, 1, trial.phase.entry, (role,), Trained(), 0, 0, 0)
    work = work_of(one, config=trial.config)
    for part, counted in (("layers forward", forward), ("layers backward", backward)):
        assert total(work, "elements", part) == pytest.approx(counted.elementwise, rel=0.04)
        assert total(work, "launches", part) == pytest.approx(counted.number, abs=4)
    # Products that a gradient goes through read and write the same matrices as those of the forward pass.
    products = sum(counted.bytes[name] for counted in (forward, backward) for name in PRODUCTS)
    operands = total(work, "operands", "layers forward") + total(work, "operands", "layers backward")
    assert operands == pytest.approx(products, rel=0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("caps", [True, False])
def test_bytes_of_materialized_scores_are_those_of_their_operations(
    make_phase: Callable[..., Phase], precision: str, caps: bool
) -> None:
    """What is quadratic in the sequence length, with 2 sequences and 4 heads."""
    extra = {"head_dim": 8, "attn_logit_softcapping": 50.0 if caps else None, "pad_token_id": None}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    counted, planned = [], []
    for length in (64, 128):
        config = load_config(
            {
                "model": {"model_type": "gemma2", "vocab_size": 50, **sizes, "extra": extra},
                "train": {"sequence_length": length, "per_device_train_batch_size": 2, "precision": precision},
                "plan": {"num_stages": 1},
            }
        )
        model = AutoModelForCausalLM.from_config(
            hf_config(config.model.hf_config()), dtype=dtype, attn_implementation="eager"
        ).model
        x = torch.randn(2, length, 32, dtype=dtype, requires_grad=True)
        angles = model.rotary_emb(x, torch.arange(length)[None])
        mask = torch.zeros(2, 1, length, length, dtype=dtype)
        with Count() as forward:
            output = model.layers[0](x, position_embeddings=angles, attention_mask=mask)
            output = output[0] if isinstance(output, tuple) else output
        gradient = torch.ones_like(output)
        with Count() as backward:
            output.backward(gradient)
        counted.append([forward.elementwise, backward.elementwise])
        work = step_work(config, shape_from_hf_config(config.model.hf_config()), make_phase([Trained()]), on_cuda=False)
        planned.append([total(work, "elements", f"layers {name}") for name in ("forward", "backward")])
    for (short, long), (one, two) in zip(zip(*counted, strict=True), zip(*planned, strict=True), strict=True):
        assert two - 2 * one == pytest.approx(long - 2 * short, rel=0.06)


SIDE = 512


@pytest.mark.parametrize(("name", "rule"), [("adamw", AdamW), ("muon", Muon), ("scale", SCALE)])
@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("masters", [True, "8bit", False])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_bytes_of_an_update_are_those_of_its_operations(
    make_phase: Callable[..., Phase], name: str, rule: Any, states: str, masters: Any, precision: str
) -> None:
    if precision == "fp32" and masters is not True:
        pytest.skip("fp32 weights are their own masters")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    parameter = nn.Parameter(torch.randn(SIDE, SIDE).to(dtype))
    update = rule({"w": parameter}, states=states, master_weights=masters)
    parameter.grad = torch.randn_like(parameter)
    with Count() as counted:
        update.step(1e-3)

    config = load_config(
        VALUES,
        [
            f"train.precision={precision}", f"memory.optimizer_states={states}",
            f"memory.master_weights={str(masters).lower()}",
        ],
    )  # fmt: skip
    phase = make_phase({Trained(name): 1})
    before, after = (step_work(config, with_square_maps(side), phase, on_cuda=False) or () for side in (SIDE, 2 * SIDE))
    kinds = ("update", "8-bit states", "rounding", "8-bit masters")
    planned = sum(total(after, kind, "update") - total(before, kind, "update") for kind in kinds)
    elements = 7 * 3 * SIDE * SIDE  # more in the larger layer
    gradient_norm = 2 if precision == "bf16" else 4
    # The fused kernel of AdamW writes three fp32 tensors, which are no results of the operation.
    written = 12 if name == "adamw" else 0
    expected = sum(counted.bytes.values()) / SIDE**2 + written + gradient_norm
    assert planned / elements == pytest.approx(expected, rel=0.06)


def with_square_maps(side: int) -> ModelShape:
    linears = tuple(LinearShape(linear.name, side, side) for linear in SHAPE.linears)
    return replace(SHAPE, linears=linears)


def test_more_micro_batches_repeat_the_passes_and_not_the_update(make_phase: Callable[..., Phase]) -> None:
    phase = make_phase({ADAPTER: 2, Trained(): 1})
    once, thrice = work_of(phase), work_of(phase, "train.gradient_accumulation_steps=3")
    for kind in ("products", "attention", "logits"):
        assert total(thrice, kind) == 3 * total(once, kind)
    assert [w for w in once if w.part == "update"] == [w for w in thrice if w.part == "update"]
    summed = 2 * 3 * 2 * sum(w.amount for w in once if w.formula.startswith("norm of the gradients")) / 2
    assert total(thrice, "elements") == pytest.approx(3 * total(once, "elements") + summed)


def test_a_recomputed_layer_does_its_forward_pass_twice(make_phase: Callable[..., Phase]) -> None:
    phase = make_phase({ADAPTER: 2, Trained(): 1})
    work = work_of(phase, "train.gradient_checkpointing=true")
    for kind in KINDS:
        assert total(work, kind, "recomputation") == total(work, kind, "layers forward")
    frozen = work_of(phase, "train.gradient_checkpointing=frozen")
    assert 0 < total(frozen, "products", "recomputation") < total(work, "products", "recomputation")


def test_what_is_kept_on_the_host_crosses_the_bus_twice(make_phase: Callable[..., Phase]) -> None:
    phase = make_phase({ADAPTER: 2, Trained(): 1})
    assert total(work_of(phase), "bus") == 0
    matrices = sum(linear.in_features * linear.out_features for linear in SHAPE.linears)
    offloaded = work_of(phase, "memory.offload_frozen=true")
    assert total(offloaded, "bus") == 2 * 2 * matrices * 2  # there and back, two layers, bf16
    assert total(work_of(phase, "memory.offload_activations=true"), "bus") > 0


def test_a_family_without_formulas_has_no_work(make_phase: Callable[..., Phase]) -> None:
    shape = replace(SHAPE, model_type="starcoder2")
    assert step_work(load_config(VALUES), shape, make_phase({Trained(): 3}), on_cuda=False) is None


def test_an_optimizer_on_the_host_updates_there_and_crosses_the_bus(make_phase: Callable[..., Phase]) -> None:
    config, phase = load_config(VALUES, ["memory.offload_optimizer=true"]), make_phase({Trained(): 3})
    on_cuda, on_cpu = (step_work(config, SHAPE, phase, on_cuda=cuda) or () for cuda in (True, False))
    transfers = host_transfers(config, SHAPE, phase)
    assert total(on_cuda, "bus") == transfers.to_host + transfers.to_device > 0
    assert total(on_cuda, "host update") == sum(w.amount for w in on_cpu if w.kind == "update") > 0
    assert not [work for work in on_cuda if work.kind == "update"]
