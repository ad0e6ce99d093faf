"""Launch of the window decode kernel for Hopper GPUs.

Imported where it runs only: Gluon, which the kernel is written in, comes with Triton for CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_attnedit.ops.gateswa_decode.config import HopperConfig, power_of_two
from vllm_attnedit.ops.gateswa_decode.hopper_kernel import hopper_kernel
from vllm_attnedit.ops.tiles import LOG2E, gate_kind


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
    config: HopperConfig,
) -> Tensor:
    """See :func:`vllm_attnedit.ops.gateswa_decode.gateswa_decode`; the launch is checked before."""
    heads, width = q.shape[1:]
    _, page, kv_heads, _ = key_cache.shape
    with torch.cuda.device_of(q):
        hopper_kernel[(seq_lens.shape[0] * kv_heads,)](
            q,
            key_cache,
            value_cache,
            block_table,
            seq_lens,
            query_start_loc,
            gate,
            out,
            k_scale,
            v_scale,
            scale * LOG2E,
            sliding_window,
            q.stride(0),
            q.stride(1),
            block_table.stride(0),
            gate.stride(0) if gate is not None else 0,
            out.stride(0),
            out.stride(1),
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            KV_HEADS=kv_heads,
            GROUP=heads // kv_heads,
            WIDTH=width,
            PADDED=power_of_two(width),
            PAGE=page,
            GATE=gate_kind(gate, heads),
            ROWS=config.rows,
            TILE=config.tile,
            SINGLE=config.single,
            ONE_QUERY=max_query_len == 1,
            WARPS=config.warps,
            num_warps=config.warps,
        )
    return out
