"""Triton kernel: attention output times the sigmoid of the gate's logits.

Shapes: T tokens, N heads, D head width.
"""

# Kernels are typed by the compiler, not by annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_attnedit.ops.tiles import HEADWISE, gate_kind

#: Elements of a program. Small enough for every target's on-chip memory.
BLOCK = 2048


@triton.jit(do_not_specialize=["num_tasks"])
def _gate_kernel(
    attn_ptr,
    gate_ptr,
    out_ptr,
    num_tasks,
    stride_attn_token,
    stride_gate,
    stride_out_token,
    ATTN_HEAD: tl.constexpr,
    OUT_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADWISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BLOCKS: tl.constexpr = (HEADS * WIDTH + BLOCK - 1) // BLOCK
    for task in range(tl.program_id(0), num_tasks, tl.num_programs(0)):
        token = tl.cast(task // BLOCKS, tl.int64)
        i = task % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        ok = i < HEADS * WIDTH
        head = i // WIDTH
        # Where heads lie end to end the offset is i, which the compiler reads as contiguous.
        attn_offset = i if ATTN_HEAD == WIDTH else head * ATTN_HEAD + i % WIDTH
        out_offset = i if OUT_HEAD == WIDTH else head * OUT_HEAD + i % WIDTH
        x = tl.load(attn_ptr + token * stride_attn_token + attn_offset, mask=ok, other=0.0)
        gate_offset = head if HEADWISE else i
        logits = tl.load(gate_ptr + token * stride_gate + gate_offset, mask=ok, other=0.0)
        y = x.to(tl.float32) * tl.sigmoid(logits.to(tl.float32))
        tl.store(
            out_ptr + token * stride_out_token + out_offset,
            y.to(out_ptr.dtype.element_ty),
            mask=ok,
        )


def sigmoid_gate(attn: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """See :func:`vllm_attnedit.ops.sigmoid_gate.sigmoid_gate`."""
    tokens, heads, width = attn.shape
    block = min(BLOCK, triton.next_power_of_2(heads * width))
    num_tasks = tokens * triton.cdiv(heads * width, block)
    with torch.cuda.device_of(attn):
        _gate_kernel[(num_tasks,)](
            attn,
            gate,
            out,
            num_tasks,
            attn.stride(0),
            gate.stride(0),
            out.stride(0),
            ATTN_HEAD=attn.stride(1),
            OUT_HEAD=out.stride(1),
            HEADS=heads,
            WIDTH=width,
            HEADWISE=gate_kind(gate, heads) == HEADWISE,
            BLOCK=block,
            num_warps=4,
        )
    return out
