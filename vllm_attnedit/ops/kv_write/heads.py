"""What the kernel does to the heads of a token: load them, norm and turn them, store them.

A head is held in three parts: the two halves that turn with each other, and the rest. ``WIDTH`` is
its elements, ``ROTARY`` those that turn; ``HALF`` and ``TAIL`` pad half of these and the rest to
powers of two.
"""

# Kernels are typed by the compiler, not by annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_parts(
    base,
    head_offset,
    head_ok,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    NEOX: tl.constexpr,
):
    """Heads in three parts, float32: the two halves that turn, and the rest, each masked."""
    j = tl.arange(0, HALF)
    half_ok = head_ok[:, None] & (j < ROTARY // 2)[None, :]
    if ROTARY == 0:
        a = tl.zeros([head_offset.shape[0], HALF], tl.float32)
        b = a
    elif NEOX:
        at = base + head_offset[:, None] + j[None, :]
        a = tl.load(at, mask=half_ok, other=0.0).to(tl.float32)
        b = tl.load(at + ROTARY // 2, mask=half_ok, other=0.0).to(tl.float32)
    else:
        i = tl.arange(0, 2 * HALF)
        both = tl.load(
            base + head_offset[:, None] + i[None, :],
            mask=head_ok[:, None] & (i < ROTARY)[None, :],
            other=0.0,
        ).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (head_offset.shape[0], HALF, 2)))
    t = tl.arange(0, TAIL)
    if ROTARY < WIDTH:
        rest = tl.load(
            base + head_offset[:, None] + ROTARY + t[None, :],
            mask=head_ok[:, None] & (t < WIDTH - ROTARY)[None, :],
            other=0.0,
        ).to(tl.float32)
    else:
        rest = tl.zeros([head_offset.shape[0], TAIL], tl.float32)
    return a, b, rest


@triton.jit
def store_parts(
    base,
    head_offset,
    head_ok,
    a,
    b,
    rest,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    NEOX: tl.constexpr,
):
    """The inverse of :func:`load_parts`, rounding to the pointer's dtype."""
    dtype: tl.constexpr = base.dtype.element_ty
    j = tl.arange(0, HALF)
    half_ok = head_ok[:, None] & (j < ROTARY // 2)[None, :]
    if ROTARY > 0:
        if NEOX:
            at = base + head_offset[:, None] + j[None, :]
            tl.store(at, a.to(dtype), mask=half_ok)
            tl.store(at + ROTARY // 2, b.to(dtype), mask=half_ok)
        else:
            i = tl.arange(0, 2 * HALF)
            both = tl.reshape(tl.join(a, b), (head_offset.shape[0], 2 * HALF))
            tl.store(
                base + head_offset[:, None] + i[None, :],
                both.to(dtype),
                mask=head_ok[:, None] & (i < ROTARY)[None, :],
            )
    if ROTARY < WIDTH:
        t = tl.arange(0, TAIL)
        tl.store(
            base + head_offset[:, None] + ROTARY + t[None, :],
            rest.to(dtype),
            mask=head_ok[:, None] & (t < WIDTH - ROTARY)[None, :],
        )


@triton.jit
def finish(
    a,
    b,
    rest,
    weight_ptr,
    cos_sin_ptr,
    eps,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    NEOX: tl.constexpr,
):
    """RMS norm where there is a weight, then rotation where there are cosines."""
    j = tl.arange(0, HALF)
    if weight_ptr is not None:
        square = tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(rest * rest, 1)
        scale = tl.rsqrt(square / WIDTH + eps)[:, None]
        if ROTARY > 0:
            step: tl.constexpr = 1 if NEOX else 2
            shift: tl.constexpr = ROTARY // 2 if NEOX else 1
            weight_a = tl.load(weight_ptr + j * step, mask=j < ROTARY // 2, other=0.0)
            weight_b = tl.load(weight_ptr + j * step + shift, mask=j < ROTARY // 2, other=0.0)
            a = a * scale * weight_a.to(tl.float32)[None, :]
            b = b * scale * weight_b.to(tl.float32)[None, :]
        if ROTARY < WIDTH:
            t = tl.arange(0, TAIL)
            weight_rest = tl.load(weight_ptr + ROTARY + t, mask=t < WIDTH - ROTARY, other=0.0)
            rest = rest * scale * weight_rest.to(tl.float32)[None, :]
    if ROTARY > 0:
        cos = tl.load(cos_sin_ptr + j, mask=j < ROTARY // 2, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(cos_sin_ptr + ROTARY // 2 + j, mask=j < ROTARY // 2, other=0.0)
        sin = sin.to(tl.float32)[None, :]
        turned = a * cos - b * sin
        b = b * cos + a * sin
        a = turned
    return a, b, rest
