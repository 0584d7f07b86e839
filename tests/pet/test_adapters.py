import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from steplm.errors import CheckpointMismatch, ConfigError
from steplm.pet.adapters import ADAPTERS, adapter_state, attach, load_adapter_state, merge_state
from steplm.pet.trainable import apply_trainable, trainable_names
from steplm.schedule import Adapter, Entry, Phase, Role, Trained

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SUBSETS = [c for n in range(1, len(TARGETS) + 1) for c in itertools.combinations(TARGETS, n)]
PREFIX = "model.layers"


def tiny_llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def phase_of(*layers: Role) -> Phase:
    return Phase(1, 1, Entry("fresh"), layers, Trained(), tokens=0, scheduled_tokens=0, schedule_start_tokens=0)


def adapted(targets=TARGETS, layers=(0, 1), rank=4, alpha=6.0, method="lora", num_layers=2) -> Phase:
    """A phase with this adapter on these layers, and the others trained."""
    adapter = Adapter(rank, alpha, tuple(targets), method)
    return phase_of(*(adapter if index in layers else Trained() for index in range(num_layers)))


def stir(model: nn.Module, scale: float = 0.3) -> None:
    """Adapters as after training: no factor is zero."""
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_state(model).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def plain_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    adapters = adapter_state(model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if name not in adapters}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 26).view(2, 12)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ADAPTERS)
def test_attaching_adapters_leaves_the_output_and_the_names_of_weights_unchanged(method, dtype):
    model = tiny_llama(dtype)
    before, tensors = logits(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    attach(model, adapted(method=method), PREFIX, seed=0)
    assert torch.equal(logits(model), before)
    after = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert {name: after[name] for name in tensors} == tensors, "weights are taken over, not copied"
    assert set(after) - set(tensors) == set(adapter_state(model))
    assert len(adapter_state(model)) == 2 * 7 * 2
    assert {tensor.dtype for tensor in adapter_state(model).values()} == {dtype}


def test_adapters_are_only_in_the_layers_and_modules_of_the_phase():
    model = tiny_llama()
    attach(model, adapted(("q_proj", "down_proj"), layers=(1,)), PREFIX, seed=0)
    assert list(adapter_state(model)) == [
        f"model.layers.1.{module}.{factor}"
        for module in ("self_attn.q_proj", "mlp.down_proj")
        for factor in ("lora_A", "lora_B")
    ]


def test_number_of_adapter_parameters_is_rank_times_in_plus_out():
    model = tiny_llama()
    attach(model, adapted(rank=3), PREFIX, seed=0)
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    assert sum(t.numel() for t in adapter_state(model).values()) == 2 * sum(3 * sum(shape) for shape in shapes)


def test_first_values_depend_on_seed_and_name_alone():
    first, reordered, bf16, other_seed = tiny_llama(), tiny_llama(), tiny_llama(torch.bfloat16), tiny_llama()
    attach(first, adapted(), PREFIX, seed=3)
    torch.manual_seed(99)
    attach(reordered, adapted(TARGETS[::-1], layers=(1,)), PREFIX, seed=3)
    attach(bf16, adapted(), PREFIX, seed=3)
    attach(other_seed, adapted(), PREFIX, seed=4)
    values = adapter_state(first)
    for name, tensor in adapter_state(reordered).items():
        assert torch.equal(values[name], tensor)
    for name, tensor in adapter_state(bf16).items():
        assert torch.equal(values[name].bfloat16(), tensor)
    a_factors = [tensor for name, tensor in values.items() if name.endswith("lora_A")]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(a_factors, 2) if a.shape == b.shape)
    name = "model.layers.0.self_attn.q_proj.lora_A"
    assert not torch.equal(values[name], adapter_state(other_seed)[name])


