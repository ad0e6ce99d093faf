"""Launch of the kernel of QK-norm, RoPE and the paged write.

Shapes: T tokens, N query heads, K KV heads, D head width, H heads of a program.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vllm_attnedit.ops.kv_write.kernel import write_kernel
from vllm_attnedit.ops.paging import NULL_BLOCK

#: Heads of a program and its warps: so, loads take 16 bytes a thread and nothing crosses warps.
HEADS, WARPS = 16, 4


def kv_write(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    positions: Tensor | None,
    cos_sin_cache: Tensor | None,
    is_neox: bool,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    q_out: Tensor | None,
    k_out: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """See :func:`vllm_attnedit.ops.kv_write.kv_write`."""
    tokens, kv_heads, width = k.shape
    q_heads = q.shape[1] if q is not None else 0
    rotary = cos_sin_cache.shape[1] if cos_sin_cache is not None else 0
    page = key_cache.shape[1]
    parts = triton.cdiv(q_heads, HEADS) + 2 * triton.cdiv(kv_heads, HEADS)
    num_tasks = tokens * parts
    queries = q if q is not None else k
    queries_out = q_out if q_out is not None else k
    keys_out = k_out if k_out is not None else k
    with torch.cuda.device_of(k):
        write_kernel[(num_tasks,)](
            queries,
            k,
            v,
            key_cache,
            value_cache,
            slot_mapping,
            positions,
            cos_sin_cache,
            q_weight,
            k_weight,
            queries_out,
            keys_out,
            k_scale,
            v_scale,
            eps,
            slot_mapping.shape[0],
            num_tasks,
            queries.stride(0),
            queries.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            queries_out.stride(0),
            queries_out.stride(1),
            keys_out.stride(0),
            keys_out.stride(1),
            cos_sin_cache.stride(0) if cos_sin_cache is not None else 0,
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            Q_HEADS=q_heads,
            KV_HEADS=kv_heads,
            WIDTH=width,
            PADDED=triton.next_power_of_2(width),
            ROTARY=rotary,
            HALF=triton.next_power_of_2(max(1, rotary // 2)),
            TAIL=triton.next_power_of_2(max(1, width - rotary)),
            NEOX=is_neox,
            PAGE=page,
            FIRST_SLOT=(NULL_BLOCK + 1) * page,
            STORE_K=k_out is not None,
            H=HEADS,
            num_warps=WARPS,
        )
