"""Latent attention over expanded keys and values on CPU: torch's flash kernel, request by request.

Shapes: T query tokens, S key tokens, N heads, C qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    out: Tensor,
    lse: Tensor | None,
    key_scale: Tensor | None = None,
) -> Tensor:
    """As :func:`vllm_attnedit.ops.mla_prefill.mla_prefill`, without a gate; any widths.

    With ``causal`` each request has as many keys as queries.
    """
    query = torch.cat([q_nope, q_rope], dim=-1)
    key = torch.cat([k_nope, k_rope[:, None].expand(-1, k_nope.shape[1], -1)], dim=-1)
    if key_scale is not None:
        key = (key * key_scale[..., None]).to(key.dtype)
    # The kernel takes one width for all three.
    width = max(query.shape[2], v.shape[2])
    query, key, value = (F.pad(x, (0, width - x.shape[2])) for x in (query, key, v))
    queries, keys = query_start_loc.tolist(), key_start_loc.tolist()
    for first, last, begin, end in zip(queries, queries[1:], keys, keys[1:]):
        if begin == end:
            if lse is not None:
                lse[first:last] = -torch.inf
            out[first:last] = 0
            continue
        attended, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[first:last].transpose(0, 1)[None],
            key[begin:end].transpose(0, 1)[None],
            value[begin:end].transpose(0, 1)[None],
            is_causal=causal,
            scale=scale,
        )  # (1, N, t, width) and (1, N, t)
        out[first:last] = attended[0, ..., : v.shape[2]].transpose(0, 1)
        if lse is not None:
            lse[first:last] = sums[0].T
    return out
