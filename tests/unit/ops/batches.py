"""Random paged batches for the operators' tests: everything that must not be read holds NaN.

Only torch is imported: the worker of the interpreter tests and the GPU tests share this module.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: Bounds of the relative L2 error against the oracle in float64.
BOUNDS = {"bf16": 5e-3, "fp16": 2e-3, "fp32": 1e-4}
LAYOUTS = ("nhd", "hnd", "packed")
GATES = (None, "headwise", "elementwise")


@dataclass(frozen=True)
class WindowCase:
    """A batch for window attention."""

    head_dim: int = 64
    group: int = 4
    kv_heads: int = 2
    block: int = 16
    window: int = 17
    dtype: str = "fp32"
    gate: str | None = None
    layout: str = "nhd"
    #: (tokens in all, tokens of this step) of each request.
    requests: tuple[tuple[int, int], ...] = ((1, 1), (5, 1), (40, 1), (0, 0), (77, 1))
    fp8: bool = False
    seed: int = 0
    #: Fields of the launch configuration, instead of the table's.
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = f"d{self.head_dim}-g{self.group}-b{self.block}-w{self.window}-{self.dtype}"
        return f"{shown}-{self.gate or 'nogate'}-{self.layout}" + ("-fp8" if self.fp8 else "")


def paged(
    shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """Key and value caches ``(num_blocks, block, heads, width)`` full of NaN."""
    blocks, block, heads, width = shape

    def nans(*sizes: int) -> Tensor:
        return torch.full(sizes, math.nan, device=device).to(dtype)

    if layout == "nhd":
        both = nans(2, *shape)
        return both[0], both[1]
    if layout == "hnd":
        both = nans(blocks, 2, heads, block, width)
        return both[:, 0].transpose(1, 2), both[:, 1].transpose(1, 2)
    # The middle one of three layers that share a page.
    both = nans(blocks, 2, block, 3 * heads, width)
    return both[:, 0, :, heads : 2 * heads], both[:, 1, :, heads : 2 * heads]


@dataclass
class PagedBatch:
    """A batch as a kernel gets it."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    gate: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None

    @property
    def written(self) -> int:
        """Tokens of the batch without padding."""
        return int(self.query_start_loc[-1])


def quantised(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    return x.to(dtype) if scale is None else (x / scale).to(dtype)


def window_batch(case: WindowCase, device: str, *, chunk_in_cache: bool) -> PagedBatch:
    """A batch in which only what the window needs is in the cache.

    Args:
        case: its shape.
        device: where to put it.
        chunk_in_cache: the tokens of the step are cached (decode) or dense alone (prefill).
    """
    rng = torch.Generator(device).manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    dtype = DTYPES[case.dtype]
    cache_dtype = torch.float8_e4m3fn if case.fp8 else dtype
    k_scale = torch.tensor([0.7], device=device) if case.fp8 else None
    v_scale = torch.tensor([1.3], device=device) if case.fp8 else None
    heads = case.kv_heads * case.group
    starts = [0, *itertools.accumulate(step for _, step in case.requests)]
    # Two tokens of padding, as a captured graph has them.
    tokens = starts[-1] + 2
    table_width = max(1, *(-(-length // case.block) for length, _ in case.requests))
    needed = len(case.requests) * table_width
    key_cache, value_cache = paged(
        (needed + 1, case.block, case.kv_heads, case.head_dim), case.layout, cache_dtype, device
    )
    free = iter(
        (torch.randperm(needed, generator=torch.Generator().manual_seed(case.seed)) + 1).tolist()
    )
    table = torch.zeros(len(case.requests), table_width, dtype=torch.int32)
    # One tensor for the three projections, as a model has it: views with a wide token stride.
    qkv = normal(tokens, heads + 2 * case.kv_heads, case.head_dim).to(dtype)
    q, k, v = qkv.split([heads, case.kv_heads, case.kv_heads], dim=1)
    for request, (length, step) in enumerate(case.requests):
        cached = length - step
        first = max(0, cached - case.window + 1)
        last = length if chunk_in_cache else cached
        for page in {position // case.block for position in range(first, last)}:
            table[request, page] = next(free)
        if first >= last:
            continue
        positions = torch.arange(first, last)
        blocks = table[request, positions // case.block].long().to(device)
        slots = (positions % case.block).to(device)
        for cache, fresh, scale in ((key_cache, k, k_scale), (value_cache, v, v_scale)):
            entries = normal(last - first, case.kv_heads, case.head_dim).to(dtype)
            if chunk_in_cache and step:
                entries[-step:] = fresh[starts[request] : starts[request + 1]]
            cache[blocks, slots] = quantised(entries, cache_dtype, scale)
    gate = None
    if case.gate is not None:
        gate = normal(tokens, heads * (case.head_dim if case.gate == "elementwise" else 1))
        gate = gate.to(dtype)
    return PagedBatch(
        q=q,
        k=k,
        v=v,
        key_cache=key_cache,
        value_cache=value_cache,
        block_table=table.to(device),
        seq_lens=torch.tensor([n for n, _ in case.requests], dtype=torch.int32, device=device),
        query_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
        gate=gate,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, device=device)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|`` in L2; infinite where NaN is left."""
    got, expected = got.double(), expected.double()
    if not bool(got.isfinite().all()):
        return math.inf
    if expected.numel() == 0:
        return 0.0
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()