def test_first_values_follow_kaiming_uniform():
    model = tiny_llama()
    attach(model, adapted(rank=16), PREFIX, seed=0)
    for name, tensor in adapter_state(model).items():
        if name.endswith("lora_B"):
            assert not tensor.any()
        else:
            bound = tensor.shape[1] ** -0.5
            assert tensor.abs().max() <= bound
            assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_output_and_gradients_equal_those_of_peft():
    peft = pytest.importorskip("peft")
    ours, theirs = tiny_llama(), tiny_llama()
    attach(ours, adapted(), PREFIX, seed=0)
    stir(ours)
    config = peft.LoraConfig(r=4, lora_alpha=6.0, target_modules=list(TARGETS), lora_dropout=0.0)
    theirs = peft.get_peft_model(theirs, config)
    counterpart = {
        name: dict(theirs.named_parameters())[
            f"base_model.model.{name.removesuffix('.lora_A').removesuffix('.lora_B')}.{name[-6:]}.default.weight"
        ]
        for name in adapter_state(ours)
    }
    for name, tensor in adapter_state(ours).items():
        counterpart[name].data.copy_(tensor)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    tokens = torch.arange(2, 26).view(2, 12)
    for model in (ours, theirs):
        model(tokens, labels=tokens).loss.backward()
    for name, parameter in counterpart.items():
        torch.testing.assert_close(ours.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_merged_logits_equal_unmerged_ones_for_every_subset_of_targets():
    base = tiny_llama()
    untouched = logits(base)
    assert len(SUBSETS) == 127
    for targets in SUBSETS:
        model = copy.deepcopy(base)
        phase = adapted(targets)
        attach(model, phase, PREFIX, seed=0)
        stir(model)
        unmerged = logits(model)
        assert not torch.allclose(unmerged, untouched, atol=1e-3), targets
        plain = copy.deepcopy(base)
        plain.load_state_dict(merge_state(plain_weights(model), adapter_state(model), phase))
        torch.testing.assert_close(logits(plain), unmerged, rtol=1e-4, atol=1e-5, msg=str(targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ADAPTERS)
def test_merging_is_pure_and_passes_other_weights_through(method, dtype):
    model, phase = tiny_llama(dtype), adapted(layers=(1,), method=method)
    attach(model, phase, PREFIX, seed=0)
    stir(model)
    weights, adapters = plain_weights(model), adapter_state(model)
    before = {name: tensor.clone() for name, tensor in (weights | adapters).items()}
    merged = merge_state(weights, adapters, phase)
    assert list(merged) == list(weights)
    assert all(merged[name].dtype == dtype for name in merged)
    changed = [name for name in weights if merged[name] is not weights[name]]
    assert len(changed) == 7
    assert all(torch.equal((weights | adapters)[name], tensor) for name, tensor in before.items())


def test_merge_in_bf16_is_rounded_once():
    model, phase = tiny_llama(torch.bfloat16), adapted(("gate_proj",), layers=(0,))
    attach(model, phase, PREFIX, seed=0)
    stir(model, 0.02)
    name = "model.layers.0.mlp.gate_proj"
    weights, adapters = plain_weights(model), adapter_state(model)
    update = adapters[f"{name}.lora_B"].double() @ adapters[f"{name}.lora_A"].double()
    exact = weights[f"{name}.weight"].double() + phase.layers[0].scaling * update
    merged = merge_state(weights, adapters, phase)[f"{name}.weight"].double()
    spacing = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)  # of bf16, at each value
    assert ((merged - exact).abs() / spacing).max() <= 0.51


def test_merge_state_reads_one_matrix_at_a_time():
    model, phase = tiny_llama(), adapted()
    attach(model, phase, PREFIX, seed=0)
    weights = plain_weights(model)
    reads: list[str] = []

    class OnDisk(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    merge_state(OnDisk(weights), adapter_state(model), phase)
    assert reads == list(weights)


def test_merge_state_refuses_adapters_of_another_model_or_rank():
    model, phase = tiny_llama(), adapted()
    attach(model, phase, PREFIX, seed=0)
    weights, adapters = plain_weights(model), adapter_state(model)
    with pytest.raises(CheckpointMismatch, match="rank 5"):
        merge_state(weights, adapters, adapted(rank=5))
    gone = {name: t for name, t in weights.items() if not name.endswith("1.mlp.up_proj.weight")}
    with pytest.raises(CheckpointMismatch, match=r"model\.layers\.1\.mlp\.up_proj"):
        merge_state(gone, adapters, phase)
    half = {name: t for name, t in adapters.items() if not name.endswith("1.mlp.up_proj.lora_A")}
    with pytest.raises(CheckpointMismatch, match=r"model\.layers\.1\.mlp\.up_proj"):
        merge_state(weights, half, phase)
    with pytest.raises(CheckpointMismatch, match=r"no adapter on 'model\.layers\.1\."):
        merge_state(weights, adapters, adapted(layers=(0,)))


def test_adapter_state_round_trip_is_exact_and_strict():
    source, target = tiny_llama(torch.bfloat16), tiny_llama(torch.bfloat16)
    for model in (source, target):
        attach(model, adapted(), PREFIX, seed=0)
    stir(source)
    state = {name: tensor.clone() for name, tensor in adapter_state(source).items()}
    load_adapter_state(target, state)
    assert all(torch.equal(adapter_state(target)[name], tensor) for name, tensor in state.items())
    name = "model.layers.0.mlp.up_proj.lora_A"
    with pytest.raises(CheckpointMismatch, match=f"missing.*{name}"):
        load_adapter_state(target, {key: t for key, t in state.items() if key != name})
    with pytest.raises(CheckpointMismatch, match=r"unknown.*other"):
        load_adapter_state(target, {**state, "other.lora_A": torch.zeros(1)})
    with pytest.raises(CheckpointMismatch, match=f"of another shape.*{name}"):
        load_adapter_state(target, {**state, name: torch.zeros(2, 2)})


@pytest.mark.parametrize("method", ADAPTERS)
def test_gradient_reaches_every_adapter_and_checkpointing_changes_no_gradient(method):
    """Frozen first layers and embeddings: the case in which reentrant checkpointing gives no gradients."""

    def model_after(steps: int, checkpointing: bool) -> dict[str, torch.Tensor]:
        model = tiny_llama().train()
        attach(model, adapted(layers=(0,), method=method), PREFIX, seed=0)
        trained = apply_trainable(model, ["*.lora_?", "model.layers.1.*", "lm_head.weight", "model.norm.weight"])
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        tokens = torch.arange(2, 26).view(2, 12)
        for _ in range(steps):
            optimizer.step()
            optimizer.zero_grad()
            model(tokens, labels=tokens).loss.backward()
        return {name: model.get_parameter(name).grad.clone() for name in trained}

    for steps in (1, 2):
        gradients = model_after(steps, checkpointing=False)
        for name, gradient in gradients.items():
            dead = name.endswith("lora_A") and steps == 1  # B is zero before the first step
            assert gradient.any() != dead, name
        again = model_after(steps, checkpointing=True)
        assert again.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-8)


def test_linear_maps_with_bias_keep_it():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x):
            return self.fc(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer()])

        def forward(self, x):
            return self.layers[0](x)

    torch.manual_seed(0)
    model = Model()
    x = torch.randn(3, 2, 6)
    plain, before, bias = copy.deepcopy(model), model(x), model.layers[0].fc.bias
    phase = adapted(("fc",), rank=2, num_layers=1)
    attach(model, phase, "layers", seed=0)
    assert torch.equal(model(x), before)
    stir(model)
    unmerged = model(x)
    assert model.layers[0].fc.bias is bias
    plain.load_state_dict(merge_state(plain_weights(model), adapter_state(model), phase))
    torch.testing.assert_close(plain(x), unmerged)
    assert not torch.allclose(unmerged, before)


