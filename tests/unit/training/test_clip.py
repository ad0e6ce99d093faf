"""Clipping by the norm of all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from training.sharded import clip


def parameters_with_gradients(scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in ((7, 5), (3,), (11, 2)):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = scale * torch.randn(shape, generator=generator)
        made.append(parameter)
    return [*made, nn.Parameter(torch.zeros(4))]  # one without a gradient


@pytest.mark.parametrize("limit", [0.1, 1.0, 1e6])
def test_equals_torchs(limit: float) -> None:
    ours, theirs = parameters_with_gradients(), parameters_with_gradients()
    norm = clip(ours, limit)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, limit))
    for mine, other in zip(ours, theirs):
        if mine.grad is not None and other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad)


def test_without_a_limit_nothing_changes() -> None:
    parameters = parameters_with_gradients(100.0)
    norm = clip(parameters, 0)
    assert norm > 100
    for mine, other in zip(parameters[:-1], parameters_with_gradients(100.0)):
        assert mine.grad is not None and other.grad is not None
        assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    parameters = parameters_with_gradients()
    assert parameters[0].grad is not None
    parameters[0].grad[0, 0] = bad
    assert not clip(parameters, 1.0).isfinite()


def test_the_norm_does_not_depend_on_how_gradients_are_cut() -> None:
    """Exactly: in float32, sums of a million squares differ by their order."""
    whole = nn.Parameter(torch.zeros(1 << 20))
    whole.grad = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1))
    pieces = []
    for part in whole.grad.split(1 << 17):
        pieces.append(nn.Parameter(torch.zeros_like(part)))
        pieces[-1].grad = part.clone()
    assert clip([whole], 1.0) == clip(pieces, 1.0)
    assert whole.grad is not None
    assert torch.equal(whole.grad, torch.cat([p.grad for p in pieces if p.grad is not None]))


def test_nothing_to_clip() -> None:
    assert clip([nn.Parameter(torch.zeros(3))], 1.0) == 0
