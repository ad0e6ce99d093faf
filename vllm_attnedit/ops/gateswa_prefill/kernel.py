"""Triton kernel: window attention over dense chunks and their cached tails, gate in the epilogue.

One program takes a run of query tokens of one request and one KV head, with the group's heads as
further rows. It walks the cached tail (only the first tokens of a chunk reach it), then the part of
the chunk inside the window; tiles outside are never visited.

Shapes: T tokens, R requests, N query heads, K KV heads, G = N / K, D head width, M rows, S keys.
"""

# Kernels are typed by the compiler, not by annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from vllm_attnedit.ops.tiles import MASKED, find_request, gate_logits, normalise, online_softmax


@triton.jit(do_not_specialize=["num_requests", "num_tasks"])
def prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_ptr,
    value_ptr,
    block_table_ptr,
    seq_lens_ptr,
    query_start_ptr,
    gate_ptr,
    out_ptr,
    k_scale_ptr,
    v_scale_ptr,
    scale,
    window,
    num_requests,
    num_tasks,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
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
    STAGES: tl.constexpr,
):
    """One launch of the operator; see the module for what a program does."""
    TOKENS: tl.constexpr = ROWS // GROUP
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED)
    dim_ok = dim < WIDTH
    key = tl.arange(0, TILE)
    for task in range(tl.program_id(0), num_tasks, tl.num_programs(0)):
        kv_head = task % KV_HEADS
        query_tile = task // KV_HEADS
        request = find_request(query_start_ptr, num_requests, query_tile, TOKENS, 128)
        query_start = tl.load(query_start_ptr + request)
        query_len = tl.load(query_start_ptr + request + 1) - query_start
        first = (query_tile - (query_start // TOKENS + request)) * TOKENS
        if first < query_len:
            last = tl.minimum(first + TOKENS, query_len)
            cached = tl.load(seq_lens_ptr + request) - query_len
            token = first + row // GROUP
            head = kv_head * GROUP + row % GROUP
            row_ok = (token < query_len) & (row < TOKENS * GROUP)
            both_ok = row_ok[:, None] & dim_ok[None, :]
            start64 = query_start.to(tl.int64)
            q = tl.load(
                q_ptr
                + start64 * stride_q_token
                + (token * stride_q_token + head * stride_q_head)[:, None]
                + dim[None, :],
                mask=both_ok,
                other=0.0,
            )
            if GATE == 1:
                # One logit a row is cheap to hold; a tile of them is not, and is loaded at the end.
                logits = gate_logits(
                    gate_ptr, query_start + token, head, dim, row_ok, dim_ok, stride_gate, WIDTH, 1
                )
            running_max = tl.full([ROWS], -1e30, tl.float32)
            running_sum = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, PADDED], tl.float32)

            # The cached tail. Positions count from the chunk's first token: all are negative here.
            tail_scale = scale
            value_factor = 1.0
            if k_scale_ptr is not None:
                tail_scale *= tl.load(k_scale_ptr)
            if v_scale_ptr is not None:
                value_factor = tl.load(v_scale_ptr)
            table_ptr = block_table_ptr + tl.cast(request, tl.int64) * stride_table
            tail_start = tl.maximum(first - window + 1, -cached)
            for at in tl.range(tail_start, 0, TILE, num_stages=STAGES):
                pos = at + key
                key_ok = pos < 0
                absolute = cached + pos
                block = tl.load(table_ptr + absolute // PAGE, mask=key_ok, other=0).to(tl.int64)
                slot = absolute % PAGE
                load_ok = key_ok[:, None] & dim_ok[None, :]
                k_offset = block * STRIDE_K_BLOCK + (
                    slot * STRIDE_K_TOKEN + kv_head * STRIDE_K_HEAD
                )
                k_tile = tl.load(
                    key_ptr + k_offset[:, None] + dim[None, :], mask=load_ok, other=0.0
                ).to(q.dtype)
                v_offset = block * STRIDE_V_BLOCK + (
                    slot * STRIDE_V_TOKEN + kv_head * STRIDE_V_HEAD
                )
                v_tile = tl.load(
                    value_ptr + v_offset[:, None] + dim[None, :], mask=load_ok, other=0.0
                ).to(q.dtype)
                visible = key_ok[None, :] & (pos[None, :] > token[:, None] - window)
                scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee") * tail_scale
                weights, decay, running_max, running_sum = online_softmax(
                    tl.where(visible, scores, MASKED), running_max, running_sum
                )
                acc = acc * decay[:, None]
                weights = (weights * value_factor).to(q.dtype)
                acc = tl.dot(weights, v_tile, acc, input_precision="ieee")

            # The chunk itself.
            k_base = k_ptr + start64 * stride_k_token + kv_head * stride_k_head
            v_base = v_ptr + start64 * stride_v_token + kv_head * stride_v_head
            for at in tl.range(tl.maximum(first - window + 1, 0), last, TILE, num_stages=STAGES):
                pos = at + key
                load_ok = (pos < last)[:, None] & dim_ok[None, :]
                k_tile = tl.load(
                    k_base + (pos * stride_k_token)[:, None] + dim[None, :], mask=load_ok, other=0.0
                )
                v_tile = tl.load(
                    v_base + (pos * stride_v_token)[:, None] + dim[None, :], mask=load_ok, other=0.0
                )
                scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee") * scale
                if (at + TILE > first + 1) | (at <= last - 1 - window):
                    # Some row does not see the whole tile; the tiles between need no mask.
                    visible = (pos[None, :] <= token[:, None]) & (
                        pos[None, :] > token[:, None] - window
                    )
                    scores = tl.where(visible, scores, MASKED)
                weights, decay, running_max, running_sum = online_softmax(
                    scores, running_max, running_sum
                )
                acc = acc * decay[:, None]
                acc = tl.dot(weights.to(q.dtype), v_tile, acc, input_precision="ieee")

            result = normalise(acc, running_max, running_sum)
            if GATE == 2:
                logits = gate_logits(
                    gate_ptr, query_start + token, head, dim, row_ok, dim_ok, stride_gate, WIDTH, 2
                )
            if GATE > 0:
                result *= tl.sigmoid(logits.to(tl.float32))
            tl.store(
                out_ptr
                + start64 * stride_out_token
                + (token * stride_out_token + head * stride_out_head)[:, None]
                + dim[None, :],
                result.to(out_ptr.dtype.element_ty),
                mask=both_ok,
            )
