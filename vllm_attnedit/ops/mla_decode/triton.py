"""Launch of the kernels of absorbed latent attention.

Shapes: T tokens, R requests, N heads, C kv_lora_rank, P qk_rope_head_dim, M rows, S keys.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vllm_attnedit.ops.combine import combine, partials
from vllm_attnedit.ops.mla_decode.config import LatentConfig, latent_config
from vllm_attnedit.ops.mla_decode.kernel import latent_kernel
from vllm_attnedit.ops.tiles import LOG2E, gate_kind, multiprocessors


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
    config: LatentConfig | None = None,
) -> Tensor:
    """See :func:`vllm_attnedit.ops.mla_decode.mla_decode`.

    ``config`` overrides the table of :mod:`.config`: for measurements and tests.
    """
    tokens, heads, rank = q_latent.shape
    rope = q_rope.shape[2]
    requests = seq_lens.shape[0]
    page = kv_cache.shape[1]
    padded = triton.next_power_of_2(rank)
    if config is None:
        config = latent_config(
            num_heads=heads,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            width=padded,
            itemsize=q_latent.element_size(),
            page=page,
            num_requests=requests,
            multiprocessors=multiprocessors(q_latent.device),
        )
    query_tiles = triton.cdiv(max_query_len * heads, config.rows)
    num_tasks = requests * query_tiles * config.splits
    partial, partial_lse = out, out
    if config.splits > 1:
        partial, partial_lse = partials(workspace, out, config.splits)
    with torch.cuda.device_of(q_latent):
        latent_kernel[(num_tasks,)](
            q_latent,
            q_rope,
            kv_cache,
            block_table,
            seq_lens,
            query_start_loc,
            gate,
            out,
            partial,
            partial_lse,
            kv_scale,
            key_scale,
            scale * LOG2E,
            num_tasks,
            tokens,
            q_latent.stride(0),
            q_latent.stride(1),
            q_rope.stride(0),
            q_rope.stride(1),
            block_table.stride(0),
            gate.stride(0) if gate is not None else 0,
            out.stride(0),
            out.stride(1),
            *kv_cache.stride()[:2],
            *(key_scale.stride()[:2] if key_scale is not None else (0, 0)),
            HEADS=heads,
            RANK=rank,
            PADDED_RANK=padded,
            ROPE=rope,
            PADDED_ROPE=triton.next_power_of_2(rope),
            PAGE=page,
            GATE=gate_kind(gate, heads),
            ROWS=config.rows,
            TILE=config.tile,
            SPLITS=config.splits,
            QUERY_TILES=query_tiles,
            STAGES=config.stages,
            ALIGNED=config.aligned,
            num_warps=config.warps,
        )
    if config.splits > 1:
        combine(partial, partial_lse, query_start_loc, gate, out, config.splits)
    return out
