"""Launch of the kernel of latent attention over expanded keys and values.

Shapes: T query tokens, S key tokens, R requests, N heads, C qk_nope_head_dim, P qk_rope_head_dim,
V v_head_dim, M rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from vllm_attnedit.ops.mla_prefill.kernel import expanded_kernel
from vllm_attnedit.ops.tiles import LOG2E, gate_kind


@dataclass(frozen=True)
class ExpandedConfig:
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


def expanded_config(*, width: int, itemsize: int) -> ExpandedConfig:
    """The launch for heads of ``width``, the widest of keys' and values', padded."""
    if itemsize > 2:
        return ExpandedConfig(rows=32, tile=32, warps=4, stages=1)
    if width > 128:
        return ExpandedConfig(rows=64, tile=32, warps=4, stages=2)
    return ExpandedConfig(rows=128, tile=64, warps=8, stages=3)


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
    config: ExpandedConfig | None = None,
) -> Tensor:
    """See :func:`vllm_attnedit.ops.mla_prefill.mla_prefill`.

    ``config`` overrides :func:`expanded_config`: for measurements and tests.
    """
    tokens, heads, nope = q_nope.shape
    rope, value = q_rope.shape[2], v.shape[2]
    requests = query_start_loc.shape[0] - 1
    padded_nope, padded_value = triton.next_power_of_2(nope), triton.next_power_of_2(value)
    if config is None:
        config = expanded_config(
            width=max(padded_nope, padded_value), itemsize=q_nope.element_size()
        )
    num_tasks = (tokens // config.rows + requests) * heads
    with torch.cuda.device_of(q_nope):
        expanded_kernel[(num_tasks,)](
            q_nope,
            q_rope,
            k_nope,
            k_rope,
            v,
            query_start_loc,
            key_start_loc,
            gate,
            out,
            lse,
            key_scale,
            scale * LOG2E,
            requests,
            num_tasks,
            q_nope.stride(0),
            q_nope.stride(1),
            q_rope.stride(0),
            q_rope.stride(1),
            k_nope.stride(0),
            k_nope.stride(1),
            k_rope.stride(0),
            v.stride(0),
            v.stride(1),
            gate.stride(0) if gate is not None else 0,
            out.stride(0),
            out.stride(1),
            lse.stride(0) if lse is not None else 0,
            key_scale.stride(0) if key_scale is not None else 0,
            HEADS=heads,
            NOPE=nope,
            PADDED_NOPE=padded_nope,
            ROPE=rope,
            PADDED_ROPE=triton.next_power_of_2(rope),
            VALUE=value,
            PADDED_VALUE=padded_value,
            CAUSAL=causal,
            GATE=gate_kind(gate, heads),
            ROWS=config.rows,
            TILE=config.tile,
            STAGES=config.stages,
            num_warps=config.warps,
            maxnreg=config.registers,
        )
    return out
