"""Launch of the kernel of window attention over chunks.

Shapes: T tokens, R requests, N query heads, K KV heads, G = N / K, D head width, M rows, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from vllm_attnedit.ops.gateswa_prefill.kernel import prefill_kernel
from vllm_attnedit.ops.tiles import LOG2E, gate_kind


@dataclass(frozen=True)
class PrefillConfig:
    """Launch parameters.

    Attributes:
        rows: query rows of a program.
        tile: keys of one step.
        warps: warps of a program.
        stages: depth of the load pipeline.
        registers: bound on a thread's registers, so that more programs run side by side.
    """

    rows: int
    tile: int
    warps: int
    stages: int
    registers: int | None = None


def prefill_config(*, group: int, width: int, itemsize: int, window: int) -> PrefillConfig:
    """The launch for heads of ``width`` (padded): a measured table.

    Small tiles and few registers: a program spends most of its time waiting, so that what counts is
    how many run side by side.
    """
    rows = max(64, triton.next_power_of_2(group))
    if itemsize > 2:
        # No tensor cores in full float32: small tiles keep accumulators in registers.
        rows = max(32, triton.next_power_of_2(group))
        return PrefillConfig(rows=rows, tile=32, warps=4, stages=1)
    tile = min(32, max(16, triton.next_power_of_2(window + rows // group - 1)))
    if width > 128:
        return PrefillConfig(rows=rows, tile=tile, warps=4, stages=2)
    if window >= 256:
        # Wide enough for the few keys that a taller tile visits in vain not to matter.
        return PrefillConfig(rows=2 * rows, tile=tile, warps=8, stages=3, registers=128)
    return PrefillConfig(rows=rows, tile=tile, warps=4, stages=3, registers=168)


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
    config: PrefillConfig | None = None,
) -> Tensor:
    """See :func:`vllm_attnedit.ops.gateswa_prefill.gateswa_prefill`.

    ``config`` overrides :func:`prefill_config`: for measurements and tests.
    """
    tokens, heads, width = q.shape
    requests = seq_lens.shape[0]
    _, page, kv_heads, _ = key_cache.shape
    group = heads // kv_heads
    padded = triton.next_power_of_2(width)
    if config is None:
        config = prefill_config(
            group=group, width=padded, itemsize=q.element_size(), window=sliding_window
        )
    num_tasks = (tokens // (config.rows // group) + requests) * kv_heads
    with torch.cuda.device_of(q):
        prefill_kernel[(num_tasks,)](
            q,
            k,
            v,
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
            requests,
            num_tasks,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
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
            GATE=gate_kind(gate, heads),
            ROWS=config.rows,
            TILE=config.tile,
            STAGES=config.stages,
            num_warps=config.warps,
            maxnreg=config.registers,
        )
    return out
