"""The kernel's walk over a stretch of keys and values, tile by tile, with a streaming softmax."""

# Kernels are typed by the compiler, not by annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from vllm_attnedit.ops.tiles import MASKED, online_softmax


@triton.jit
def attend(
    q_nope,
    q_rope,
    k_nope_base,
    k_rope_base,
    v_base,
    key_scale_ptr,
    begin,
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
    NOPE: tl.constexpr,
    PADDED_NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    PADDED_ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    FULL: tl.constexpr,
):
    """Keys begin to end; row i sees those up to ``limit[i]``, all of them if ``FULL``."""
    key = tl.arange(0, TILE)
    nope = tl.arange(0, PADDED_NOPE)
    rope = tl.arange(0, PADDED_ROPE)
    value = tl.arange(0, PADDED_VALUE)
    for at in tl.range(begin, end, TILE, num_stages=STAGES):
        pos = at + key
        key_ok = pos < end
        k_nope = tl.load(
            k_nope_base + (pos.to(tl.int64) * stride_k_nope_token)[:, None] + nope[None, :],
            mask=key_ok[:, None] & (nope < NOPE)[None, :],
            other=0.0,
        )
        k_rope = tl.load(
            k_rope_base + (pos.to(tl.int64) * stride_k_rope_token)[:, None] + rope[None, :],
            mask=key_ok[:, None] & (rope < ROPE)[None, :],
            other=0.0,
        )
        v = tl.load(
            v_base + (pos.to(tl.int64) * stride_v_token)[:, None] + value[None, :],
            mask=key_ok[:, None] & (value < VALUE)[None, :],
            other=0.0,
        )
        scores = tl.dot(q_nope, tl.trans(k_nope), input_precision="ieee")
        scores = tl.dot(q_rope, tl.trans(k_rope), scores, input_precision="ieee")
        scores *= scale
        if key_scale_ptr is not None:
            factor = tl.load(
                key_scale_ptr + pos.to(tl.int64) * stride_key_scale, mask=key_ok, other=0.0
            )
            scores *= factor[None, :]
        if not FULL:
            visible = key_ok[None, :] & (pos[None, :] <= limit[:, None])
            scores = tl.where(visible, scores, MASKED)
        weights, decay, running_max, running_sum = online_softmax(scores, running_max, running_sum)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return running_max, running_sum, acc
