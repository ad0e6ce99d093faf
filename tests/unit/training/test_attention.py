"""Packed attention in all its forms, held to a plain softmax over each query's own keys.

Shapes: B sequences, T tokens, N query heads, K key/value heads, D query width, V value width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from training import attention
from training.attention import DocumentEnds, build_masks, packed_attention
from training.data.batches import make_batch
from training.data.packing import Sequence
from vllm_attnedit.errors import AttnEditError

FORMS = ("sdpa", "varlen", "flex")


def batch_of(lengths):
    """Sequences made of documents of these lengths."""
    sequences = []
    for row in lengths:
        documents = np.repeat(np.arange(len(row)), row).astype(np.int32)
        size = len(documents)
        sequences.append(Sequence(np.zeros(size, dtype=np.int64), documents, np.ones(size, bool)))
    return make_batch(sequences, tuple(range(len(lengths))), answers_only=False)


def oracle(query, key, value, documents, window, scaling):
    """One query at a time, in float64."""
    q, k, v = (x.double() for x in (query, key, value))
    groups = q.shape[1] // k.shape[1]
    rows, heads, length, _ = q.shape
    output = torch.full((rows, length, heads, v.shape[-1]), math.nan, dtype=torch.float64)
    for b in range(rows):
        for n in range(heads):
            for t in range(length):
                seen = [
                    s
                    for s in range(t + 1)
                    if documents[b, s] == documents[b, t] and (window is None or t - s < window)
                ]
                scores = k[b, n // groups, seen] @ q[b, n, t] * scaling
                output[b, t, n] = torch.softmax(scores, 0) @ v[b, n // groups, seen]
    return output


def tensors(seed, rows, heads, kv_heads, length, width, value_width):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(rows, heads, length, width), (rows, kv_heads, length, width)]
    shapes.append((rows, kv_heads, length, value_width))
    return [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]


def module(heads, kv_heads):
    layer: Any = nn.Module()
    layer.num_key_value_groups = heads // kv_heads
    layer.is_causal = True
    return layer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width"), [(6, 2, 16, 16), (2, 2, 24, 16)]
)
def test_forms_equal_the_oracle(form, window, heads, kv_heads, width, value_width):
    batch = batch_of([[5, 1, 8], [14], [1] * 14])
    parts = tensors(1, 3, heads, kv_heads, 14, width, value_width)
    query, key, value = (x.detach() for x in parts)  # FlexAttention has no backward on a CPU
    masks = build_masks(batch, form, window)
    mask = masks["full_attention" if window is None else "sliding_attention"]
    output, weights = packed_attention(
        module(heads, kv_heads), query, key, value, mask, scaling=0.2, sliding_window=window
    )
    expected = oracle(query, key, value, batch.documents, window, 0.2)
    assert weights is None
    torch.testing.assert_close(output.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_gradients_equal_those_of_the_mask(window):
    batch = batch_of([[7, 2, 4], [13]])
    results = {}
    for kind in ("sdpa", "varlen"):
        parts = tensors(2, 2, 4, 2, 13, 16, 16)
        mask = build_masks(batch, kind, window)[
            "full_attention" if window is None else "sliding_attention"
        ]
        query, key, value = parts
        output, _ = packed_attention(
            module(4, 2), query, key, value, mask, scaling=0.3, sliding_window=window
        )
        weight = torch.linspace(-1, 1, output.numel()).view_as(output)
        results[kind] = torch.autograd.grad((output * weight).sum(), parts)
    for mine, theirs in zip(results["varlen"], results["sdpa"]):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-4)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    window=st.one_of(st.none(), st.integers(1, 12)),
    seed=st.integers(0, 99),
)
def test_documents_of_any_lengths(rows, window, seed):
    longest = max(sum(row) for row in rows)
    rows = [row if sum(row) == longest else [*row, longest - sum(row)] for row in rows]
    batch = batch_of(rows)
    query, key, value = tensors(seed, len(rows), 3, 1, longest, 8, 8)
    expected = oracle(query, key, value, batch.documents, window, 0.5)
    for form in ("sdpa", "varlen"):
        masks = build_masks(batch, form, window)
        mask = masks["full_attention" if window is None else "sliding_attention"]
        output, _ = packed_attention(
            module(3, 1), query, key, value, mask, scaling=0.5, sliding_window=window
        )
        torch.testing.assert_close(output.double(), expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize(("form", "function"), [("varlen", "_plain_varlen"), ("flex", "_flex")])
def test_kernels_get_the_dtype_of_autocast(monkeypatch, form, function):
    """Where norms and embeddings train, in float32, the rotary embedding makes float32 of queries
    and keys. Autocast knows neither kernel, and flash attention takes nothing but bf16."""
    kernel = getattr(attention, function)
    seen: set[torch.dtype] = set()

    def watched(query, key, value, *rest):
        seen.update(x.dtype for x in (query, key, value))
        return kernel(query, key, value, *rest)

    monkeypatch.setattr(attention, function, watched)
    batch = batch_of([[5, 1, 8], [14]])
    query, key, value = (x.detach() for x in tensors(1, 2, 2, 1, 14, 16, 16))
    mask = build_masks(batch, form, None)["full_attention"]
    inputs = (query, key, value.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = packed_attention(module(2, 1), *inputs, mask, scaling=0.2)
    assert seen == {torch.bfloat16}
    expected = oracle(query, key, value, batch.documents, None, 0.2)
    torch.testing.assert_close(output.double(), expected, atol=0.02, rtol=0.02)


def test_the_flash_kernel_is_asked_for_what_it_takes(monkeypatch):
    """On CUDA: flattened tensors, one width for all, the window without the query's own key."""
    asked: dict[str, Any] = {}

    def kernel(query, key, value, ends, ends_k, longest, longest_k, *, scale, window_size):
        asked.update(shapes=[tuple(x.shape) for x in (query, key, value)], window=window_size)
        asked.update(ends=ends, longest=longest, scale=scale)
        assert ends is ends_k
        assert longest == longest_k
        return query * 0 + value.repeat_interleave(query.shape[1] // value.shape[1], 1)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    query, key, value = tensors(0, 2, 4, 2, 6, 24, 16)
    ends = DocumentEnds(torch.tensor([0, 6, 12], dtype=torch.int32), 128)
    for window, expected in ((None, (-1, 0)), (5, (4, 0))):
        output = attention._flash_varlen(query, key, value, ends, 0.1, window)
        assert asked["shapes"] == [(12, 4, 24), (12, 2, 24), (12, 2, 24)]
        assert asked["window"] == expected
        assert asked["scale"] == 0.1
        assert output.shape == (2, 6, 4, 16)
        wanted = value.transpose(1, 2).repeat_interleave(2, 2)
        torch.testing.assert_close(output, wanted)


def test_choice_of_form():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert attention.choose("auto", cuda, "bf16") == "varlen"
    assert attention.choose("auto", cuda, "fp32") == "sdpa"
    assert attention.choose("auto", cpu, "bf16") == "sdpa"
    assert attention.choose("flex", cuda, "fp32") == "flex"
    for requested, device in (("varlen", cuda), ("flex", cpu)):
        with pytest.raises(AttnEditError, match=r"run\.attention"):
            attention.choose(requested, device, "fp32")


def test_dropout_is_refused():
    query, key, value = tensors(0, 1, 1, 1, 2, 4, 4)
    with pytest.raises(AttnEditError, match="attention_dropout"):
        packed_attention(module(1, 1), query, key, value, None, dropout=0.1)
