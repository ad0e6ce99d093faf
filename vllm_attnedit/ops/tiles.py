"""Pieces that the Triton kernels share. Imported by ``triton.py`` modules only: it needs Triton.

Masks use a finite "minus infinity": differences of it stay numbers, on every backend.
"""

# Kernels are typed by the compiler, not by annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634
MASKED = tl.constexpr(-1e30)
#: A running maximum below this has seen masked scores only.
EMPTY = tl.constexpr(-1e29)

NO_GATE, HEADWISE, ELEMENTWISE = 0, 1, 2


def gate_kind(gate: torch.Tensor | None, num_heads: int) -> int:
    """How a kernel reads ``gate``: one of the constants above."""
    if gate is None:
        return NO_GATE
    return HEADWISE if gate.shape[1] == num_heads else ELEMENTWISE


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side; 1 in Triton's interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def online_softmax(scores, running_max, running_sum):
    """One step of the streaming softmax in base 2.

    Args:
        scores: ``(M, S)`` float32, scaled by log2(e), :data:`MASKED` where a row sees no key.
        running_max: ``(M,)``.
        running_sum: ``(M,)``.

    Returns:
        Weights ``(M, S)``, the factor ``(M,)`` for what was accumulated so far, and the new state.
    """
    new_max = tl.maximum(running_max, tl.max(scores, 1))
    decay = tl.exp2(running_max - new_max)
    weights = tl.exp2(scores - new_max[:, None])
    return weights, decay, new_max, running_sum * decay + tl.sum(weights, 1)


@triton.jit
def normalise(acc, running_max, running_sum):
    """``acc / running_sum``, zero in rows that saw no key."""
    seen = running_max > EMPTY
    return tl.where(seen[:, None], acc / tl.where(seen, running_sum, 1.0)[:, None], 0.0)


@triton.jit
def gate_logits(
    gate_ptr,
    token,
    head,
    dim,
    row_ok,
    dim_ok,
    stride_token,
    VALUE_DIM: tl.constexpr,
    KIND: tl.constexpr,
):
    """The gate's logits of rows (token, head): ``(M, 1)`` or ``(M, dim)``."""
    row = token.to(tl.int64) * stride_token
    if KIND == 1:
        logits = tl.load(gate_ptr + row + head, mask=row_ok, other=0.0)[:, None]
    else:
        offsets = (row + head * VALUE_DIM)[:, None] + dim[None, :]
        logits = tl.load(gate_ptr + offsets, mask=row_ok[:, None] & dim_ok[None, :], other=0.0)
    return logits


@triton.jit
def find_request(start_ptr, num_requests, tile, TILE: tl.constexpr, LANES: tl.constexpr):
    """The request that query tile ``tile`` belongs to.

    Request i owns the tiles from ``start[i] // TILE + i`` on: rounding up never needs more than one
    tile a request beyond ``total // TILE``, so the grid follows from shapes, without a host read.
    """
    owner = -1
    for first in range(0, num_requests, LANES):
        i = first + tl.arange(0, LANES)
        starts = tl.load(start_ptr + i, mask=i < num_requests, other=0)
        owner += tl.sum(((starts // TILE + i <= tile) & (i < num_requests)).to(tl.int32))
    return owner
