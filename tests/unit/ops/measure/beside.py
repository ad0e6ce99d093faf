"""What stands beside attention: the write to the cache, and the gate."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from tests.unit.ops.batches import DTYPES, paged, relative_error


@dataclasses.dataclass(frozen=True)
class WriteCase:
    """A step's queries, keys and values on their way to the cache."""

    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    rotary: int = 64
    is_neox: bool = True
    norm: bool = True
    block: int = 16
    dtype: str = "fp32"
    layout: str = "nhd"
    tokens: int = 9
    in_place: bool = True
    store_k: bool = True
    with_q: bool = True
    fp8: bool = False
    seed: int = 0

    def __str__(self) -> str:
        shown = f"h{self.heads}_{self.kv_heads}-d{self.head_dim}-r{self.rotary}-{self.dtype}"
        shown += f"-{'neox' if self.is_neox else 'gptj'}-{self.layout}-b{self.block}"
        return shown + ("" if self.norm else "-nonorm") + ("-fp8" if self.fp8 else "")


def write_error(case: WriteCase, device: str = "cpu") -> float:
    """The worst error of queries, keys and both caches; skipped slots must keep their NaN."""
    from vllm_attnedit.ops.kv_write import reference
    from vllm_attnedit.ops.kv_write import triton as kernel

    rng = torch.Generator(device).manual_seed(case.seed)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device).to(dtype)

    heads, width, block = (case.heads, case.kv_heads), case.head_dim, case.block
    blocks = -(-case.tokens // block) + 2
    slots = (
        torch.randperm((blocks - 1) * block, generator=rng, device=device)[: case.tokens] + block
    )
    slots[1::4] = -1  # padding
    slots[2::4] = torch.arange(slots[2::4].numel(), device=device) % block  # the null block
    qkv = normal(case.tokens, heads[0] + 2 * heads[1], width)
    weights = [normal(width) if case.norm else None for _ in range(2)]
    positions = torch.randint(0, 99, (case.tokens,), generator=rng, device=device)
    angles = torch.rand(99, case.rotary // 2, generator=rng, device=device) * 6.3
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1).to(dtype)
    cache_dtype = torch.float8_e4m3fn if case.fp8 else dtype
    scales = [torch.tensor([s], device=device) if case.fp8 else None for s in (0.5, 0.9)]

    def run(module: Any, wide: bool) -> list[Tensor]:
        def cast(x: Tensor) -> Tensor:
            return x.double() if wide else x.clone()

        q, k, v = cast(qkv).split([heads[0], heads[1], heads[1]], dim=1)
        target = torch.float64 if wide and not case.fp8 else cache_dtype
        caches = paged((blocks, block, heads[1], width), case.layout, target, device)
        q_out = q if case.in_place else torch.full_like(q, math.nan)
        k_out = k if case.in_place else torch.full_like(k, math.nan)
        module.kv_write(
            q if case.with_q else None,
            k,
            v,
            *caches,
            slots,
            positions=positions if case.rotary else None,
            cos_sin_cache=cast(cos_sin) if case.rotary else None,
            is_neox=case.is_neox,
            q_weight=weights[0],
            k_weight=weights[1],
            eps=1e-6,
            q_out=q_out if case.with_q else None,
            k_out=k_out if case.store_k else None,
            k_scale=scales[0],
            v_scale=scales[1],
        )
        outputs = [q_out] if case.with_q else []
        outputs += [k_out] if case.store_k else []
        return [*outputs, *(cache.double() for cache in caches)]

    got, again, expected = run(kernel, False), run(kernel, False), run(reference, True)
    worst = 0.0
    for ours, repeated, oracle in zip(got, again, expected):
        assert torch.equal(ours.isnan(), oracle.isnan()), "written where it should not, or missed"
        assert torch.equal(ours.nan_to_num(9.0), repeated.nan_to_num(9.0)), "two runs differ"
        seen = ~oracle.isnan()
        worst = max(worst, relative_error(ours[seen], oracle[seen]))
    return worst


@dataclasses.dataclass(frozen=True)
class GateCase:
    """Attention output and gate."""

    tokens: int = 5
    heads: int = 3
    head_dim: int = 64
    elementwise: bool = False
    dtype: str = "fp32"
    contiguous: bool = True
    in_place: bool = False

    def __str__(self) -> str:
        kind = "elementwise" if self.elementwise else "headwise"
        return f"t{self.tokens}-h{self.heads}-d{self.head_dim}-{kind}-{self.dtype}"


def gate_error(case: GateCase, device: str = "cpu") -> float:
    from vllm_attnedit.ops.sigmoid_gate import reference
    from vllm_attnedit.ops.sigmoid_gate import triton as kernel

    dtype = DTYPES[case.dtype]
    shape = (case.tokens, case.heads, case.head_dim)
    attn = torch.randn(*shape[:2], 2 * case.head_dim, device=device).to(dtype)[..., : shape[2]]
    if case.contiguous:
        attn = attn.contiguous()
    columns = case.heads * (case.head_dim if case.elementwise else 1)
    gate = torch.randn(case.tokens, columns, device=device).to(dtype)
    wide = attn.double()
    expected = reference.sigmoid_gate(wide, gate.double(), torch.empty_like(wide))
    out = attn if case.in_place else torch.full_like(attn, math.nan)
    kernel.sigmoid_gate(attn, gate, out)
    return relative_error(out, expected)
