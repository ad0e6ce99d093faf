"""Low-rank factors: as good as theory allows, and an RMSNorm between them that does nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_attnedit.edit.lowrank import SecondMoment, factorise, weighting


def correlated(inputs: int, count: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    """Inputs (count, inputs) of very different sizes that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    mix = mix * torch.logspace(0, -2, inputs, dtype=torch.float64)
    return torch.randn(count, inputs, generator=generator, dtype=torch.float64) @ mix.T + mean


def moment_of(x: torch.Tensor, has_one: bool = False, mean: bool = False) -> SecondMoment:
    return SecondMoment(x.T @ x / len(x), x.mean(0) if mean else None, has_one)


def rms_normed(latent: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return latent * latent.square().mean(-1, keepdim=True).rsqrt() * weight


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 12),
    inputs=st.integers(2, 10),
    rank=st.integers(1, 14),
    seed=st.integers(0, 99),
)
def test_the_error_is_the_energy_of_the_components_left_out(rows, inputs, rank, seed):
    x = correlated(inputs, 200, seed)
    weight = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).double()
    moment = moment_of(x)
    factors = factorise(weight, moment, rank)
    assert factors.reduce.shape == (rank, inputs)
    assert factors.expand.shape == (rows, rank)
    error = moment.energy(weight - factors.expand @ factors.reduce)
    # Eckart-Young: no map of this rank does better than leaving out the smallest singular values.
    singular = torch.linalg.svdvals(weight @ torch.linalg.cholesky(moment.matrix))
    best = float(singular[rank:].square().sum())
    assert error == pytest.approx(best, abs=1e-6 * moment.energy(weight))


def test_latents_are_white_and_the_norm_weight_is_their_length():
    x = correlated(8, 500, 0)
    factors = factorise(torch.randn(6, 8).double(), moment_of(x), 4)
    latent = x @ factors.reduce.T
    second = latent.T @ latent / len(x)
    assert torch.allclose(second, torch.eye(4).double(), atol=1e-6)
    assert factors.norm_weight == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("source", ["bias", "mean"])
def test_with_a_constant_latent_the_norm_is_the_identity(source):
    x = correlated(8, 500, 1, mean=5.0 if source == "mean" else 0.0)
    weight = torch.randn(6, 8).double()
    if source == "bias":
        x = torch.cat([x, torch.ones(len(x), 1).double()], 1)
        weight = torch.cat([weight, torch.randn(6, 1).double()], 1)
    moment = moment_of(x, has_one=source == "bias", mean=source == "mean")
    factors = factorise(weight, moment, 7)
    through = rms_normed(x @ factors.reduce.T, factors.norm_weight) @ factors.expand.T
    exact = x @ weight.T
    tolerance = 2e-3 if source == "bias" else 0.1  # a mean is only nearly constant
    assert (through - exact).norm() <= tolerance * exact.norm()

    plain = factorise(weight, SecondMoment(moment.matrix, None, False), 7)
    without = rms_normed(x @ plain.reduce.T, plain.norm_weight) @ plain.expand.T
    assert (without - exact).norm() > 2 * (through - exact).norm()


@pytest.mark.parametrize("rank", [4, 7, 12])
def test_balanced_factors_are_the_same_map_at_one_scale(rank):
    """AdamW moves all of ``expand`` alike: no latent may be longer than what it brings."""
    x = torch.cat([correlated(8, 500, 3, mean=2.0), torch.ones(500, 1).double()], 1)
    weight = torch.randn(6, 9).double()
    given = factorise(weight, moment_of(x, has_one=True), rank)
    factors = given.balanced()
    white = rms_normed(x @ given.reduce.T, given.norm_weight)
    latent = rms_normed(x @ factors.reduce.T, factors.norm_weight)
    assert torch.allclose(latent @ factors.expand.T, white @ given.expand.T, rtol=1e-9)
    plain = factors.plain_reduce
    assert torch.allclose(factors.expand @ plain, given.expand @ given.reduce, rtol=1e-9)

    brings = (white * given.expand.square().sum(0).sqrt()).square().mean(0).sqrt()
    kept = min(rank - 1, 6)
    columns = factors.expand.square().mean(0).sqrt()
    assert columns[:kept].tolist() == pytest.approx([float(columns[0])] * kept)
    for made in (latent, x @ plain.T):
        size = made.square().mean(0).sqrt()
        assert torch.allclose(size[:kept] / size[0], brings[:kept] / brings[0], rtol=0.05)
        assert float(size[-1]) == pytest.approx(1.0, rel=0.01)  # some 200 before


def test_factors_can_be_balanced_for_other_rows():
    x = correlated(8, 500, 4)
    factors = factorise(torch.randn(6, 8).double(), moment_of(x), 5)
    other = torch.randn(10, 6).double() @ factors.expand
    balanced = factors.balanced(other)
    assert torch.allclose(balanced.expand @ balanced.plain_reduce, other @ factors.reduce)


def test_weighting_is_a_square_root_and_its_inverse():
    x = correlated(5, 50, 2)
    gram = x.T @ x
    root, inverse = weighting(gram)
    assert torch.allclose(root @ inverse, torch.eye(5).double(), atol=1e-8)
    assert torch.allclose(root @ root, gram, rtol=1e-3, atol=2e-6 * float(gram.norm()))
    # A direction without weight has no infinite inverse.
    assert weighting(torch.zeros(3, 3).double())[1].isfinite().all()
