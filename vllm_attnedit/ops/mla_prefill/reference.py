"""Oracle: latent attention over expanded keys and values, in plain torch.

Reads lengths on the host, request by request: for tests and CPUs, not for CUDA graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_attnedit.ops.sigmoid_gate.reference import sigmoid_gate


def mla_prefill(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    v: Tensor,
    query_start_loc: Tensor,
    key_start_loc: Tensor,
    *,
    scale: float,
    causal: bool,
    gate: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    key_scale: Tensor | None = None,
) -> Tensor:
    """See :func:`vllm_attnedit.ops.mla_prefill.mla_prefill`."""
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    query_starts, key_starts = query_start_loc.tolist(), key_start_loc.tolist()
    for request in range(len(query_starts) - 1):
        queries = slice(query_starts[request], query_starts[request + 1])
        keys = slice(key_starts[request], key_starts[request + 1])
        scores = torch.einsum("qnc,knc->nqk", q_nope[queries].to(wide), k_nope[keys].to(wide))
        scores += torch.einsum("qnp,kp->nqk", q_rope[queries].to(wide), k_rope[keys].to(wide))
        scores *= scale
        if key_scale is not None:
            scores *= key_scale[keys].to(wide).T[:, None]
        if causal:
            # The last query sees the last key.
            shift = (keys.stop - keys.start) - (queries.stop - queries.start)
            hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(shift + 1)
            scores.masked_fill_(hidden, -torch.inf)
        # A query without any key gets zeros.
        probabilities = scores.softmax(-1).nan_to_num(0.0)
        out[queries] = torch.einsum("nqk,knv->qnv", probabilities, v[keys].to(wide)).to(out.dtype)
        if lse is not None:
            lse[queries] = scores.logsumexp(-1).T.to(lse.dtype)
    if gate is not None:
        written = out[query_starts[0] : query_starts[-1]]
        sigmoid_gate(written, gate[query_starts[0] : query_starts[-1]], written)
    return out
