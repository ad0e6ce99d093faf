"""Oracle: paged window attention for a few query tokens a request, in plain torch.

Reads lengths on the host, request by request: for tests and CPUs, not for CUDA graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_attnedit.ops.paging import read_pages
from vllm_attnedit.ops.sigmoid_gate.reference import sigmoid_gate


def gateswa_decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    sliding_window: int,
    scale: float,
    max_query_len: int,
    gate: Tensor | None,
    out: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    workspace: Tensor | None,
) -> Tensor:
    """See :func:`vllm_attnedit.ops.gateswa_decode.gateswa_decode`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for request, length in enumerate(lengths):
        first, last = starts[request], starts[request + 1]
        # A request that brings more queries than it has tokens is padding of the batch.
        for token in range(first, last):
            position = length - (last - token)
            if position < 0:
                out[token] = 0
                continue
            visible = torch.arange(max(0, position - sliding_window + 1), position + 1)
            keys = read_pages(key_cache, block_table[request], visible, wide, k_scale)
            values = read_pages(value_cache, block_table[request], visible, wide, v_scale)
            out[token] = attend(q[token].to(wide), keys, values, scale)
    if gate is not None:
        written = out[starts[0] : starts[-1]]
        sigmoid_gate(written, gate[starts[0] : starts[-1]], written)
    return out


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attention of one token: ``(N, D)`` over ``(S, K, D)`` twice, giving ``(N, D)``."""
    group = query.shape[0] // keys.shape[1]
    keys = keys.repeat_interleave(group, dim=1)
    values = values.repeat_interleave(group, dim=1)
    probabilities = torch.einsum("nd,snd->ns", query, keys).mul(scale).softmax(-1)
    return torch.einsum("ns,snd->nd", probabilities, values)
