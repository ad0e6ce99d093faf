"""The oracles themselves: against textbook attention, and against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.ops.batches import WindowCase, paged, window_batch
from vllm_attnedit.ops.gateswa_decode import gateswa_decode
from vllm_attnedit.ops.gateswa_prefill import gateswa_prefill
from vllm_attnedit.ops.kv_write import kv_write
from vllm_attnedit.ops.mla_decode import mla_decode
from vllm_attnedit.ops.mla_prefill import mla_prefill
from vllm_attnedit.ops.sigmoid_gate import sigmoid_gate

HEADS, KV_HEADS, WIDTH, BLOCK = 4, 2, 16, 16


def sequence(length, seed=0):
    """Queries, keys and values of one request, in float64."""
    rng = torch.Generator().manual_seed(seed)
    shapes = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(length, n, WIDTH, generator=rng, dtype=torch.float64) for n in shapes]


def textbook(q, k, v, window):
    """Window attention of a whole sequence by torch's own function."""
    length = q.shape[0]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    return torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1),
        k.transpose(0, 1),
        v.transpose(0, 1),
        attn_mask=(distance >= 0) & (distance < window),
        enable_gqa=True,
    ).transpose(0, 1)


def in_pages(k, v) -> dict[str, Any]:
    """Caches and the table of one request that holds ``k`` and ``v``, by argument name."""
    length = k.shape[0]
    pages = -(-length // BLOCK)
    caches = paged((pages + 1, BLOCK, KV_HEADS, WIDTH), "nhd", k.dtype, "cpu")
    table = torch.arange(pages, 0, -1, dtype=torch.int32)
    positions = torch.arange(length)
    for cache, entries in zip(caches, (k, v)):
        cache[table[positions // BLOCK].long(), positions % BLOCK] = entries
    return {"key_cache": caches[0], "value_cache": caches[1], "block_table": table[None]}


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 1000])
@pytest.mark.parametrize("cut", [0, 1, 16, 30, 36, 37])
def test_window_attention_is_the_same_however_a_sequence_is_cut(window, cut):
    length, tail = 40, 3
    q, k, v = sequence(length)
    expected = textbook(q, k, v, window)
    cache = in_pages(k, v)
    options: dict[str, Any] = {"sliding_window": window, "scale": WIDTH**-0.5}
    chunk = slice(cut, length - tail)
    dense = gateswa_prefill(
        q=q[chunk],
        k=k[chunk],
        v=v[chunk],
        seq_lens=ints(length - tail),
        query_start_loc=ints(0, chunk.stop - cut),
        **cache,
        **options,
    )
    torch.testing.assert_close(dense, expected[chunk])
    last = gateswa_decode(
        q=q[-tail:],
        seq_lens=ints(length),
        query_start_loc=ints(0, tail),
        max_query_len=tail,
        **cache,
        **options,
    )
    torch.testing.assert_close(last, expected[-tail:])


def test_prefill_reads_the_chunk_from_its_dense_keys_only():
    case = WindowCase(dtype="fp32", requests=((40, 20), (9, 9)), window=25)
    batch = window_batch(case, "cpu", chunk_in_cache=False)
    out = gateswa_prefill(
        batch.q,
        batch.k,
        batch.v,
        batch.key_cache,
        batch.value_cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        sliding_window=case.window,
        scale=1.0,
    )
    # Every cache entry that is not one of the W - 1 before a chunk is NaN.
    assert out[: batch.written].isfinite().all()


@pytest.mark.parametrize("elementwise", [False, True])
def test_gate_multiplies_by_its_sigmoid_in_every_operator(elementwise):
    q, k, v = sequence(20)
    cache = in_pages(k, v)
    logits = torch.randn(20, HEADS * (WIDTH if elementwise else 1), dtype=torch.float64)
    weight = torch.sigmoid(logits).reshape(20, HEADS, -1)
    options: dict[str, Any] = {"sliding_window": 7, "scale": 0.3}
    batch = {**cache, "seq_lens": ints(20), "query_start_loc": ints(0, 20)}
    for call in (
        lambda gate: gateswa_decode(q, max_query_len=20, gate=gate, **batch, **options),
        lambda gate: gateswa_prefill(q, k, v, gate=gate, **batch, **options),
    ):
        torch.testing.assert_close(call(logits), call(None) * weight)
    torch.testing.assert_close(sigmoid_gate(q, logits), q * weight)


def test_a_request_with_more_queries_than_tokens_is_padding():
    q, k, v = sequence(4)
    out = gateswa_decode(
        q,
        seq_lens=ints(0),
        query_start_loc=ints(0, 2),
        sliding_window=3,
        scale=1.0,
        max_query_len=2,
        out=torch.full_like(q, torch.nan),
        **in_pages(k, v),
    )
    assert (out[:2] == 0).all()
    assert out[2:].isnan().all()


def test_absorbed_latent_attention_equals_the_expanded_one():
    """Folding W_UK into the query and W_UV into the output changes nothing."""
    length, heads, rank, rope, nope, value = 37, 3, 32, 16, 16, 48
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    latent, k_rope = normal(length, rank), normal(length, rope)
    w_uk, w_uv = normal(heads, nope, rank), normal(heads, rank, value)
    q_nope, q_rope = normal(length, heads, nope), normal(length, heads, rope)
    pages = -(-length // BLOCK)
    cache = torch.full((pages + 1, BLOCK, rank + rope), torch.nan, dtype=torch.float64)
    cache[1:].view(-1, rank + rope)[:length] = torch.cat([latent, k_rope], -1)
    absorbed = mla_decode(
        torch.einsum("tnc,ncr->tnr", q_nope, w_uk),
        q_rope,
        cache,
        torch.arange(1, pages + 1, dtype=torch.int32)[None],
        ints(length),
        ints(0, length),
        scale=0.2,
        max_seq_len=length,
        max_query_len=length,
    )
    expanded = mla_prefill(
        q_nope,
        q_rope,
        torch.einsum("sr,ncr->snc", latent, w_uk),
        k_rope,
        torch.einsum("sr,nrv->snv", latent, w_uv),
        ints(0, length),
        ints(0, length),
        scale=0.2,
    )
    torch.testing.assert_close(torch.einsum("tnr,nrv->tnv", absorbed, w_uv), expanded)


def test_parts_of_a_prefix_merge_by_their_logarithms():
    """Attention over two parts, weighed by exp(lse), is attention over both."""
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 2, 32, generator=rng, dtype=torch.float64) for n in (5, 30))
    v = torch.randn(30, 2, 16, generator=rng, dtype=torch.float64)

    def attend(first, last, causal):
        lse = torch.empty(5, 2)
        out = mla_prefill(
            q[..., :16],
            q[..., 16:],
            k[first:last, :, :16],
            k[first:last, 0, 16:],
            v[first:last],
            ints(0, 5),
            ints(0, last - first),
            scale=0.2,
            causal=causal,
            lse=lse,
        )
        return out, lse.double()[..., None].exp()

    whole, _ = attend(0, 30, True)
    (prefix, a), (chunk, b) = attend(0, 20, False), attend(20, 30, True)
    torch.testing.assert_close((prefix * a + chunk * b) / (a + b), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_neox", [True, False])
def test_kv_write_turns_pairs_as_complex_numbers_and_keeps_the_rest(is_neox):
    tokens, rotary = 3, 16
    k = torch.randn(tokens, 1, 32, dtype=torch.float64)
    angle = torch.rand(9, rotary // 2, dtype=torch.float64)
    positions = torch.tensor([4, 0, 8])
    caches = paged((2, BLOCK, 1, 32), "nhd", torch.float64, "cpu")
    k_out = torch.empty_like(k)
    kv_write(
        None,
        k,
        k,
        *caches,
        torch.tensor([BLOCK, 3, -1]),
        positions=positions,
        cos_sin_cache=torch.cat([angle.cos(), angle.sin()], -1),
        is_neox=is_neox,
        k_out=k_out,
    )
    pair = (
        (k[..., : rotary // 2], k[..., rotary // 2 : rotary])
        if is_neox
        else (k[..., 0:rotary:2], k[..., 1:rotary:2])
    )
    turned = torch.polar(torch.ones_like(angle), angle)[positions][:, None] * torch.complex(*pair)
    halves = (turned.real, turned.imag)
    expected = torch.cat(halves, -1) if is_neox else torch.stack(halves, -1).flatten(-2)
    torch.testing.assert_close(k_out[..., :rotary], expected)
    assert torch.equal(k_out[..., rotary:], k[..., rotary:])
    # One token owns memory; the null block's and the padded one do not.
    assert torch.equal(caches[0][1, 0], k_out[0])
    assert torch.equal(caches[1][1, 0], k[0])
    assert int(caches[0].isfinite().sum()) == 32


def test_kv_write_norms_each_head():
    q = torch.randn(2, 3, 32, dtype=torch.float64)
    weight = torch.rand(32, dtype=torch.float64)
    expected = torch.nn.functional.rms_norm(q, (32,), weight, 1e-5)
    caches = paged((2, BLOCK, 3, 32), "nhd", torch.float64, "cpu")
    slots = torch.tensor([BLOCK + 1, BLOCK + 2])
    kv_write(q, q.clone(), q.clone(), *caches, slots, q_weight=weight, k_weight=weight, eps=1e-5)
    torch.testing.assert_close(q, expected)
    torch.testing.assert_close(caches[0][1, 1:3], expected)


def test_a_padding_request_has_more_queries_than_tokens():
    """What comes out of it is nobody's; the request after it is not disturbed."""
    q, k, v = sequence(6)
    pages = in_pages(k, v)
    pages["block_table"] = pages["block_table"].repeat(2, 1)
    out = gateswa_prefill(
        q.repeat(2, 1, 1),
        k.repeat(2, 1, 1),
        v.repeat(2, 1, 1),
        pages["key_cache"],
        pages["value_cache"],
        pages["block_table"],
        torch.tensor([0, 6], dtype=torch.int32),
        torch.tensor([0, 6, 12], dtype=torch.int32),
        sliding_window=4,
        scale=WIDTH**-0.5,
    )
    torch.testing.assert_close(out[6:], textbook(q, k, v, 4))
