"""Projectors of gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steplm.optim.projection import leading_vectors, random_projector

CPU = torch.device("cpu")


def matrix(small, large, singular_values, seed=0):
    """A matrix with these singular values, and its left singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(small, small, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(large, small, generator=generator, dtype=torch.float64)).Q
    return (left * singular_values) @ right.T, left


def assert_orthonormal(vectors):
    assert torch.allclose(vectors.T @ vectors, torch.eye(vectors.shape[1], dtype=vectors.dtype), atol=1e-12)


def test_the_leading_vectors_of_a_diagonal_matrix_are_unit_vectors():
    vectors = leading_vectors(torch.diag(torch.tensor([3.0, 7.0, 1.0, 5.0])), 2)
    assert torch.allclose(vectors.abs(), torch.eye(4, dtype=torch.float64)[:, [3, 1]])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_no_other_projector_keeps_more_of_the_gradient(data):
    small = data.draw(st.integers(2, 12))
    large = data.draw(st.integers(small, 30))
    rank = data.draw(st.integers(1, small - 1))
    lowest = data.draw(st.sampled_from([0, -2, -6]))  # the logarithm: to the ends of fp32
    scale = data.draw(st.sampled_from([1e-30, 1.0, 1e30]))
    values = torch.logspace(0, lowest, small, dtype=torch.float64)
    gradient, left = matrix(small, large, values * scale, seed=data.draw(st.integers(0, 9)))
    vectors = leading_vectors(gradient.float(), rank)
    assert_orthonormal(vectors)
    lost = torch.linalg.matrix_norm(gradient - vectors @ (vectors.T @ gradient)) / scale
    assert lost <= torch.linalg.vector_norm(values[rank:]) + 1e-6
    if lowest == -2:  # distinct, and far above what fp32 rounds off
        assert torch.linalg.svdvals(left[:, :rank].T @ vectors).min() > 1 - 1e-8


def test_small_singular_values_are_told_apart_where_a_square_in_fp32_cannot():
    gradient, _ = matrix(16, 40, torch.logspace(0, -5, 16, dtype=torch.float64))
    gradient = gradient.float()
    exact = torch.linalg.svd(gradient.double(), full_matrices=False).U[:, :12]

    def error(vectors):
        return torch.linalg.matrix_norm(exact - vectors @ (vectors.T @ exact), 2)

    in_fp32 = torch.linalg.eigh(gradient @ gradient.T).eigenvectors[:, -12:].double()
    assert error(leading_vectors(gradient, 12)) < 1e-5
    assert error(in_fp32) > 1e-3


@pytest.mark.parametrize("rank_of_gradient", [1, 3])
def test_a_gradient_of_lower_rank_still_has_an_orthonormal_projector(rank_of_gradient):
    values = torch.zeros(8, dtype=torch.float64)
    values[:rank_of_gradient] = 1.0
    gradient, _ = matrix(8, 20, values)
    vectors = leading_vectors(gradient.float(), 5)
    assert_orthonormal(vectors)
    assert torch.allclose(vectors @ (vectors.T @ gradient), gradient, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_decomposed(value):
    gradient = torch.ones(4, 6)
    gradient[1, 2] = value
    assert leading_vectors(gradient, 2) is None


def test_zero_has_no_leading_vectors_and_the_smallest_number_has():
    assert leading_vectors(torch.zeros(4, 6), 2) is None
    gradient = torch.zeros(4, 6)
    gradient[1, 2] = 1e-45  # a subnormal number, whose square fp32 does not have
    assert leading_vectors(gradient, 1).abs().squeeze().tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("num_failures", [1, 2])
def test_where_a_decomposition_fails_another_gives_the_same_vectors(monkeypatch, num_failures):
    gradient, _ = matrix(8, 20, torch.logspace(0, -2, 8, dtype=torch.float64))
    expected = leading_vectors(gradient, 3)
    real, calls = torch.linalg.eigh, []

    def failing(matrix):
        calls.append(matrix)
        if len(calls) <= num_failures:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    vectors = leading_vectors(gradient, 3)
    assert len(calls) == 2
    signs = (vectors * expected).sum(0).sign()
    assert torch.allclose(vectors * signs, expected, atol=1e-9)


def test_a_random_projector_is_a_function_of_its_key():
    first = random_projector(6, 4, "0/layers.0.weight/1", CPU)
    torch.randn(3)
    assert torch.equal(first, random_projector(6, 4, "0/layers.0.weight/1", CPU))
    assert not torch.equal(first, random_projector(6, 4, "0/layers.0.weight/2", CPU))
    assert first.shape == (6, 4)
    assert first.dtype == torch.float32


def test_a_random_projector_keeps_squared_lengths_in_the_mean():
    vector = torch.randn(40, generator=torch.Generator().manual_seed(1))
    lengths = [(random_projector(40, 8, str(key), CPU).T @ vector).square().sum() for key in range(500)]
    assert torch.stack(lengths).mean().item() == pytest.approx(vector.square().sum().item(), rel=0.1)  # 1 sigma is 0.02
