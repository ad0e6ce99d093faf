"""Reading and addressing pages in plain torch, for the oracles."""

from __future__ import annotations

import torch
from torch import Tensor

#: vLLM's null block: what it writes into the table for tokens that hold no memory.
NULL_BLOCK = 0


def read_pages(
    cache: Tensor,
    blocks: Tensor,
    positions: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
) -> Tensor:
    """The cache's entries of one request at ``positions``.

    Args:
        cache: ``(num_blocks, block_size, ...)``.
        blocks: ``(max_blocks,)``, the request's row of the block table.
        positions: ``(S,)`` token positions.
        dtype: of the result.
        scale: one factor for all entries, for a quantised cache.

    Returns:
        ``(S, ...)``.
    """
    block_size = cache.shape[1]
    positions = positions.to(cache.device)
    entries = cache[blocks[positions // block_size].long(), positions % block_size].to(dtype)
    return entries if scale is None else entries * scale.to(dtype)
