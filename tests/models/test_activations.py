"""Checkpointing by layer kind and activation offload: what is kept, and that no gradient changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from steplm.errors import ConfigError
from steplm.models import activations
from steplm.models.activations import checkpoint_layers, layers_to_checkpoint, offloaded_activations
from steplm.models.build import build_model, hf_config, initial_state
from steplm.models.forward import batch_loss
from steplm.pet.adapters import adapter_state, attach
from steplm.pet.trainable import apply_trainable
from steplm.schedule import Adapter, Entry, Phase, Trained

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NUM_LAYERS, NEW_LAYERS = 4, (2, 3)
IDS = torch.arange(64).view(2, 32) * 7 % 50


def stage_model(*, adapters: bool = True, train_embeddings: bool = True, model_type: str = "llama"):  # type: ignore[no-untyped-def]
    """Layers 0 and 1 frozen, with adapters that are not zero; 2 and 3 trained."""
    config = hf_config(
        {
            "model_type": model_type,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 50,
        }
    )
    model = build_model(config, initial_state(config, seed=0, dtype=torch.float32)).train()
    patterns = ["model.layers.2.*", "model.layers.3.*", "model.norm.*"]
    if adapters:
        layers = (Adapter(4, 6.0, TARGETS),) * 2 + (Trained(),) * 2
        attach(model, Phase(1, 1, Entry("fresh"), layers, Trained(), 0, 0, 0), "model.layers", seed=0)
        generator = torch.Generator().manual_seed(1)
        for tensor in adapter_state(model).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        patterns.append("*.lora_?")
    apply_trainable(model, patterns + ["model.embed_tokens.*"] * train_embeddings)
    return model


def loss_of(model: nn.Module, offload: bool = False) -> torch.Tensor:
    return batch_loss(model, IDS, IDS.roll(-1, 1), num_valid=64, chunk_size=16, offload_activations=offload)


def gradients_of(model: nn.Module, offload: bool = False) -> dict[str, torch.Tensor]:
    loss_of(model, offload).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def saved_bytes(model: nn.Module) -> dict[int | None, int]:
    """Bytes of distinct storages, not the model's own, that autograd saves in each layer (None: outside)."""
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    saved: dict[int, tuple[int | None, torch.Tensor]] = {}
    where: list[int | None] = [None]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            saved.setdefault(key, (where[-1], tensor))
        return tensor

    handles = []
    for index, layer in enumerate(model.model.layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, index=index: where.append(index)))
        handles.append(layer.register_forward_hook(lambda *_: where.append(None)))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    totals: dict[int | None, int] = {}
    for layer, tensor in saved.values():
        totals[layer] = totals.get(layer, 0) + tensor.untyped_storage().nbytes()
    return totals


def test_layers_to_checkpoint_are_those_of_the_kind() -> None:
    assert layers_to_checkpoint(True, 4, (1, 3)) == (0, 1, 2, 3)
    assert layers_to_checkpoint(False, 4, (1, 3)) == ()
    assert layers_to_checkpoint("new", 4, (3, 1)) == (1, 3)
    assert layers_to_checkpoint("frozen", 4, (1, 3)) == (0, 2)
    assert layers_to_checkpoint("frozen", 3, (0, 1, 2)) == ()


