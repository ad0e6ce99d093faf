"""The chunked divergence, held to the plain one: value, gradient, and what it never allocates.

Shapes: N positions, E hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from training import kl
from training.kl import Dense, TopK, chunked_kl, plain_kl, top_k


def case(seed, positions=13, hidden=8, vocabulary=29, scale=2.0):
    draw = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return scale * torch.randn(*shape, generator=draw)

    weight = (torch.rand(positions, generator=draw) < 0.7).float()
    mine = noise(positions, hidden).requires_grad_(), noise(vocabulary, hidden).requires_grad_()
    return *mine, Dense(noise(positions, hidden), noise(vocabulary, hidden)), weight


def with_gradients(function, hidden, head, target, weight, **options):
    loss, agreed = function(hidden, head, target, weight, **options)
    return loss, agreed, *torch.autograd.grad(3 * loss, (hidden, head))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 999),
    positions=st.integers(1, 20),
    vocabulary=st.integers(2, 40),
    chunk=st.integers(1, 25),
    k=st.one_of(st.none(), st.integers(1, 45)),
)
def test_chunked_equals_plain(seed, positions, vocabulary, chunk, k):
    hidden, head, dense, weight = case(seed, positions, vocabulary=vocabulary, scale=0.7)
    target = dense if k is None else top_k(dense.hidden, dense.head, k)
    expected = with_gradients(plain_kl, hidden, head, target, weight)
    found = with_gradients(chunked_kl, hidden, head, target, weight, chunk=chunk)
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_plain_equals_the_definition():
    hidden, head, target, weight = case(3)
    p = torch.softmax((target.hidden @ target.head.t()).double(), -1)
    q = torch.softmax((hidden @ head.t()).double(), -1)
    expected = ((p * (p.log() - q.log())).sum(-1) * weight).sum()
    agreed = ((p.argmax(-1) == q.argmax(-1)) * weight).sum()
    loss, same = plain_kl(hidden, head, target, weight)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    assert same.item() == agreed.item()


@pytest.mark.parametrize("k", [None, 3, 29])
def test_a_model_does_not_diverge_from_itself(k):
    hidden, head, _, weight = case(4, scale=1.0)
    own = hidden.detach(), head.detach()
    target = Dense(*own) if k is None else top_k(*own, k)
    loss, agreed, hidden_grad, head_grad = with_gradients(
        chunked_kl, hidden, head, target, weight, chunk=5
    )
    assert abs(loss.item()) < 1e-5
    assert agreed.item() == weight.sum().item()
    assert hidden_grad.abs().max() < 1e-5
    assert head_grad.abs().max() < 1e-4


def test_top_k_grows_to_the_whole_divergence():
    hidden, head, target, weight = case(5, scale=1.0)
    whole = plain_kl(hidden, head, target, weight)[0].item()
    found = [
        plain_kl(hidden, head, top_k(target.hidden, target.head, k), weight)[0].item()
        for k in (1, 2, 5, 15, 28, 29)
    ]
    assert all(a <= b + 1e-5 for a, b in itertools.pairwise(found))
    assert found[0] >= 0
    assert found[-1] == pytest.approx(whole, rel=1e-5)


def test_top_k_of_a_certain_teacher_is_finite():
    hidden, head, _, weight = case(6)
    logp = torch.full((13, 2), -math.inf)
    logp[:, 0] = 0.0
    target = TopK(logp.clamp(min=-40), torch.tensor([[1, 2]] * 13))
    loss, _, gradient, _ = with_gradients(chunked_kl, hidden, head, target, weight, chunk=4)
    assert math.isfinite(loss.item())
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("fp32", [False, True])
def test_bf16_states_give_nearly_the_float32_loss(fp32):
    hidden, head, target, weight = case(7, positions=64, scale=0.5)
    exact = plain_kl(hidden, head, target, weight)[0].item()
    rounded = [x.detach().bfloat16() for x in (hidden, head, target.hidden, target.head)]
    mine = rounded[0].requires_grad_()
    loss, _ = chunked_kl(mine, rounded[1], Dense(*rounded[2:]), weight, chunk=16, fp32_logits=fp32)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.05)
    assert mine.grad is not None
    assert mine.grad.dtype == torch.bfloat16


class _Largest(TorchDispatchMode):
    """The largest number of elements that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.numel())
        return result


def test_no_tensor_of_all_logits_ever_exists():
    hidden, head, target, weight = case(8, positions=64, hidden=4, vocabulary=200)
    for k in (None, 8):
        wanted = target if k is None else top_k(target.hidden, target.head, k)
        with _Largest() as largest:
            loss, _ = chunked_kl(hidden, head, wanted, weight, chunk=8)
            loss.backward()
        assert largest.elements == 8 * 200
        with _Largest() as largest:
            plain_kl(hidden, head, wanted, weight)[0].backward()
        assert largest.elements >= 64 * 200


def test_a_frozen_head_gets_no_gradient():
    hidden, head, target, weight = case(9)
    loss, _ = chunked_kl(hidden, head.detach(), target, weight, chunk=4)
    (gradient,) = torch.autograd.grad(loss, (hidden,))
    expected = with_gradients(plain_kl, hidden, head, target, weight)[2] / 3
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


def test_compiled_equals_eager(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(kl, "_compiled", {})
    hidden, head, target, weight = case(10, positions=16)
    expected = with_gradients(chunked_kl, hidden, head, target, weight, chunk=8)
    found = with_gradients(chunked_kl, hidden, head, target, weight, chunk=8, compiled=True)
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
