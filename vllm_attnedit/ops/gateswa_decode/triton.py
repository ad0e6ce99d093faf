"""Launch of the kernels of paged window attention on a GPU, chosen by device and shape.

Shapes: T tokens, R requests, N query heads, K KV heads, G = N / K, D head width, M rows, S keys.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vllm_attnedit.ops.checks import require
from vllm_attnedit.ops.combine import combine, partials
from vllm_attnedit.ops.gateswa_decode.config import (
    DecodeConfig,
    HopperConfig,
    decode_config,
    hopper_config,
)
from vllm_attnedit.ops.gateswa_decode.kernel import decode_kernel
from vllm_attnedit.ops.tiles import LOG2E, gate_kind, multiprocessors

#: Gluon changes between releases of Triton; the Hopper kernel is tested with this one.
HOPPER_TRITON = "3.6."


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
    config: DecodeConfig | HopperConfig | None = None,
) -> Tensor:
    """See :func:`vllm_attnedit.ops.gateswa_decode.gateswa_decode`.

    ``config`` overrides the table of :mod:`.config`: for measurements and tests.
    """
    tokens, heads, width = q.shape
    requests = seq_lens.shape[0]
    _, page, kv_heads, _ = key_cache.shape
    group = heads // kv_heads
    padded = triton.next_power_of_2(width)
    if config is None:
        config = decode_config(
            group=group,
            max_query_len=max_query_len,
            width=padded,
            itemsize=key_cache.element_size(),
            window=sliding_window,
            num_requests=requests,
            num_kv_heads=kv_heads,
            multiprocessors=multiprocessors(q.device),
        )
        if config.splits == 1 and _runs_hopper_kernel(q, key_cache):
            config = (
                hopper_config(
                    group=group,
                    max_query_len=max_query_len,
                    width=padded,
                    window=sliding_window,
                    page=page,
                    quantised=key_cache.dtype != q.dtype,
                )
                or config
            )
    if isinstance(config, HopperConfig):
        from vllm_attnedit.ops.gateswa_decode import hopper

        return hopper.gateswa_decode(
            q,
            key_cache,
            value_cache,
            block_table,
            seq_lens,
            query_start_loc,
            sliding_window=sliding_window,
            scale=scale,
            max_query_len=max_query_len,
            gate=gate,
            out=out,
            k_scale=k_scale,
            v_scale=v_scale,
            config=config,
        )
    require(
        not config.aligned or page % config.tile == 0,
        "config.tile",
        config.tile,
        f"use a divisor of the block size, {page}, with aligned tiles",
    )
    kind = gate_kind(gate, heads)
    query_tiles = triton.cdiv(max_query_len, config.rows // group)
    num_tasks = requests * kv_heads * query_tiles * config.splits
    partial, partial_lse = out, out
    if config.splits > 1:
        partial, partial_lse = partials(workspace, out, config.splits)
    with torch.cuda.device_of(q):
        decode_kernel[(num_tasks,)](
            q,
            key_cache,
            value_cache,
            block_table,
            seq_lens,
            query_start_loc,
            gate,
            out,
            partial,
            partial_lse,
            k_scale,
            v_scale,
            scale * LOG2E,
            sliding_window,
            num_tasks,
            tokens,
            q.stride(0),
            q.stride(1),
            block_table.stride(0),
            gate.stride(0) if gate is not None else 0,
            out.stride(0),
            out.stride(1),
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            KV_HEADS=kv_heads,
            GROUP=group,
            WIDTH=width,
            PADDED=padded,
            PAGE=page,
            GATE=kind,
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


def _runs_hopper_kernel(q: Tensor, cache: Tensor) -> bool:
    return (
        q.is_cuda
        and q.element_size() == 2
        and cache.dtype in (q.dtype, torch.float8_e4m3fn, torch.float8_e5m2)
        and triton.__version__.startswith(HOPPER_TRITON)
        and torch.cuda.get_device_capability(q.device)[0] == 9
    )
