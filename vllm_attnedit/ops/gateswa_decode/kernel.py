"""Triton kernel: paged window attention for a few query tokens a request, gate in the epilogue.

One program takes one request and KV head: its query rows are the group's heads times the request's
tokens, so that each cached byte is read once. Where the batch is too small to fill the device,
several programs share a window and a second kernel combines them, in a fixed order.

Shapes: T tokens, R requests, N query heads, K KV heads, G = N / K, D head width, M rows, S keys.
"""

# Kernels are typed by the compiler, not by annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from vllm_attnedit.ops.tiles import MASKED, gate_logits, normalise, online_softmax


@triton.jit(do_not_specialize=["num_tasks", "num_tokens"])
def decode_kernel(
    q_ptr,
    key_ptr,
    value_ptr,
    block_table_ptr,
    seq_lens_ptr,
    query_start_ptr,
    gate_ptr,
    out_ptr,
    partial_ptr,
    partial_lse_ptr,
    k_scale_ptr,
    v_scale_ptr,
    scale,
    window,
    num_tasks,
    num_tokens,
    stride_q_token,
    stride_q_head,
    stride_table,
    stride_gate,
    stride_out_token,
    stride_out_head,
    STRIDE_K_BLOCK: tl.constexpr,
    STRIDE_K_TOKEN: tl.constexpr,
    STRIDE_K_HEAD: tl.constexpr,
    STRIDE_V_BLOCK: tl.constexpr,
    STRIDE_V_TOKEN: tl.constexpr,
    STRIDE_V_HEAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
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
    TOKENS: tl.constexpr = ROWS // GROUP
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED)
    dim_ok = dim < WIDTH
    key = tl.arange(0, TILE)
    for task in range(tl.program_id(0), num_tasks, tl.num_programs(0)):
        split = task % SPLITS
        query_tile = task // SPLITS % QUERY_TILES
        kv_head = task // (SPLITS * QUERY_TILES) % KV_HEADS
        request = task // (SPLITS * QUERY_TILES * KV_HEADS)

        length = tl.load(seq_lens_ptr + request)
        query_start = tl.load(query_start_ptr + request)
        query_len = tl.load(query_start_ptr + request + 1) - query_start
        first = query_tile * TOKENS
        if first < query_len:
            token = first + row // GROUP
            head = kv_head * GROUP + row % GROUP
            row_ok = (token < query_len) & (row < TOKENS * GROUP)
            both_ok = row_ok[:, None] & dim_ok[None, :]
            q_offset = query_start.to(tl.int64) * stride_q_token
            q = tl.load(
                q_ptr
                + q_offset
                + (token * stride_q_token + head * stride_q_head)[:, None]
                + dim[None, :],
                mask=both_ok,
                other=0.0,
            )
            if GATE > 0 and SPLITS == 1:
                logits = gate_logits(
                    gate_ptr,
                    query_start + token,
                    head,
                    dim,
                    row_ok,
                    dim_ok,
                    stride_gate,
                    WIDTH,
                    GATE,
                )
            qk_scale = scale
            if k_scale_ptr is not None:
                qk_scale *= tl.load(k_scale_ptr)

            position = length - query_len + token
            begin = tl.maximum(length - query_len + first - window + 1, 0)
            end = length - query_len + tl.minimum(first + TOKENS, query_len)
            origin = begin
            if ALIGNED:
                origin = begin // TILE * TILE
            share = tl.cdiv(tl.cdiv(end - origin, SPLITS), TILE) * TILE
            start = origin + split * share
            stop = tl.minimum(start + share, end)

            table_ptr = block_table_ptr + tl.cast(request, tl.int64) * stride_table
            running_max = tl.full([ROWS], -1e30, tl.float32)
            running_sum = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, PADDED], tl.float32)
            for at in tl.range(start, stop, TILE, num_stages=STAGES):
                pos = at + key
                key_ok = (pos >= begin) & (pos < stop)
                if ALIGNED:
                    block = tl.load(table_ptr + at // PAGE).to(tl.int64)
                    slot = at % PAGE + key
                else:
                    block = tl.load(table_ptr + pos // PAGE, mask=key_ok, other=0).to(tl.int64)
                    slot = pos % PAGE
                load_ok = key_ok[:, None] & dim_ok[None, :]
                k_offset = block * STRIDE_K_BLOCK + (
                    slot * STRIDE_K_TOKEN + kv_head * STRIDE_K_HEAD
                )
                k = tl.load(key_ptr + k_offset[:, None] + dim[None, :], mask=load_ok, other=0.0).to(
                    q.dtype
                )
                v_offset = block * STRIDE_V_BLOCK + (
                    slot * STRIDE_V_TOKEN + kv_head * STRIDE_V_HEAD
                )
                v = tl.load(
                    value_ptr + v_offset[:, None] + dim[None, :], mask=load_ok, other=0.0
                ).to(q.dtype)
                visible = (pos[None, :] <= position[:, None]) & (
                    pos[None, :] > position[:, None] - window
                )
                scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
                scores = tl.where(visible & key_ok[None, :], scores, MASKED)
                weights, decay, running_max, running_sum = online_softmax(
                    scores, running_max, running_sum
                )
                acc = acc * decay[:, None]
                acc = tl.dot(weights.to(q.dtype), v, acc, input_precision="ieee")

            result = normalise(acc, running_max, running_sum)
            if v_scale_ptr is not None:
                result *= tl.load(v_scale_ptr)
            if SPLITS == 1:
                if GATE > 0:
                    result *= tl.sigmoid(logits.to(tl.float32))
                out_offset = query_start.to(tl.int64) * stride_out_token
                tl.store(
                    out_ptr
                    + out_offset
                    + (token * stride_out_token + head * stride_out_head)[:, None]
                    + dim[None, :],
                    result.to(out_ptr.dtype.element_ty),
                    mask=both_ok,
                )
            else:
                part = (tl.cast(split, tl.int64) * num_tokens + query_start + token) * (
                    KV_HEADS * GROUP
                ) + head
                tl.store(partial_ptr + part[:, None] * WIDTH + dim[None, :], result, mask=both_ok)
                seen = tl.where(running_max > -1e29, running_sum, 1.0)
                tl.store(partial_lse_ptr + part, running_max + tl.log2(seen), mask=row_ok)
