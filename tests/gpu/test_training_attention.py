"""Packed attention on the GPU: the flash and flex kernels against a float32 mask, gradients too.

Shapes: B sequences, T tokens, N query heads, K key/value heads, D query width, V value width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.training.test_attention import batch_of
from training.attention import build_masks, packed_attention

pytestmark = pytest.mark.gpu
LENGTHS = [[700, 1, 127, 128, 129, 939], [2024], [8] * 253]


def run(form, window, inputs, weight):
    query, key, _ = inputs
    layer: Any = nn.Module()
    layer.num_key_value_groups, layer.is_causal = query.shape[1] // key.shape[1], True
    batch = batch_of(LENGTHS).to(torch.device("cuda"))
    mask = build_masks(batch, form, window)[
        "full_attention" if window is None else "sliding_attention"
    ]
    parts = [x.detach().requires_grad_() for x in inputs]
    output, _ = packed_attention(
        layer, parts[0], parts[1], parts[2], mask,
        scaling=query.shape[-1] ** -0.5, sliding_window=window,
    )  # fmt: skip
    gradients = torch.autograd.grad((output.float() * weight).sum(), parts)
    return [output, *gradients]


@pytest.mark.parametrize("window", [None, 1, 64, 128, 4096])
@pytest.mark.parametrize("dims", [(9, 3, 64, 64), (9, 9, 96, 64), (32, 8, 128, 128)], ids=str)
@pytest.mark.parametrize("form", ["varlen", "flex"])
def test_kernels_equal_the_mask(form, dims, window):
    heads, kv_heads, width, value_width = dims
    if form == "flex" and width != value_width:
        width = 128  # FlexAttention takes powers of two
    torch.manual_seed(0)
    shapes = [(3, heads, 2024, width), (3, kv_heads, 2024, width), (3, kv_heads, 2024, value_width)]
    inputs = [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]
    weight = torch.randn(3, 2024, heads, value_width, device="cuda")
    expected = run("sdpa", window, [x.float() for x in inputs], weight)
    found = run(form, window, inputs, weight)
    for mine, theirs in zip(found, expected):
        # With one visible key, gradients of queries and keys are zero: rounding over rounding.
        size = theirs.norm().clamp(min=1e-3 * theirs.numel() ** 0.5)
        assert (mine.float() - theirs).norm() / size < 1e-2


@pytest.mark.parametrize("form", ["varlen", "flex"])
def test_float32_inputs_under_autocast(form):
    """Those of a layer all of which trains; their gradients are float32 again."""
    shapes = [(3, 9, 2024, 64), (3, 3, 2024, 64), (3, 3, 2024, 64)]
    inputs = [torch.randn(shape, device="cuda") for shape in shapes]
    weight = torch.randn(3, 2024, 9, 64, device="cuda")
    expected = run("sdpa", 128, inputs, weight)
    with torch.autocast("cuda", torch.bfloat16):
        found = run(form, 128, inputs, weight)
    assert [x.dtype for x in found] == [torch.bfloat16, *[torch.float32] * 3]
    for mine, theirs in zip(found, expected):
        assert (mine.float() - theirs).norm() / theirs.norm() < 1e-2


@pytest.mark.parametrize("window", [None, 128])
def test_gradients_repeat_every_bit(window):
    """As strict as training is. Of a window a query has so few parts that their order hardly
    matters; without one it has sixteen."""
    shapes = [(3, 9, 2024, 64), (3, 3, 2024, 64), (3, 3, 2024, 64)]
    inputs = [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]
    weight = torch.randn(3, 2024, 9, 64, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (run("varlen", window, inputs, weight) for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))