@pytest.mark.parametrize("train_embeddings", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("choice", [True, "frozen", "new"])
def test_checkpointing_changes_no_gradient_bit_by_bit(choice, adapters: bool, train_embeddings: bool) -> None:  # type: ignore[no-untyped-def]
    kind = {"adapters": adapters, "train_embeddings": train_embeddings}
    expected = gradients_of(stage_model(**kind))
    model = stage_model(**kind)
    checkpoint_layers(model, layers_to_checkpoint(choice, NUM_LAYERS, NEW_LAYERS), "model.layers")
    actual = gradients_of(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert torch.equal(actual[name], gradient), name


@pytest.mark.parametrize("choice", [False, True, "frozen", "new"])
def test_a_checkpointed_layer_saves_its_input_alone_and_the_others_what_they_did(choice) -> None:  # type: ignore[no-untyped-def]
    plain, model = saved_bytes(stage_model()), stage_model()
    chosen = layers_to_checkpoint(choice, NUM_LAYERS, NEW_LAYERS)
    checkpoint_layers(model, chosen, "model.layers")
    saved = saved_bytes(model)
    layer_input = IDS.numel() * 32 * 4
    # Releases of transformers differ in whether a checkpointed layer's hooks run around the saving of its input.
    outside = saved.get(None, 0) + sum(saved.get(layer, 0) for layer in chosen)
    assert outside == plain[None] + len(chosen) * layer_input
    for layer in set(range(NUM_LAYERS)) - set(chosen):
        # A storage counts where it is first saved: the first layer that is not checkpointed saves what all
        # layers share (angles), and not the input that a checkpointed layer below it saved.
        assert abs(saved[layer] - plain[layer]) <= layer_input
        assert saved[layer] > 5 * layer_input


def test_frozen_layers_without_adapters_still_save_nothing_when_new_ones_are_checkpointed() -> None:
    """transformers makes the embeddings' output ask for a gradient, which reaches down through frozen layers."""
    model = stage_model(adapters=False, train_embeddings=False)
    assert not {0, 1} & saved_bytes(model).keys()
    checkpoint_layers(model, NEW_LAYERS, "model.layers")
    assert not {0, 1} & saved_bytes(model).keys()


def test_the_last_choice_of_layers_holds() -> None:
    model = stage_model()
    checkpoint_layers(model, (0, 1, 2, 3), "model.layers")
    checkpoint_layers(model, (1,), "model.layers")
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [False, True, False, False]
    checkpoint_layers(model, (), "model.layers")
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


def test_layers_that_cannot_be_checkpointed_are_refused() -> None:
    model = stage_model()
    model.model.layers[1] = nn.Identity()
    with pytest.raises(ConfigError, match=r"model_type 'llama' \(Identity\).*train\.gradient_checkpointing"):
        checkpoint_layers(model, (0,), "model.layers")


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each copy to host memory; every storage is large enough to be moved."""
    sizes: list[int] = []
    to_host = activations.to_host

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        copy = to_host(tensor)
        assert copy.untyped_storage()._cdata != tensor.untyped_storage()._cdata
        sizes.append(tensor.numel() * tensor.element_size())
        return copy

    monkeypatch.setattr(activations, "to_host", counted)
    monkeypatch.setattr(activations, "MIN_OFFLOADED_BYTES", 1)
    return sizes


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("choice", [False, True, "frozen", "new"])
def test_offload_changes_no_gradient_and_moves_each_storage_once(choice, model_type: str, moves: list[int]) -> None:  # type: ignore[no-untyped-def]
    expected = gradients_of(stage_model(model_type=model_type))
    model = stage_model(model_type=model_type)
    checkpoint_layers(model, layers_to_checkpoint(choice, NUM_LAYERS, NEW_LAYERS), "model.layers")
    bytes_of_storages = sum(saved_bytes(model).values())
    actual = gradients_of(model, offload=True)
    for name, gradient in expected.items():
        assert torch.equal(actual[name], gradient), name
    assert sum(moves) == bytes_of_storages


def test_small_storages_parameters_and_buffers_stay(moves: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, buffered = nn.Linear(8, 8), nn.BatchNorm1d(8).eval()
    model = nn.Sequential(matrix, buffered)
    x = torch.randn(3, 8, requires_grad=True)
    with offloaded_activations(model):
        y = (x * matrix.weight[:3] + buffered.running_var).exp()
    assert moves == [x.numel() * 4, y.numel() * 4]  # of the product x alone, and what exp saves
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() * matrix.weight[:3])
    monkeypatch.setattr(activations, "MIN_OFFLOADED_BYTES", x.numel() * 4 + 1)
    with offloaded_activations(model):
        x.exp().sum().backward()
    assert len(moves) == 2


def test_what_was_saved_before_a_change_in_place_comes_back_as_it_was(moves: list[int]) -> None:
    weight = torch.ones(6, requires_grad=True)
    x = torch.arange(6.0)
    with offloaded_activations(nn.Identity()):
        first = (weight * x).sum()
        x.add_(10)
        second = (weight * x).sum()
    assert len(moves) == 2
    (first + second).backward()
    assert torch.equal(weight.grad, 2 * torch.arange(6.0) + 10)


def test_views_share_one_copy_and_keep_their_strides(moves: list[int]) -> None:
    a, b = torch.randn(4, 6, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    x = torch.randn(6, 4)
    with offloaded_activations(nn.Identity()):
        loss = (a * x.t()).sum() + (b * x).sum() + (a[1:, 2:] * x[2:, 1:].t()).sum()
    assert moves == [6 * 4 * 4]
    loss.backward()
    expected = x.t().clone()
    expected[1:, 2:] += x[2:, 1:].t()
    assert torch.equal(a.grad, expected)
    assert torch.equal(b.grad, x)


def test_on_the_device_nothing_is_left_of_what_was_moved(moves: list[int]) -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, *grads):  # type: ignore[no-untyped-def]
            (x,) = ctx.saved_tensors
            return 2 * x * grads[0]

    leaf = torch.randn(5, requires_grad=True)
    alive = []
    with offloaded_activations(nn.Identity()):
        y = leaf * 3
        alive.append(torch.multiprocessing.reductions.StorageWeakRef(y.untyped_storage()))
        loss = Square.apply(y).sum()
        del y
    assert alive[0].expired()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 18 * leaf.detach())


def test_offload_works_on_fake_tensors(moves: list[int]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = stage_model()
        bytes_of_storages = sum(saved_bytes(model).values())
        gradients = gradients_of(model, offload=True)
    assert sum(moves) == bytes_of_storages > 0
    assert all(gradient.shape == model.get_parameter(name).shape for name, gradient in gradients.items())
