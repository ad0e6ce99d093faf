"""Triton kernel: QK-norm, RoPE and the paged write of K and V in one pass.

A program takes some heads of one token, all of them queries, keys or values, and keeps the halves
that turn with each other in registers: each byte is read once and written where it is wanted.

Shapes: T tokens, N query heads, K KV heads, D head width, H heads of a program.
"""

# Kernels are typed by the compiler, not by annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from vllm_attnedit.ops.kv_write.heads import finish, load_parts, store_parts


@triton.jit(do_not_specialize=["num_slots", "num_tasks"])
def write_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_ptr,
    value_ptr,
    slot_ptr,
    position_ptr,
    cos_sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_out_ptr,
    k_out_ptr,
    k_scale_ptr,
    v_scale_ptr,
    eps,
    num_slots,
    num_tasks,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_q_out_token,
    stride_q_out_head,
    stride_k_out_token,
    stride_k_out_head,
    stride_cos_sin,
    STRIDE_K_BLOCK: tl.constexpr,
    STRIDE_K_TOKEN: tl.constexpr,
    STRIDE_K_HEAD: tl.constexpr,
    STRIDE_V_BLOCK: tl.constexpr,
    STRIDE_V_TOKEN: tl.constexpr,
    STRIDE_V_HEAD: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    NEOX: tl.constexpr,
    PAGE: tl.constexpr,
    FIRST_SLOT: tl.constexpr,
    STORE_K: tl.constexpr,
    H: tl.constexpr,
):
    """One launch of the operator; see the module for what a program does."""
    Q_PARTS: tl.constexpr = (Q_HEADS + H - 1) // H
    KV_PARTS: tl.constexpr = (KV_HEADS + H - 1) // H
    for task in range(tl.program_id(0), num_tasks, tl.num_programs(0)):
        part = task % (Q_PARTS + 2 * KV_PARTS)
        token = tl.cast(task // (Q_PARTS + 2 * KV_PARTS), tl.int64)
        cos_sin = cos_sin_ptr
        if ROTARY > 0:
            position = tl.load(position_ptr + token).to(tl.int64)
            cos_sin = cos_sin_ptr + position * stride_cos_sin
        if part < Q_PARTS:
            head = part * H + tl.arange(0, H)
            ok = head < Q_HEADS
            a, b, rest = load_parts(
                q_ptr + token * stride_q_token,
                head * stride_q_head,
                ok,
                WIDTH,
                ROTARY,
                HALF,
                TAIL,
                NEOX,
            )
            a, b, rest = finish(
                a, b, rest, q_weight_ptr, cos_sin, eps, WIDTH, ROTARY, HALF, TAIL, NEOX
            )
            store_parts(
                q_out_ptr + token * stride_q_out_token,
                head * stride_q_out_head,
                ok,
                a,
                b,
                rest,
                WIDTH,
                ROTARY,
                HALF,
                TAIL,
                NEOX,
            )
        else:
            slot = tl.load(slot_ptr + token, mask=token < num_slots, other=-1)
            kept = slot >= FIRST_SLOT
            block = slot // PAGE
            offset = slot % PAGE
            if part < Q_PARTS + KV_PARTS:
                needed = kept
                if STORE_K:
                    needed = token >= 0  # always; a constant is no boolean to every interpreter
                if needed:
                    head = (part - Q_PARTS) * H + tl.arange(0, H)
                    ok = head < KV_HEADS
                    a, b, rest = load_parts(
                        k_ptr + token * stride_k_token,
                        head * stride_k_head,
                        ok,
                        WIDTH,
                        ROTARY,
                        HALF,
                        TAIL,
                        NEOX,
                    )
                    a, b, rest = finish(
                        a, b, rest, k_weight_ptr, cos_sin, eps, WIDTH, ROTARY, HALF, TAIL, NEOX
                    )
                    if STORE_K:
                        store_parts(
                            k_out_ptr + token * stride_k_out_token,
                            head * stride_k_out_head,
                            ok,
                            a,
                            b,
                            rest,
                            WIDTH,
                            ROTARY,
                            HALF,
                            TAIL,
                            NEOX,
                        )
                    if k_scale_ptr is not None:
                        factor = 1.0 / tl.load(k_scale_ptr)
                        a = a * factor
                        b = b * factor
                        rest = rest * factor
                    store_parts(
                        key_ptr + block * STRIDE_K_BLOCK + offset * STRIDE_K_TOKEN,
                        head * STRIDE_K_HEAD,
                        ok & kept,
                        a,
                        b,
                        rest,
                        WIDTH,
                        ROTARY,
                        HALF,
                        TAIL,
                        NEOX,
                    )
            elif kept:
                head = (part - Q_PARTS - KV_PARTS) * H + tl.arange(0, H)
                ok = head < KV_HEADS
                dim = tl.arange(0, PADDED)
                ok2 = ok[:, None] & (dim < WIDTH)[None, :]
                x = tl.load(
                    v_ptr + token * stride_v_token + (head * stride_v_head)[:, None] + dim[None, :],
                    mask=ok2,
                    other=0.0,
                )
                if v_scale_ptr is not None:
                    x = x.to(tl.float32) / tl.load(v_scale_ptr)
                tl.store(
                    value_ptr
                    + block * STRIDE_V_BLOCK
                    + offset * STRIDE_V_TOKEN
                    + (head * STRIDE_V_HEAD)[:, None]
                    + dim[None, :],
                    x.to(value_ptr.dtype.element_ty),
                    mask=ok2,
                )
