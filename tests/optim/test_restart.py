import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from steplm.errors import ConfigError
from steplm.optim.adamw import AdamW
from steplm.optim.quantized import CodeBook
from steplm.optim.restart import kept_moments


def saved(first, second, **others):
    return {"w.lora_A.exp_avg": torch.tensor(first), "w.lora_A.exp_avg_sq": torch.tensor(second), **others}


def moments(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "w.lora_A.exp_avg": torch.randn(shape, generator=generator),
        "w.lora_A.exp_avg_sq": torch.rand(shape, generator=generator) + 1e-6,
    }


def test_the_largest_of_each_tensor_stay_by_hand():
    tensors = saved([[0.1, -4.0], [3.0, 0.2]], [[1.0, 5.0], [6.0, 2.0]], **{"embed.exp_avg": torch.ones(2)})
    kept = kept_moments(tensors, ["w.lora_A"], keep=0.5)
    assert kept.keys() == {"w.lora_A.exp_avg", "w.lora_A.exp_avg_sq"}
    assert kept["w.lora_A.exp_avg"].tolist() == [[0.0, -4.0], [3.0, 0.0]]
    assert kept["w.lora_A.exp_avg_sq"].tolist() == [[0.0, 5.0], [6.0, 0.0]]
    one = kept_moments(tensors, ["w.lora_A"], keep=0.25)
    assert one["w.lora_A.exp_avg_sq"].tolist() == [[0.0, 0.0], [6.0, 0.0]]
    assert not one["w.lora_A.exp_avg"].any(), "-4 is the largest, and has no second moment any more"


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    keep=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_at_most_the_share_stays_unchanged_and_nothing_without_a_second_moment(rows, columns, keep, seed):
    tensors = moments((rows, columns), seed)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    kept = kept_moments(tensors, ["w.lora_A"], keep)
    first, second = kept["w.lora_A.exp_avg"], kept["w.lora_A.exp_avg_sq"]
    count = int(keep * rows * columns)
    assert second.count_nonzero() == count
    assert first.count_nonzero() <= count
    assert not first[second == 0].any()
    for key, tensor in kept.items():
        assert tensor.shape == before[key].shape
        assert torch.equal(tensor[tensor != 0], before[key][tensor != 0])
        assert torch.equal(tensors[key], before[key]), "what was saved is left as it is"
        gone = before[key][second == 0].abs()
        if key.endswith("sq") and 0 < count < rows * columns:
            assert gone.max() <= second[second != 0].min()


def test_all_stay_at_1_and_none_at_0():
    tensors = moments((5, 7), 0)
    everything = kept_moments(tensors, ["w.lora_A"], keep=1)
    assert all(torch.equal(everything[key], tensors[key]) for key in tensors)
    assert not any(tensor.any() for tensor in kept_moments(tensors, ["w.lora_A"], keep=0).values())


def test_moments_that_are_all_equal_lose_as_many_as_others():
    tensors = saved([[1.0] * 10], [[1.0] * 10])
    assert kept_moments(tensors, ["w.lora_A"], keep=0.3)["w.lora_A.exp_avg_sq"].count_nonzero() == 3


@pytest.mark.parametrize("numel", [3 * 256 + 40, 17])
def test_in_8_bits_the_same_elements_stay_as_in_fp32_and_stand_for_the_same_numbers(numel):
    generator = torch.Generator().manual_seed(1)
    # Blocks of different scales: codes alone do not tell which is the largest.
    spread = torch.repeat_interleave(10.0 ** torch.arange(-2.0, 2.0), 256)[:numel]
    exact = {
        "w.lora_A.exp_avg": torch.randn(numel, generator=generator) * spread,
        "w.lora_A.exp_avg_sq": (torch.rand(numel, generator=generator) + 0.1) * spread**2,
    }
    tensors, meant = {}, {}
    for key, values in exact.items():
        book = CodeBook(signed=key.endswith("avg"), device="cpu")
        codes, scales = book.quantize(values)
        tensors[key], tensors[f"{key}_scale"] = codes.view(1, -1), scales
        meant[key] = book.dequantize(codes, scales)
    kept = kept_moments(tensors, ["w.lora_A"], keep=0.2)
    wanted = kept_moments(meant, ["w.lora_A"], keep=0.2)
    assert kept.keys() == tensors.keys()
    for key in exact:
        book = CodeBook(signed=key.endswith("avg"), device="cpu")
        found = book.dequantize(kept[key].view(-1), kept[f"{key}_scale"])
        assert found.count_nonzero() == wanted[key].count_nonzero()
        assert torch.equal(found.abs().sort().values, wanted[key].abs().sort().values)
        assert torch.equal(found[found != 0], meant[key][found != 0])


@pytest.mark.parametrize("states", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapters_take_what_is_kept_and_no_element_leaps(states, dtype):
    rate, names = 1e-2, ["w.lora_A", "w.lora_B"]

    def adapters():
        generator = torch.Generator().manual_seed(5)
        drawn = torch.randn(4, 300, generator=generator).to(dtype)
        return {"w.lora_A": nn.Parameter(drawn), "w.lora_B": nn.Parameter(torch.zeros(300, 4, dtype=dtype))}

    old = adapters()
    optimizer = AdamW(old, states=states, weight_decay=0.0)
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        for parameter in old.values():
            parameter.grad = (torch.randn(parameter.shape, generator=generator) * 1e-3).to(dtype)
        optimizer.step(rate)
    tensors, steps = optimizer.state_dict()
    fresh = adapters()
    before = {name: parameter.detach().float().clone() for name, parameter in fresh.items()}
    restarted = AdamW(fresh, states=states, weight_decay=0.0)
    masters = {key: tensor for key, tensor in restarted.state_dict()[0].items() if key.endswith(".master")}
    restarted.load_state_dict(kept_moments(tensors, names, keep=0.1) | masters, steps, strict=False)
    assert restarted.steps == dict.fromkeys(names, 20)
    fresh["w.lora_A"].grad = torch.zeros_like(fresh["w.lora_A"])  # as while lora_B is zero
    restarted.step(rate)
    moved = (fresh["w.lora_A"].detach().float() - before["w.lora_A"]).abs()
    assert moved.any(), "what was kept goes on"
    assert moved.max() < 5 * rate


def test_names_without_moments_and_shares_beyond_1_are_refused():
    tensors = moments((2, 2), 0)
    with pytest.raises(KeyError, match=r"w\.lora_B"):
        kept_moments(tensors, ["w.lora_B"], keep=0.1)
    for keep in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"pet\.restart_keep"):
            kept_moments(tensors, ["w.lora_A"], keep)
