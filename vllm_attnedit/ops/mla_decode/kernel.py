"""Triton kernel: absorbed latent attention over a paged latent cache, split over the sequence.

A program takes up to 32 rows, each a (token, head) of one request, and a share of its sequence.
A tile of latents is loaded once and serves as keys and as values. Shares are combined by a second
kernel in a fixed order.

Shapes: T tokens, R requests, N heads, C kv_lora_rank, P qk_rope_head_dim, M rows, S keys.
"""

# Kernels are typed by the compiler, not by annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from vllm_attnedit.ops.tiles import MASKED, normalise, online_softmax


@triton.jit(do_not_specialize=["num_tasks", "num_tokens"])
def latent_kernel(
    q_latent_ptr,
    q_rope_ptr,
    cache_ptr,
    block_table_ptr,
    seq_lens_ptr,
    query_start_ptr,
    gate_ptr,
    out_ptr,
    partial_ptr,
    partial_lse_ptr,
    kv_scale_ptr,
    key_scale_ptr,
    scale,
    num_tasks,
    num_tokens,
    stride_latent_token,
    stride_latent_head,
    stride_rope_token,
    stride_rope_head,
    stride_table,
    stride_gate,
    stride_out_token,
    stride_out_head,
    STRIDE_BLOCK: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    STRIDE_SCALE_BLOCK: tl.constexpr,
    STRIDE_SCALE_TOKEN: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    ROPE: tl.constexpr,
    PADDED_ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    STAGES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One launch of the operator; see the module for what a program does."""
    dim = tl.arange(0, PADDED_RANK)
    dim_ok = dim < RANK
    rope = tl.arange(0, PADDED_ROPE)
    rope_ok = rope < ROPE
    key = tl.arange(0, TILE)
    for task in range(tl.program_id(0), num_tasks, tl.num_programs(0)):
        split = task % SPLITS
        query_tile = task // SPLITS % QUERY_TILES
        request = task // (SPLITS * QUERY_TILES)

        length = tl.load(seq_lens_ptr + request)
        query_start = tl.load(query_start_ptr + request)
        query_len = tl.load(query_start_ptr + request + 1) - query_start
        row = query_tile * ROWS + tl.arange(0, ROWS)
        if query_tile * ROWS < query_len * HEADS:
            token = row // HEADS
            head = row % HEADS
            row_ok = token < query_len
            start64 = query_start.to(tl.int64)
            q_latent = tl.load(
                q_latent_ptr
                + start64 * stride_latent_token
                + (token * stride_latent_token + head * stride_latent_head)[:, None]
                + dim[None, :],
                mask=row_ok[:, None] & dim_ok[None, :],
                other=0.0,
            )
            q_rope = tl.load(
                q_rope_ptr
                + start64 * stride_rope_token
                + (token * stride_rope_token + head * stride_rope_head)[:, None]
                + rope[None, :],
                mask=row_ok[:, None] & rope_ok[None, :],
                other=0.0,
            )
            if GATE > 0 and SPLITS == 1:
                logits = tl.load(
                    gate_ptr + (start64 + token) * stride_gate + head, mask=row_ok, other=0.0
                )
            qk_scale = scale
            if kv_scale_ptr is not None:
                qk_scale *= tl.load(kv_scale_ptr)

            position = length - query_len + token
            last_token = tl.minimum(query_len - 1, (query_tile * ROWS + ROWS - 1) // HEADS)
            end = length - query_len + last_token + 1
            share = tl.cdiv(tl.cdiv(end, SPLITS), TILE) * TILE
            start = split * share
            stop = tl.minimum(start + share, end)

            table_ptr = block_table_ptr + tl.cast(request, tl.int64) * stride_table
            running_max = tl.full([ROWS], -1e30, tl.float32)
            running_sum = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, PADDED_RANK], tl.float32)
            for at in tl.range(start, stop, TILE, num_stages=STAGES):
                pos = at + key
                key_ok = pos < stop
                if ALIGNED:
                    block = tl.load(table_ptr + at // PAGE).to(tl.int64)
                    slot = at % PAGE + key
                else:
                    block = tl.load(table_ptr + pos // PAGE, mask=key_ok, other=0).to(tl.int64)
                    slot = pos % PAGE
                entry = cache_ptr + block * STRIDE_BLOCK + slot * STRIDE_TOKEN
                latent = tl.load(
                    entry[:, None] + dim[None, :],
                    mask=key_ok[:, None] & dim_ok[None, :],
                    other=0.0,
                ).to(q_latent.dtype)
                k_rope = tl.load(
                    entry[:, None] + RANK + rope[None, :],
                    mask=key_ok[:, None] & rope_ok[None, :],
                    other=0.0,
                ).to(q_latent.dtype)
                scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
                scores = tl.dot(q_rope, tl.trans(k_rope), scores, input_precision="ieee")
                if key_scale_ptr is not None:
                    of_key = block * STRIDE_SCALE_BLOCK + slot * STRIDE_SCALE_TOKEN
                    scores *= tl.load(
                        key_scale_ptr + of_key[None, :] + head[:, None],
                        mask=row_ok[:, None] & key_ok[None, :],
                        other=0.0,
                    )
                visible = key_ok[None, :] & (pos[None, :] <= position[:, None])
                scores = tl.where(visible, scores * qk_scale, MASKED)
                weights, decay, running_max, running_sum = online_softmax(
                    scores, running_max, running_sum
                )
                acc = acc * decay[:, None]
                acc = tl.dot(weights.to(q_latent.dtype), latent, acc, input_precision="ieee")

            result = normalise(acc, running_max, running_sum)
            if kv_scale_ptr is not None:
                result *= tl.load(kv_scale_ptr)
            both_ok = row_ok[:, None] & dim_ok[None, :]
            if SPLITS == 1:
                if GATE > 0:
                    result *= tl.sigmoid(logits.to(tl.float32))[:, None]
                tl.store(
                    out_ptr
                    + start64 * stride_out_token
                    + (token * stride_out_token + head * stride_out_head)[:, None]
                    + dim[None, :],
                    result.to(out_ptr.dtype.element_ty),
                    mask=both_ok,
                )
            else:
                part = (tl.cast(split, tl.int64) * num_tokens + query_start + token) * HEADS + head
                tl.store(partial_ptr + part[:, None] * RANK + dim[None, :], result, mask=both_ok)
                seen = tl.where(running_max > -1e29, running_sum, 1.0)
                tl.store(partial_lse_ptr + part, running_max + tl.log2(seen), mask=row_ok)
