"""Triton kernel: latent attention over expanded keys and values.

One program takes a run of query tokens of one request and one head. Key tiles that every row sees
in full are walked without a mask, the few on the diagonal with one.

Shapes: T query tokens, S key tokens, R requests, N heads, C qk_nope_head_dim, P qk_rope_head_dim,
V v_head_dim, M rows.
"""

# Kernels are typed by the compiler, not by annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from vllm_attnedit.ops.mla_prefill.attend import attend
from vllm_attnedit.ops.tiles import find_request, gate_logits, normalise


@triton.jit(do_not_specialize=["num_requests", "num_tasks"])
def expanded_kernel(
    q_nope_ptr,
    q_rope_ptr,
    k_nope_ptr,
    k_rope_ptr,
    v_ptr,
    query_start_ptr,
    key_start_ptr,
    gate_ptr,
    out_ptr,
    lse_ptr,
    key_scale_ptr,
    scale,
    num_requests,
    num_tasks,
    stride_q_nope_token,
    stride_q_nope_head,
    stride_q_rope_token,
    stride_q_rope_head,
    stride_k_nope_token,
    stride_k_nope_head,
    stride_k_rope_token,
    stride_v_token,
    stride_v_head,
    stride_gate,
    stride_out_token,
    stride_out_head,
    stride_lse,
    stride_key_scale,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    PADDED_NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    PADDED_ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
    CAUSAL: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One launch of the operator; see the module for what a program does."""
    row = tl.arange(0, ROWS)
    nope = tl.arange(0, PADDED_NOPE)
    rope = tl.arange(0, PADDED_ROPE)
    value = tl.arange(0, PADDED_VALUE)
    for task in range(tl.program_id(0), num_tasks, tl.num_programs(0)):
        # Later tiles of a prompt see more keys: taken first, they do not trail at the end.
        head = task % HEADS
        query_tile = (num_tasks - 1 - task) // HEADS
        request = find_request(query_start_ptr, num_requests, query_tile, ROWS, 128)
        query_start = tl.load(query_start_ptr + request)
        query_len = tl.load(query_start_ptr + request + 1) - query_start
        key_start = tl.load(key_start_ptr + request).to(tl.int64)
        key_len = (tl.load(key_start_ptr + request + 1) - key_start).to(tl.int32)
        first = (query_tile - (query_start // ROWS + request)) * ROWS
        if first < query_len:
            token = first + row
            row_ok = token < query_len
            start64 = query_start.to(tl.int64)
            q_nope = tl.load(
                q_nope_ptr
                + (start64 * stride_q_nope_token + head * stride_q_nope_head)
                + (token * stride_q_nope_token)[:, None]
                + nope[None, :],
                mask=row_ok[:, None] & (nope < NOPE)[None, :],
                other=0.0,
            )
            q_rope = tl.load(
                q_rope_ptr
                + (start64 * stride_q_rope_token + head * stride_q_rope_head)
                + (token * stride_q_rope_token)[:, None]
                + rope[None, :],
                mask=row_ok[:, None] & (rope < ROPE)[None, :],
                other=0.0,
            )
            k_nope_base = k_nope_ptr + key_start * stride_k_nope_token + head * stride_k_nope_head
            k_rope_base = k_rope_ptr + key_start * stride_k_rope_token
            key_scale_base = None
            if key_scale_ptr is not None:
                key_scale_base = key_scale_ptr + key_start * stride_key_scale + head
            v_base = v_ptr + key_start * stride_v_token + head * stride_v_head
            running_max = tl.full([ROWS], -1e30, tl.float32)
            running_sum = tl.zeros([ROWS], tl.float32)
            acc = tl.zeros([ROWS, PADDED_VALUE], tl.float32)

            # Keys before `full` are seen by all rows, those from `end` on by none.
            limit = token + key_len
            full = key_len // TILE * TILE
            end = key_len
            if CAUSAL:
                limit = token + key_len - query_len
                full = tl.maximum(first + key_len - query_len + 1, 0) // TILE * TILE
                end = tl.maximum(tl.minimum(first + ROWS + key_len - query_len, key_len), 0)
            running_max, running_sum, acc = attend(
                q_nope,
                q_rope,
                k_nope_base,
                k_rope_base,
                v_base,
                key_scale_base,
                0,
                full,
                limit,
                scale,
                running_max,
                running_sum,
                acc,
                stride_k_nope_token,
                stride_k_rope_token,
                stride_v_token,
                stride_key_scale,
                NOPE,
                PADDED_NOPE,
                ROPE,
                PADDED_ROPE,
                VALUE,
                PADDED_VALUE,
                TILE,
                STAGES,
                True,
            )
            running_max, running_sum, acc = attend(
                q_nope,
                q_rope,
                k_nope_base,
                k_rope_base,
                v_base,
                key_scale_base,
                full,
                end,
                limit,
                scale,
                running_max,
                running_sum,
                acc,
                stride_k_nope_token,
                stride_k_rope_token,
                stride_v_token,
                stride_key_scale,
                NOPE,
                PADDED_NOPE,
                ROPE,
                PADDED_ROPE,
                VALUE,
                PADDED_VALUE,
                TILE,
                STAGES,
                False,
            )

            result = normalise(acc, running_max, running_sum)
            if GATE > 0:
                logits = gate_logits(
                    gate_ptr,
                    query_start + token,
                    head,
                    value,
                    row_ok,
                    value < VALUE,
                    stride_gate,
                    VALUE,
                    GATE,
                )
                result *= tl.sigmoid(logits.to(tl.float32))
            tl.store(
                out_ptr
                + (start64 * stride_out_token + head * stride_out_head)
                + (token * stride_out_token)[:, None]
                + value[None, :],
                result.to(out_ptr.dtype.element_ty),
                mask=row_ok[:, None] & (value < VALUE)[None, :],
            )
            if lse_ptr is not None:
                seen = running_max > -1e29
                log_sum = running_max + tl.log2(tl.where(seen, running_sum, 1.0))
                tl.store(
                    lse_ptr + (start64 + token) * stride_lse + head,
                    tl.where(seen, log_sum * 0.6931471805599453, float("-inf")),
                    mask=row_ok,
                )
