"""Triton kernel: the outputs of programs that shared a sequence, weighed by their sums and gated.

Imported by ``triton.py`` modules only: it needs Triton. The order of summation is fixed.
Shapes: T tokens, R requests, N heads, D value width.
"""

# Kernels are typed by the compiler, not by annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_attnedit.ops.checks import require
from vllm_attnedit.ops.tiles import gate_kind

#: Elements of a head, and shares of it, that a program holds at once.
BLOCK, STEP = 128, 8


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "num_tasks"])
def _combine_kernel(
    partial_ptr,
    partial_lse_ptr,
    query_start_ptr,
    gate_ptr,
    out_ptr,
    num_requests,
    num_tokens,
    num_tasks,
    stride_gate,
    stride_out_token,
    stride_out_head,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    GATE: tl.constexpr,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    split = tl.arange(0, SPLITS)
    written = tl.load(query_start_ptr + num_requests)
    for task in range(tl.program_id(0), num_tasks, tl.num_programs(0)):
        token = task // (HEADS * BLOCKS)
        head = task // BLOCKS % HEADS
        dim = task % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        dim_ok = dim < WIDTH
        if token < written:
            row = tl.cast(token, tl.int64)
            stride = tl.cast(num_tokens, tl.int64) * HEADS
            lse = tl.load(partial_lse_ptr + split * stride + row * HEADS + head)
            largest = tl.max(lse, 0)
            total = tl.sum(tl.exp2(lse - largest), 0)
            result = tl.zeros([BLOCK], tl.float32)
            for first in range(0, SPLITS, STEP):
                part = (first + tl.arange(0, STEP)) * stride + row * HEADS + head
                share = tl.exp2(tl.load(partial_lse_ptr + part) - largest)
                partial = tl.load(
                    partial_ptr + part[:, None] * WIDTH + dim[None, :],
                    mask=dim_ok[None, :],
                    other=0.0,
                )
                result += tl.sum(partial * share[:, None], 0)
            result = result / total
            if GATE == 1:
                result *= tl.sigmoid(tl.load(gate_ptr + row * stride_gate + head).to(tl.float32))
            if GATE == 2:
                logits = tl.load(
                    gate_ptr + row * stride_gate + head * WIDTH + dim, mask=dim_ok, other=0.0
                )
                result *= tl.sigmoid(logits.to(tl.float32))
            tl.store(
                out_ptr + row * stride_out_token + head * stride_out_head + dim,
                result.to(out_ptr.dtype.element_ty),
                mask=dim_ok,
            )


def combine(
    partial: Tensor,
    partial_lse: Tensor,
    query_start_loc: Tensor,
    gate: Tensor | None,
    out: Tensor,
    splits: int,
) -> None:
    """Write ``out`` from what ``splits`` programs left in :func:`partials`.

    Args:
        partial: ``splits * T * N * D`` float32, each share normalised by itself.
        partial_lse: ``splits * T * N`` float32, base-2 logarithm of each share's sum.
        query_start_loc: ``(R + 1,)``; tokens from its last entry on are left alone.
        gate: ``(T, N)``, ``(T, N * D)`` or None.
        out: ``(T, N, D)``.
        splits: a power of two.
    """
    tokens, heads, width = out.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    num_tasks = tokens * heads * triton.cdiv(width, block)
    with torch.cuda.device_of(out):
        _combine_kernel[(num_tasks,)](
            partial,
            partial_lse,
            query_start_loc,
            gate,
            out,
            query_start_loc.shape[0] - 1,
            tokens,
            num_tasks,
            gate.stride(0) if gate is not None else 0,
            out.stride(0),
            out.stride(1),
            HEADS=heads,
            WIDTH=width,
            GATE=gate_kind(gate, heads),
            SPLITS=splits,
            STEP=min(STEP, splits),
            BLOCK=block,
            num_warps=1,
        )


def partials(workspace: Tensor | None, out: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Scratch for ``splits`` shares of ``out``, from ``workspace`` or new.

    Raises:
        AttnEditError: the workspace is too small or not contiguous float32.
    """
    tokens, heads, width = out.shape
    rows = splits * tokens * heads
    needed = rows * (width + 1)
    if workspace is None:
        workspace = out.new_empty(needed, dtype=torch.float32)
    require(
        workspace.dtype == torch.float32
        and workspace.is_contiguous()
        and workspace.numel() >= needed,
        "workspace",
        f"{workspace.dtype} of {workspace.numel()} elements",
        f"pass at least {needed} contiguous elements of float32",
    )
    flat = workspace.view(-1)
    return flat[: rows * width], flat[rows * width : needed]
