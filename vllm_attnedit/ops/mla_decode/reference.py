"""Oracle: absorbed latent attention over a paged latent cache, in plain torch.

Reads lengths on the host, request by request: for tests and CPUs, not for CUDA graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_attnedit.ops.paging import read_pages
from vllm_attnedit.ops.sigmoid_gate.reference import sigmoid_gate


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    max_query_len: int,
    max_seq_len: int,
    gate: Tensor | None,
    out: Tensor,
    kv_scale: Tensor | None,
    workspace: Tensor | None,
    key_scale: Tensor | None = None,
) -> Tensor:
    """See :func:`vllm_attnedit.ops.mla_decode.mla_decode`."""
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    rank = q_latent.shape[2]
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for request, length in enumerate(lengths):
        first, last = starts[request], starts[request + 1]
        entries = read_pages(kv_cache, block_table[request], torch.arange(length), wide, kv_scale)
        factors = None
        if key_scale is not None:
            factors = read_pages(key_scale, block_table[request], torch.arange(length), wide)
        for token in range(first, last):
            # The number of keys this token sees, itself included.
            seen = length - (last - token) + 1
            if seen <= 0:
                out[token] = 0
                continue
            query = torch.cat([q_latent[token], q_rope[token]], dim=-1).to(wide)
            scores = (query @ entries[:seen].T).mul(scale)
            if factors is not None:
                scores *= factors[:seen].T
            probabilities = scores.softmax(-1)
            # One KV head whose value is the first part of its key.
            out[token] = (probabilities @ entries[:seen, :rank]).to(out.dtype)
    if gate is not None:
        written = out[starts[0] : starts[-1]]
        sigmoid_gate(written, gate[starts[0] : starts[-1]], written)
    return out
