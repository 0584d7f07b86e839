"""Adapters on the embedding matrix and the head, tied and untied."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steplm.errors import ConfigError
from steplm.models.build import build_model, hf_config, initial_state
from steplm.models.forward import batch_loss, check_loss
from steplm.pet.adapters import adapter_state, attach, load_adapter_state, merge_state
from steplm.pet.embedding import LoRAEmbedding, TiedLoRAHead
from steplm.pet.trainable import apply_trainable
from steplm.schedule import Adapter, Entry, Phase, Role, Trained

VOCAB_SIZE, HIDDEN_SIZE, RANK = 50, 32, 4
ADAPTER = Adapter(RANK, 6.0, ("q_proj",))
TIED = {"gemma": True, "gemma2": True, "cohere": True, "llama": False, "granite": False, "qwen3": False}
IDS = torch.arange(24).view(2, 12) * 7 % VOCAB_SIZE


def build(model_type="llama", dtype=torch.float32, **overrides):
    values = {
        "model_type": model_type,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB_SIZE,
        "pad_token_id": 3,
        **overrides,
    }
    config = hf_config(values)
    return build_model(config, initial_state(config, seed=0, dtype=dtype))


def phase_of(first: Role = ADAPTER) -> Phase:
    """A first layer of this role, a trained one, and adapters on embedding and head."""
    return Phase(1, 1, Entry("fresh"), (first, Trained()), ADAPTER, 0, 0, 0)


def adapted(model, seed=0, stirred=True):
    attach(model, phase_of(), "model.layers", seed)
    if stirred:  # as after training: no factor is zero
        generator = torch.Generator().manual_seed(1)
        for tensor in adapter_state(model).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def plain_weights(model):
    adapters = adapter_state(model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if name not in adapters}


@pytest.mark.parametrize("model_type", TIED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attaching_leaves_the_output_and_the_names_of_weights_unchanged(model_type, dtype):
    model = build(model_type, dtype)
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    adapted(model, stirred=False)
    assert torch.equal(logits(model), before)
    after = [name for name, _ in model.named_parameters()]
    assert [name for name in after if ".lora_" not in name] == names
    assert [name for name in after if ".lora_" in name] == list(adapter_state(model))


@pytest.mark.parametrize("model_type", TIED)
def test_tied_matrices_have_one_pair_of_factors_and_untied_ones_two(model_type):
    model = adapted(build(model_type), stirred=False)
    outer = {name: tuple(t.shape) for name, t in adapter_state(model).items() if ".layers." not in name}
    of_embedding = {
        "model.embed_tokens.lora_A": (RANK, HIDDEN_SIZE),
        "model.embed_tokens.lora_B": (VOCAB_SIZE, RANK),
    }
    of_head = {"lm_head.lora_A": (RANK, HIDDEN_SIZE), "lm_head.lora_B": (VOCAB_SIZE, RANK)}
    assert outer == (of_embedding if TIED[model_type] else of_embedding | of_head)
    assert isinstance(model.get_output_embeddings(), TiedLoRAHead) == TIED[model_type]
    a_factors = [t for name, t in adapter_state(model).items() if name.endswith("lora_A")]
    assert all(0 < t.abs().max() <= HIDDEN_SIZE**-0.5 for t in a_factors)
    assert not any(t.any() for name, t in adapter_state(model).items() if name.endswith("lora_B"))


@pytest.mark.parametrize("model_type", TIED)
def test_merged_logits_equal_unmerged_ones(model_type):
    model = build(model_type)
    plain, untouched = copy.deepcopy(model), logits(model)
    unmerged = logits(adapted(model))
    assert not torch.allclose(unmerged, untouched, atol=1e-3)
    merged = merge_state(plain_weights(model), adapter_state(model), phase_of())
    plain.load_state_dict(merged, strict=False)
    plain.tie_weights()
    torch.testing.assert_close(logits(plain), unmerged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", TIED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_loss_passes_its_check_on_adapted_models(model_type, dtype):
    model = adapted(build(model_type, dtype))
    check_loss(model, sequence_length=1024)
    with torch.no_grad():
        model.get_output_embeddings().lora_B.mul_(30)
    check_loss(model, sequence_length=1024)
    model.get_output_embeddings().scaling *= 0.5  # and the check sees the adapters
    check_loss(model, sequence_length=1024)
    model.get_output_embeddings().forward = lambda hidden: F.linear(hidden, model.get_output_embeddings().weight)
    with pytest.raises(ConfigError):
        check_loss(model, sequence_length=1024)


@pytest.mark.parametrize("model_type", TIED)
def test_loss_and_gradients_equal_those_of_full_logits_in_fp64(model_type):
    patterns = ["*.lora_?", "model.layers.1.*", "model.norm.*"]
    labels = IDS.roll(-1, dims=1).masked_fill(IDS % 5 == 0, -100)

    def gradients(chunked):
        model = adapted(build(model_type).double())
        apply_trainable(model, patterns)
        if chunked:
            loss = batch_loss(model, IDS, labels, num_valid=11, chunk_size=5)
        else:
            full = model(IDS).logits.flatten(0, 1)
            loss = F.cross_entropy(full, labels.flatten(), reduction="sum") / 11
        loss.backward()
        return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    (expected_loss, expected), (loss, actual) = gradients(False), gradients(True)
    # Scales and norms in fp32 inside transformers bound what fp64 can show.
    torch.testing.assert_close(loss, expected_loss, rtol=1e-7, atol=0)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_a_tied_step_is_the_step_of_the_shared_matrix():
    """d/dB and d/dA of E + scaling B A, from the gradient that the shared matrix itself would get."""
    labels = IDS.roll(-1, dims=1)
    model = adapted(build("gemma").double())
    apply_trainable(model, ["*.lora_?"])
    batch_loss(model, IDS, labels, num_valid=24, chunk_size=7).backward()
    plain = build("gemma").double()
    plain.load_state_dict(merge_state(plain_weights(model), adapter_state(model), phase_of()), strict=False)
    plain.tie_weights()
    batch_loss(plain, IDS, labels, num_valid=24, chunk_size=7).backward()
    whole = plain.get_input_embeddings().weight.grad
    embedding = model.get_input_embeddings()
    scaling = ADAPTER.scaling
    torch.testing.assert_close(embedding.lora_B.grad, scaling * whole @ embedding.lora_A.T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(embedding.lora_A.grad, scaling * embedding.lora_B.T @ whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ["gemma", "llama"])
def test_tying_again_and_moving_change_nothing(model_type):
    model = adapted(build(model_type))
    before, names = logits(model), list(adapter_state(model))
    model.tie_weights()
    model.to(torch.float64).to(torch.float32)
    assert torch.equal(logits(model), before)
    assert list(adapter_state(model)) == names
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.lora_B is embedding.lora_B) == TIED[model_type]
    assert (head.weight is embedding.weight) == TIED[model_type]


@pytest.mark.parametrize("model_type", ["gemma", "llama"])
def test_adapter_state_round_trip_is_exact(model_type):
    source, target = adapted(build(model_type)), adapted(build(model_type), stirred=False)
    load_adapter_state(target, {name: t.clone() for name, t in adapter_state(source).items()})
    assert torch.equal(logits(target), logits(source))


def test_first_values_depend_on_seed_and_name_alone():
    first, again = (adapter_state(adapted(build(), seed=3, stirred=False)) for _ in range(2))
    tied = adapter_state(adapted(build("gemma"), seed=3, stirred=False))
    other = adapter_state(adapted(build(), seed=4, stirred=False))
    name = "model.embed_tokens.lora_A"
    assert torch.equal(first[name], again[name])
    assert torch.equal(first[name], tied[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["lm_head.lora_A"])


def test_the_row_of_a_padding_index_gets_no_gradient_from_the_embedding():
    model = build()
    model.get_input_embeddings().padding_idx = 3  # models that are built here have none
    adapted(model)
    model.get_input_embeddings()(torch.tensor([[3, 4, 3]])).sum().backward()
    gradient = model.get_input_embeddings().lora_B.grad
    assert gradient[4].any()
    assert not gradient[3].any()


def test_a_family_that_changes_its_rows_keeps_doing_so():
    class Halved(nn.Embedding):
        def forward(self, input):
            return super().forward(input) / 2

    model = build()
    halved = Halved(VOCAB_SIZE, HIDDEN_SIZE)
    model.set_input_embeddings(halved)
    adapted(model)
    assert isinstance(halved, LoRAEmbedding)
    assert isinstance(halved, Halved)
    whole = halved.weight + ADAPTER.scaling * halved.lora_B @ halved.lora_A
    torch.testing.assert_close(halved(IDS), whole[IDS] / 2)


def test_what_cannot_be_adapted_is_refused_and_nothing_changed():
    class Own(nn.Embedding):
        def forward(self, input):
            return F.embedding(input, self.weight).tanh()

    model = build()
    model.set_input_embeddings(Own(VOCAB_SIZE, HIDDEN_SIZE))
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ConfigError, match=r"model\.embed_tokens is a Own.*plan\.train_embeddings"):
        adapted(model)
    assert [name for name, _ in model.named_parameters()] == names
    small = build(vocab_size=3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ConfigError, match=r"pet\.rank 4 .* 3 x 32") as error:
        adapted(small)
    assert (error.value.rank, error.value.shape) == (4, (3, 32))
    headless = build()
    headless.set_output_embeddings(nn.Identity())
    with pytest.raises(ConfigError, match="lm_head is a Identity"):
        adapted(headless)
    twice = adapted(build())
    with pytest.raises(ConfigError, match="LoRA"):
        attach(twice, phase_of(Adapter(RANK, 6.0, ("k_proj",))), "model.layers", 0)