def test_bad_targets_are_refused_with_a_way_out():
    with pytest.raises(ConfigError, match="Did you mean 'q_proj'"):
        attach(tiny_llama(), adapted(("q_prj",)), PREFIX, seed=0)
    with pytest.raises(ConfigError, match=r"pet\.rank 17 .* 16 x 32") as error:
        attach(tiny_llama(), adapted(("k_proj",), rank=17), PREFIX, seed=0)
    assert (error.value.rank, error.value.shape) == (17, (16, 32))
    with pytest.raises(ConfigError, match="LlamaMLP"):
        attach(tiny_llama(), adapted(("mlp",)), PREFIX, seed=0)
    model = tiny_llama()
    attach(model, adapted(), PREFIX, seed=0)
    with pytest.raises(ConfigError, match="LoRALinear"):
        attach(model, adapted(), PREFIX, seed=0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    with pytest.raises(ConfigError, match=r"attn\.c_attn is a Conv1D"):
        attach(gpt2, adapted(("c_attn",)), "transformer.h", seed=0)


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="Known: lora"):
        attach(tiny_llama(), adapted(method="dora"), PREFIX, seed=0)


def test_each_layer_has_the_adapter_of_its_own_role():
    """Another rank, scale and choice of modules in every layer; merged by the same roles."""
    model = tiny_llama()
    plain, untouched = copy.deepcopy(model), logits(model)
    phase = phase_of(Adapter(3, 9.0, ("q_proj", "down_proj")), Adapter(5, 2.0, ("up_proj",)))
    attach(model, phase, PREFIX, seed=0)
    assert torch.equal(logits(model), untouched)
    assert {name: tuple(tensor.shape) for name, tensor in adapter_state(model).items()} == {
        "model.layers.0.self_attn.q_proj.lora_A": (3, 32),
        "model.layers.0.self_attn.q_proj.lora_B": (32, 3),
        "model.layers.0.mlp.down_proj.lora_A": (3, 48),
        "model.layers.0.mlp.down_proj.lora_B": (32, 3),
        "model.layers.1.mlp.up_proj.lora_A": (5, 32),
        "model.layers.1.mlp.up_proj.lora_B": (48, 5),
    }
    stir(model)
    unmerged = logits(model)
    merged = merge_state(plain_weights(model), adapter_state(model), phase)
    plain.load_state_dict(merged)
    torch.testing.assert_close(logits(plain), unmerged, rtol=1e-4, atol=1e-5)
    with pytest.raises(CheckpointMismatch, match=r"model\.layers\.1\.mlp\.up_proj.* but rank 3"):
        merge_state(plain_weights(model), adapter_state(model), phase_of(phase.layers[0], phase.layers[0]))


def test_a_refused_attach_changes_nothing():
    model = tiny_llama()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ConfigError):
        attach(model, adapted(("q_proj", "k_proj"), rank=17), PREFIX, seed=0)
    assert [name for name, _ in model.named_parameters()] == names
    assert trainable_names(model) == names
