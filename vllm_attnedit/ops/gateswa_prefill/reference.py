"""Oracle: window attention over a dense chunk and the cached tail before it, in plain torch.

Reads lengths on the host, request by request: for tests and CPUs, not for CUDA graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_attnedit.ops.paging import read_pages
from vllm_attnedit.ops.sigmoid_gate.reference import sigmoid_gate


def gateswa_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    sliding_window: int,
    scale: float,
    gate: Tensor | None,
    out: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """See :func:`vllm_attnedit.ops.gateswa_prefill.gateswa_prefill`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for request, length in enumerate(lengths):
        chunk = slice(starts[request], starts[request + 1])
        tokens = chunk.stop - chunk.start
        if tokens == 0:
            continue
        cached = max(0, length - tokens)  # a padding request has more queries than tokens
        tail = torch.arange(max(0, cached - sliding_window + 1), cached)
        keys = torch.cat(
            [read_pages(key_cache, block_table[request], tail, wide, k_scale), k[chunk].to(wide)]
        ).repeat_interleave(group, dim=1)
        values = torch.cat(
            [read_pages(value_cache, block_table[request], tail, wide, v_scale), v[chunk].to(wide)]
        ).repeat_interleave(group, dim=1)
        end = cached + tokens
        query_position = torch.arange(cached, end, device=q.device)[:, None]
        key_position = torch.arange(end - keys.shape[0], end, device=q.device)[None, :]
        distance = query_position - key_position
        hidden = (distance < 0) | (distance >= sliding_window)
        scores = torch.einsum("qnd,knd->nqk", q[chunk].to(wide), keys) * scale
        probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[chunk] = torch.einsum("nqk,knd->qnd", probabilities, values).to(out.dtype)
    if gate is not None:
        written = out[starts[0] : starts[-1]]
        sigmoid_gate(written, gate[starts[0] : starts[-1]], written)
    return out
