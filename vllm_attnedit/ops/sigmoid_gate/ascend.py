"""Triton kernel for Ascend NPUs: attention output times the sigmoid of the gate's logits.

Tiles are rows, each one head of one token: both kinds of gate are then contiguous copies, where the
kernel for GPUs would fetch head-wise logits element by element. The grid is the number of vector
cores; a longer one is run in waves, each with a start of its own.

Compile-verified for a 910B, not run on hardware.

Shapes: T tokens, N heads, D head width.
"""

# Kernels are typed by the compiler, not by annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_attnedit.ops.sigmoid_gate import reference

#: Elements of a tile: in float32, in several copies, a fraction of the 192 KiB of a vector core.
TILE = 4096


@triton.jit(do_not_specialize=["num_rows"])
def gate_rows_kernel(
    attn_ptr,
    gate_ptr,
    out_ptr,
    num_rows,
    WIDTH: tl.constexpr,
    HEADWISE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One launch of the operator; see the module for what a program does."""
    dim = tl.arange(0, WIDTH)
    for task in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        row = task * ROWS + tl.arange(0, ROWS)
        ok = row < num_rows
        at = row[:, None] * WIDTH + dim[None, :]
        x = tl.load(attn_ptr + at, mask=ok[:, None], other=0.0).to(tl.float32)
        if HEADWISE:
            weight = tl.sigmoid(tl.load(gate_ptr + row, mask=ok, other=0.0).to(tl.float32))[:, None]
        else:
            weight = tl.sigmoid(tl.load(gate_ptr + at, mask=ok[:, None], other=0.0).to(tl.float32))
        tl.store(out_ptr + at, (x * weight).to(out_ptr.dtype.element_ty), mask=ok[:, None])


@functools.cache
def vector_cores(device_index: int) -> int:
    """How many vector cores an NPU has."""
    utilities = triton.runtime.driver.active.utils
    return int(utilities.get_device_properties(device_index)["num_vectorcore"])


def sigmoid_gate(attn: Tensor, gate: Tensor, out: Tensor) -> Tensor:
    """See :func:`vllm_attnedit.ops.sigmoid_gate.sigmoid_gate`; strided tensors take the oracle."""
    tokens, heads, width = attn.shape
    contiguous = attn.is_contiguous() and gate.is_contiguous() and out.is_contiguous()
    if not contiguous or width & (width - 1) or attn.numel() >= 2**31:
        return reference.sigmoid_gate(attn, gate, out)
    rows = max(1, TILE // width)
    num_rows = tokens * heads
    device = attn.device.index if attn.device.index is not None else torch.npu.current_device()
    grid = min(triton.cdiv(num_rows, rows), vector_cores(device))
    gate_rows_kernel[(grid,)](
        attn,
        gate,
        out,
        num_rows,
        WIDTH=width,
        HEADWISE=gate.shape[1] == heads,
        ROWS=rows,
    )
    return out
