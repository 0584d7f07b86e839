import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from steplm.models.loss import chunked_cross_entropy

N, D, V = 37, 12, 50  # rows, hidden size, vocabulary


def inputs(dtype=torch.float64, n=N, d=D, v=V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(v, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(v, (n,), generator=generator)
    labels[::5] = -100
    return hidden, weight, bias, labels


def low_rank_factors(dtype=torch.float64, n=N, v=V, rank=4):
    generator = torch.Generator().manual_seed(5)
    return tuple((torch.randn(rows, rank, generator=generator) * 0.3).to(dtype).requires_grad_() for rows in (n, v))


def reference(hidden, weight, labels, *, num_valid, bias=None, low_rank=None, logit_scale=1.0, softcap=None):
    logits = F.linear(hidden, weight, bias)
    if low_rank is not None:
        logits = logits + low_rank[0] @ low_rank[1].t()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / num_valid


OPTIONS = [
    {},
    {"logit_scale": 0.3},
    {"softcap": 2.0},
    {"logit_scale": 1.7, "softcap": 3.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_adapted", [False, True])
def test_loss_and_gradients_equal_torchs_cross_entropy_in_fp64(options, with_bias, is_adapted):
    hidden, weight, bias, labels = inputs()
    low_rank = low_rank_factors() if is_adapted else None
    wanted = [hidden, weight, *(low_rank or ())] + [bias] * with_bias
    options = {**options, "bias": bias if with_bias else None, "low_rank": low_rank, "num_valid": 23}
    expected = reference(hidden, weight, labels, **options)
    actual = chunked_cross_entropy(hidden, weight, labels, chunk_size=8, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    # an upstream gradient other than 1
    expected_grads = torch.autograd.grad(expected * 0.37, wanted)
    actual_grads = torch.autograd.grad(actual * 0.37, wanted)
    torch.testing.assert_close(actual_grads, expected_grads, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_the_slopes_of_the_loss_in_fp64(options):
    """Along random directions, by central differences: gradcheck wants two backward passes of one loss."""
    hidden, weight, bias, labels = inputs(n=7, d=3, v=5)
    low, B = (torch.randn(rows, 2, dtype=torch.float64, requires_grad=True) for rows in (7, 5))
    wanted = (hidden, weight, low, B, bias)

    def loss(hidden, weight, low, B, bias):
        return chunked_cross_entropy(
            hidden, weight, labels, low_rank=(low, B), bias=bias, num_valid=5, chunk_size=3, **options
        )

    grads = torch.autograd.grad(loss(*wanted), wanted)
    for i, grad in enumerate(grads):
        direction = torch.randn_like(grad)
        ahead, behind = (
            loss(*(x + step * direction if j == i else x for j, x in enumerate(wanted))).item()
            for step in (1e-6, -1e-6)
        )
        assert (grad * direction).sum().item() == pytest.approx((ahead - behind) / 2e-6, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("chunk_size", [1, 5, N - 1, N, N + 100])
def test_chunk_size_changes_nothing(chunk_size):
    hidden, weight, _, labels = inputs()
    whole = chunked_cross_entropy(hidden, weight, labels, num_valid=29, chunk_size=N)
    parts = chunked_cross_entropy(hidden, weight, labels, num_valid=29, chunk_size=chunk_size)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(parts, (hidden, weight)),
        torch.autograd.grad(whole, (hidden, weight)),
        rtol=1e-11,
        atol=1e-15,
    )


def test_loss_of_a_uniform_model_is_log_vocab_size():
    hidden, _, _, labels = inputs(torch.float32)
    weight = torch.zeros(V, D)
    num_valid = int((labels != -100).sum())
    loss = chunked_cross_entropy(hidden, weight, labels, num_valid=num_valid)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(torch.tensor(float(V)).log().item(), rel=1e-6)


def test_parts_of_a_batch_add_up_to_the_whole_with_a_common_num_valid():
    hidden, weight, _, labels = inputs()
    whole = chunked_cross_entropy(hidden, weight, labels, num_valid=torch.tensor(29))
    parts = sum(
        chunked_cross_entropy(hidden[rows], weight, labels[rows], num_valid=29) for rows in (slice(0, 10), slice(10, N))
    )
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=0)


def test_a_very_unlikely_label_has_a_finite_loss():
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[200.0], [-200.0]])
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([1]), num_valid=1)
    assert loss.item() == 400.0


def test_ignored_labels_give_no_gradient_and_all_ignored_gives_zero():
    hidden, weight, _, labels = inputs(torch.float32)
    chunked_cross_entropy(hidden, weight, labels, num_valid=29, chunk_size=8).backward()
    assert torch.equal(hidden.grad[::5], torch.zeros_like(hidden.grad[::5]))
    assert (hidden.grad[labels != -100].abs().sum(dim=1) > 0).all()
    loss = chunked_cross_entropy(hidden, weight, torch.full((N,), -100), num_valid=1)
    assert loss.item() == 0.0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("is_adapted", [False, True])
def test_bf16_is_as_close_to_fp64_as_full_bf16_logits_are(is_adapted):
    # Large V and many rows: sums in bf16 would be off in the second digit.
    hidden, weight, _, labels = inputs(torch.bfloat16, n=512, d=32, v=2000)
    low_rank = low_rank_factors(torch.bfloat16, 512, 2000) if is_adapted else None
    wanted = [hidden, weight, *(low_rank or ())]
    num_valid = int((labels != -100).sum())
    in_fp64 = low_rank and tuple(factor.double() for factor in low_rank)
    exact = reference(hidden.double(), weight.double(), labels, num_valid=num_valid, low_rank=in_fp64)
    exact_grads = torch.autograd.grad(exact, wanted)
    logits = F.linear(hidden, weight)
    if low_rank:
        logits = torch.addmm(logits, low_rank[0], low_rank[1].t())
    full = F.cross_entropy(logits.float(), labels, ignore_index=-100)
    full_grads = torch.autograd.grad(full, wanted)
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_size=32, num_valid=num_valid, low_rank=low_rank)
    grads = torch.autograd.grad(loss, wanted)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    for actual, from_full, expected in zip(grads, full_grads, exact_grads, strict=True):
        assert actual.dtype == torch.bfloat16
        error, error_of_full = (
            (x.double() - expected.double()).norm() / expected.double().norm() for x in (actual, from_full)
        )
        assert error < 1.05 * error_of_full
        assert error < (0.015 if is_adapted else 0.01)  # adapted logits are rounded twice


def test_many_small_chunks_lose_nothing_of_a_bf16_gradient():
    # Equal signs: a running sum in bf16 stops growing once a chunk's share is below half its spacing.
    hidden, weight, _, labels = inputs(torch.bfloat16, n=1024, d=8, v=50)
    hidden = hidden.detach().abs()
    exact = torch.autograd.grad(reference(hidden.double(), weight.double(), labels, num_valid=800), weight)[0]
    loss = chunked_cross_entropy(hidden, weight, labels, num_valid=800, chunk_size=1)
    actual = torch.autograd.grad(loss, weight)[0]
    assert (actual.double() - exact.double()).norm() / exact.double().norm() < 0.005


def test_a_bf16_gradient_is_scaled_by_the_exact_upstream_gradient():
    hidden, weight, _, labels = inputs(torch.bfloat16)
    once = torch.autograd.grad(chunked_cross_entropy(hidden, weight, labels, num_valid=29), (hidden, weight))
    third = torch.autograd.grad(chunked_cross_entropy(hidden, weight, labels, num_valid=29) / 3, (hidden, weight))
    for scaled, plain in zip(third, once, strict=True):
        assert torch.equal(scaled, (plain.float() * torch.tensor(1 / 3)).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_pass_is_an_error_and_no_wrong_gradient(dtype):
    hidden, weight, _, labels = inputs(dtype)
    loss = chunked_cross_entropy(hidden, weight, labels, num_valid=29)
    (loss / 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()
    fresh = chunked_cross_entropy(hidden, weight, labels, num_valid=29)
    (grad,) = torch.autograd.grad(fresh, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


def test_a_frozen_head_gets_no_gradient_and_hidden_states_the_same_one():
    hidden, weight, _, labels = inputs(torch.float32)
    expected = torch.autograd.grad(chunked_cross_entropy(hidden, weight, labels, num_valid=29), hidden)
    frozen = weight.detach()
    loss = chunked_cross_entropy(hidden, frozen, labels, num_valid=29)
    assert torch.equal(torch.autograd.grad(loss, hidden)[0], expected[0])
    head_only = chunked_cross_entropy(hidden.detach(), weight, labels, num_valid=29)
    head_only.backward()
    assert weight.grad is not None
    assert hidden.grad is None


def test_equal_under_activation_checkpointing():
    hidden, weight, _, labels = inputs(torch.float32)

    def loss(hidden):
        return chunked_cross_entropy(hidden.tanh(), weight, labels, num_valid=29, chunk_size=8)

    plain = torch.autograd.grad(loss(hidden), (hidden, weight))
    recomputed = torch.autograd.grad(checkpoint(loss, hidden, use_reentrant=False), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor and the number of matrix products."""

    def __init__(self):
        super().__init__()
        self.numel, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        self.products += "mm" in func.name()
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_logits_never_exist(dtype):
    hidden, weight, _, labels = inputs(dtype, n=256, d=8, v=300)
    with Largest() as seen:
        chunked_cross_entropy(hidden, weight, labels, num_valid=200, chunk_size=16).backward()
    assert seen.numel == 16 * 300, "one chunk of logits is the largest tensor"
    with Largest() as seen:
        reference(hidden, weight, labels, num_valid=200).backward()
    assert seen.numel == 256 * 300, "and the counter sees full logits where they are made"


def test_no_gradient_is_computed_that_nobody_needs():
    hidden, weight, _, labels = inputs(torch.float32)

    def products(hidden, weight):
        with Largest() as seen:
            loss = chunked_cross_entropy(hidden, weight, labels, num_valid=29, chunk_size=N)
        return seen.products, loss

    assert products(hidden, weight)[0] == 3
    assert products(hidden, weight.detach())[0] == 2
    assert products(hidden.detach(), weight)[0] == 2
    assert products(hidden.detach(), weight.detach())[0] == 1
    with torch.no_grad():
        count, loss = products(hidden, weight)
    assert count == 1
    torch.testing.assert_close(loss, products(hidden, weight)[1])


class Counter(TorchDispatchMode):
    """Bytes of the storages made inside that are alive, now and at most."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in args if isinstance(x, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and id(storage) not in self.alive | given:
                self.alive.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key, num_bytes):
        self.alive.discard(key)
        self.now -= num_bytes


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [16, 200])
def test_bytes_of_the_forward_and_of_what_waits_for_the_backward(dtype, trained, softcap, d):
    n, v, c, size = 256, 3000, 64, dtype.itemsize
    hidden, weight, _, labels = inputs(dtype, n=n, d=d, v=v)
    weight.requires_grad_(trained)
    chunk = (8 if softcap else 4 if size == 4 else 6) * c * v
    if trained:
        chunk = 4 * v * d + (chunk if size == 4 else max(chunk, 2 * c * v + 2 * v * d))
    with Counter() as counted:
        loss = chunked_cross_entropy(hidden, weight, labels, num_valid=200, chunk_size=c, softcap=softcap)
        small = 64 * c  # labels, losses, scales of the rows
        assert size * n * d + chunk <= counted.peak <= size * n * d + chunk + small
        kept = size * n * d + (size * v * d if trained else 0)
        assert kept <= counted.now <= kept + small
        counted.peak = 0
        loss.backward()
        assert counted.peak <= kept + small, "scaled in place"
