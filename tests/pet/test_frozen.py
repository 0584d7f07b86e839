import copy
import itertools
from collections import ChainMap

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from steplm.cost.formats import FROZEN_FORMATS
from steplm.errors import ConfigError
from steplm.pet.adapters import adapter_state, attach, load_adapter_state, merge_state
from steplm.pet.frozen import frozen_tensors, pack_frozen, unpacked_state
from steplm.pet.frozen_linear import FrozenLinear
from steplm.pet.lora import LoRALinear
from steplm.pet.packing import FORMATS
from steplm.pet.trainable import apply_trainable
from steplm.schedule import Adapter, Entry, Phase, Trained

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "model.layers"
FROZEN = (0, 1, 3)  # layer 2 is new
ADAPTER = Adapter(4, 6.0, TARGETS)
PHASE = Phase(1, 1, Entry("fresh"), (ADAPTER, ADAPTER, Trained(), ADAPTER), Trained(), 0, 0, 0)
SHAPES = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]  # of one layer
WAYS = [(fmt, offload) for fmt, offload in itertools.product(FORMATS, (False, True)) if offload or fmt != "full"]


def tokens(shift: int = 0) -> torch.Tensor:
    return torch.arange(2 + shift, 26 + shift).view(2, 12)


def stage_model(family: str = "llama", dtype: torch.dtype = torch.float32, adapters: bool = True) -> nn.Module:
    """Three frozen layers, with adapters as after some training, one new layer, and trained outer parts."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).train()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    if adapters:
        attach(model, PHASE, PREFIX, seed=0)
        for tensor in adapter_state(model).values():
            tensor.copy_(torch.randn(tensor.shape) * 0.3)
    patterns = ["model.layers.2.*", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    apply_trainable(model, patterns + ["*.lora_?"] * adapters)
    return model


def packed(model: nn.Module, fmt: str, offload: bool, **options) -> nn.Module:
    model = copy.deepcopy(model)
    pack_frozen(model, PREFIX, FROZEN, fmt=fmt, offload=offload, **options)
    return model


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """Codes, scales and layers in host memory, without the slots that they are fetched to."""
    return {name: tensor for name, tensor, _ in frozen_tensors(model) if not name.startswith("staging.")}


def with_materialized_weights(model: nn.Module, like: nn.Module) -> nn.Module:
    """A plain model with the weights that the packed one computes with."""
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in unpacked_state(like).items():
            plain.get_parameter(name).copy_(weight)
    return plain


def checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def loss_and_gradients(model: nn.Module, micro_batches: int = 1) -> dict[str, torch.Tensor]:
    """Of the trained parameters, accumulated; under ``loss`` the last loss."""
    model.zero_grad()
    for shift in range(micro_batches):
        loss = model(tokens(shift), labels=tokens(shift)).loss
        loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize(("fmt", "offload"), WAYS)
@pytest.mark.parametrize(
    ("family", "dtype", "adapters"),
    [
        ("llama", torch.float32, True),
        ("llama", torch.bfloat16, True),
        ("llama", torch.float32, False),
        ("qwen2", torch.float32, True),
        ("qwen2", torch.bfloat16, False),
    ],
)
def test_loss_and_gradients_equal_those_of_a_plain_model_bit_by_bit(family, dtype, adapters, fmt, offload):
    model = stage_model(family, dtype, adapters)
    small = packed(model, fmt, offload)
    plain = with_materialized_weights(model, small)
    expected = loss_and_gradients(plain)
    assert_equal(loss_and_gradients(small), expected)
    assert torch.equal(logits(small), logits(plain))
    assert_equal(loss_and_gradients(small, micro_batches=2), loss_and_gradients(plain, micro_batches=2))
    assert_equal(loss_and_gradients(checkpointed(small)), loss_and_gradients(checkpointed(plain)))
    assert all(expected[name].any() for name in expected), "a gradient reaches every trained parameter"
    assert len(expected) == 1 + 3 + (12 if family == "qwen2" else 9) + 3 * 14 * adapters
    changed = not torch.equal(logits(model), logits(small))
    assert changed == (fmt != "full"), "full is exact, and the others are not"


@pytest.mark.parametrize(("fmt", "offload"), WAYS)
def test_no_plain_weight_is_left_and_the_bytes_are_the_promised_ones(fmt, offload):
    model = stage_model("qwen2", torch.bfloat16)
    small = copy.deepcopy(model)
    report = pack_frozen(small, PREFIX, FROZEN, fmt=fmt, offload=offload)
    layer_bytes = sum(FROZEN_FORMATS[fmt](*shape) if fmt != "full" else 2 * shape[0] * shape[1] for shape in SHAPES)
    assert report.num_matrices == 21
    gone = {name for name, _ in model.named_parameters()} - {name for name, _ in small.named_parameters()}
    assert len(gone) == 21
    assert gone == set(unpacked_state(small))
    held = list(frozen_tensors(small))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for _, tensor, _ in held}
    on_host = sum(tensor.nbytes for _, tensor, host in held if host)
    on_device = sum(tensor.nbytes for _, tensor, host in held if not host)
    assert sum(storages.values()) == on_host + on_device, "each tensor owns its bytes"
    assert (on_host, on_device) == ((3 * layer_bytes, 2 * layer_bytes) if offload else (0, 3 * layer_bytes))
    if offload:
        assert [name for name, *_ in held] == [f"{PREFIX}.{i}" for i in FROZEN] + ["staging.0", "staging.1"]
        assert not [name for name, _ in small.named_buffers() if "weight" in name]
    else:
        assert {name for name, *_ in held} == {name for name, _ in small.named_buffers() if "weight_" in name}


@pytest.mark.parametrize(("fmt", "offload"), WAYS)
@pytest.mark.parametrize("adapters", [False, True])
def test_autograd_saves_no_frozen_weight(fmt, offload, adapters):
    model = stage_model(adapters=adapters)
    small = packed(model, fmt, offload)

    def saved_of_weight_shape(model: nn.Module) -> int:
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
            model(tokens()[:1, :5], labels=tokens()[:1, :5])
        shapes = {(o, i) for o, i in SHAPES} | {(i, o) for o, i in SHAPES}
        own = {p.untyped_storage().data_ptr() for p in model.get_submodule(f"{PREFIX}.2").parameters()}
        return sum(tuple(t.shape) in shapes and t.untyped_storage().data_ptr() not in own for t in saved)

    assert saved_of_weight_shape(model) == 21, "what this test looks for"
    assert saved_of_weight_shape(small) == 0


@pytest.mark.parametrize(("fmt", "offload"), WAYS)
def test_weights_saved_whole_and_packed_again_are_the_same(fmt, offload):
    before = packed(stage_model(dtype=torch.bfloat16), fmt, offload)
    folder = dict(unpacked_state(before))  # what a checkpoint's folder holds
    resumed = stage_model(dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in folder.items():
            resumed.get_parameter(name).copy_(weight)
    report = pack_frozen(resumed, PREFIX, FROZEN, fmt=fmt, offload=offload)
    assert report.relative_rms_error == 0.0, "the folder holds what the packed weights stand for"
    assert_equal(dict(unpacked_state(resumed)), folder)
    assert_equal(stored(resumed), stored(before))
    assert_equal(loss_and_gradients(resumed), loss_and_gradients(before))


@pytest.mark.parametrize(("fmt", "offload"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_into_the_unpacked_weights_gives_the_packed_models_logits(fmt, offload, dtype):
    model = stage_model(dtype=dtype)
    small = packed(model, fmt, offload)
    adapters = adapter_state(small)
    others = {name: p.detach() for name, p in small.named_parameters() if name not in adapters}
    merged = stage_model(dtype=dtype, adapters=False)
    merged.load_state_dict(merge_state(ChainMap(others, unpacked_state(small)), adapters, PHASE))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(logits(merged), logits(small), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(logits(merged), logits(stage_model(dtype=dtype, adapters=False)), atol=tolerance)


def test_unpacked_weights_are_copies_made_one_at_a_time():
    small = packed(stage_model(), "full", True)
    state = unpacked_state(small)
    kept = [state[name] for name in state]
    assert_equal(dict(zip(state, kept, strict=True)), {n: stage_model().get_parameter(n).detach() for n in state})
    assert not {t.untyped_storage().data_ptr() for t in kept} & {
        t.untyped_storage().data_ptr() for _, t, _ in frozen_tensors(small)
    }


def test_every_layer_is_requested_before_it_is_needed():
    small = packed(stage_model(), "int8", True)
    fetcher = next(m.offloaded.fetcher for m in small.modules() if isinstance(m, FrozenLinear) and m.offloaded)
    loss_and_gradients(small, micro_batches=3)
    loss_and_gradients(checkpointed(small))
    assert fetcher.num_fetches - fetcher.num_hits == 1, "all but the very first"
    assert fetcher.num_fetches == 1 + 4 * 4


def test_the_report_tells_the_error_of_all_matrices_together():
    model = stage_model()
    errors = {}
    for fmt in ("int8", "nf4"):
        small = copy.deepcopy(model)
        report = pack_frozen(small, PREFIX, FROZEN, fmt=fmt, offload=False)
        pairs = [(model.get_parameter(name).double(), after.double()) for name, after in unpacked_state(small).items()]
        error = sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)
        assert report.relative_rms_error == pytest.approx(error.sqrt().item(), rel=1e-5)
        errors[fmt] = report.relative_rms_error
    assert 0.003 < errors["int8"] < 0.01 < 0.07 < errors["nf4"] < 0.11
    assert pack_frozen(model, PREFIX, FROZEN, fmt="full", offload=True).relative_rms_error == 0.0


def test_full_without_offload_changes_nothing():
    model = stage_model()
    modules = dict(model.named_modules())
    assert pack_frozen(model, PREFIX, FROZEN, fmt="full", offload=False).num_matrices == 0
    assert dict(model.named_modules()) == modules
    assert not unpacked_state(model)
    assert not list(frozen_tensors(model))


def test_trained_maps_stay_plain_and_adapters_stay_adapters():
    small = packed(stage_model(), "int8", False)
    for name, module in small.named_modules():
        if isinstance(module, nn.Linear):
            in_frozen_layer = name.startswith(tuple(f"{PREFIX}.{i}." for i in FROZEN))
            assert type(module) is (LoRALinear if in_frozen_layer else nn.Linear), name
    state = {name: torch.zeros_like(tensor) for name, tensor in adapter_state(small).items()}
    load_adapter_state(small, state)
    assert_equal(adapter_state(small), state)
    # Asked for a trained layer, or a second time, there is nothing to pack.
    assert pack_frozen(small, PREFIX, range(4), fmt="int8", offload=False).num_matrices == 0


def test_plain_weights_are_let_go_and_moved_one_by_one(monkeypatch):
    """With another device, a matrix at a time exists there in full."""
    model = stage_model()
    weights = {name: model.get_parameter(name).untyped_storage().data_ptr() for name in unpacked_names(model)}
    alive = []
    pack = type(FORMATS["int8"]).pack

    def counting(self, weight):
        alive.append(sum(model.get_submodule(n.rpartition(".")[0]).weight is not None for n in weights))
        return pack(self, weight)

    monkeypatch.setattr(type(FORMATS["int8"]), "pack", counting)
    pack_frozen(model, PREFIX, FROZEN, fmt="int8", offload=False, device="cpu")
    assert alive == list(range(21, 0, -1))


def unpacked_names(model: nn.Module) -> list[str]:
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, LoRALinear)]


@pytest.mark.parametrize(("fmt", "offload"), WAYS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_same_code_runs_on_fake_tensors(fmt, offload, checkpointing):
    with FakeTensorMode():
        model = stage_model()
        report = pack_frozen(model, PREFIX, FROZEN, fmt=fmt, offload=offload)
        if checkpointing:
            checkpointed(model)
        gradients = loss_and_gradients(model)
    assert (report.num_matrices, report.relative_rms_error) == (21, 0.0 if fmt == "full" else None)
    assert {name: g.shape for name, g in gradients.items() if name != "loss"} == {
        name: p.shape for name, p in stage_model().named_parameters() if p.requires_grad
    }


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="Known: full, int8, nf4"):
        packed(stage_model(), "int4", False)
