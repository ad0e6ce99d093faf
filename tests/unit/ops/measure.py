"""Run a kernel on a random batch and measure it against its oracle in float64.

Called in process on a GPU, and in a worker process where Triton interprets kernels on the CPU.
Each function returns the relative L2 error, after checking what holds for every operator: the
output was poisoned and is finite now, padding is untouched, and a second run gives the same bits.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from tests.unit.ops.batches import (
    DTYPES,
    PagedBatch,
    WindowCase,
    double,
    paged,
    poisoned,
    relative_error,
    window_batch,
)


def _twice(run: Any, out: Tensor, written: int) -> Tensor:
    """``out`` after ``run(out)``, which must leave padding alone and give the same bits again."""
    run(out)
    assert out[written:].isnan().all(), "padding was written"
    again = torch.full_like(out, math.nan)
    run(again)
    assert torch.equal(out[:written], again[:written]), "two runs differ"
    return out[:written]


def decode_error(case: WindowCase, device: str = "cpu") -> float:
    from vllm_attnedit.ops.gateswa_decode import config, reference
    from vllm_attnedit.ops.gateswa_decode import triton as kernel

    batch = window_batch(case, device, chunk_in_cache=True)
    max_query_len = max(1, *(step for _, step in case.requests))
    arguments: dict[str, Any] = {
        "sliding_window": case.window,
        "scale": case.head_dim**-0.5,
        "max_query_len": max_query_len,
        "workspace": None,
    }
    launch: Any = None
    if case.config:
        kind = config.HopperConfig if "single" in case.config else config.DecodeConfig
        launch = kind(**case.config)
    got = _twice(
        lambda out: kernel.gateswa_decode(**_arguments(batch), **arguments, out=out, config=launch),
        poisoned(tuple(batch.q.shape), batch.q.dtype, device),
        batch.written,
    )
    wide = _double(batch)
    expected = reference.gateswa_decode(
        **_arguments(wide), **arguments, out=torch.empty_like(wide.q)
    )
    return relative_error(got, expected[: batch.written])


def prefill_error(case: WindowCase, device: str = "cpu") -> float:
    from vllm_attnedit.ops.gateswa_prefill import reference
    from vllm_attnedit.ops.gateswa_prefill import triton as kernel

    batch = window_batch(case, device, chunk_in_cache=False)
    arguments: dict[str, Any] = {"sliding_window": case.window, "scale": case.head_dim**-0.5}
    launch = kernel.PrefillConfig(**case.config) if case.config else None
    got = _twice(
        lambda out: kernel.gateswa_prefill(
            **_arguments(batch, "k", "v"), **arguments, out=out, config=launch
        ),
        poisoned(tuple(batch.q.shape), batch.q.dtype, device),
        batch.written,
    )
    wide = _double(batch)
    expected = reference.gateswa_prefill(
        **_arguments(wide, "k", "v"), **arguments, out=torch.empty_like(wide.q)
    )
    return relative_error(got, expected[: batch.written])


def _arguments(batch: PagedBatch, *dense: str) -> dict[str, Any]:
    """What window operators take of a batch; ``dense`` names the chunk's own tensors."""
    shared = (
        "q",
        "key_cache",
        "value_cache",
        "block_table",
        "seq_lens",
        "query_start_loc",
        "gate",
        "k_scale",
        "v_scale",
    )
    return {name: getattr(batch, name) for name in (*shared, *dense)}


def _double(batch: PagedBatch) -> PagedBatch:
    """The same values in float64; quantised caches stay, for the oracle to read."""
    fields = {
        name: getattr(batch, name).double() for name in ("q", "k", "v", "key_cache", "value_cache")
    }
    return dataclasses.replace(batch, **fields, gate=double(batch.gate))


@dataclasses.dataclass(frozen=True)
class LatentCase:
    """A batch for latent decode."""

    rank: int = 64
    rope: int = 16
    heads: int = 4
    block: int = 16
    dtype: str = "fp32"
    gated: bool = False
    normed: bool = False  # keys carry a factor for each head
    requests: tuple[tuple[int, int], ...] = ((1, 1), (5, 1), (40, 1), (0, 0), (77, 1))
    fp8: bool = False
    seed: int = 0
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        shown = f"r{self.rank}+{self.rope}-h{self.heads}-b{self.block}-{self.dtype}"
        shown += "-normed" if self.normed else ""
        return shown + ("-gated" if self.gated else "") + ("-fp8" if self.fp8 else "")


def latent_decode_error(case: LatentCase, device: str = "cpu") -> float:
    from vllm_attnedit.ops.mla_decode import config, reference
    from vllm_attnedit.ops.mla_decode import triton as kernel

    # A window as long as the longest request makes every token live.
    longest = max(length for length, _ in case.requests)
    batch = window_batch(
        WindowCase(
            head_dim=case.rank + case.rope,
            group=case.heads,
            kv_heads=1,
            block=case.block,
            window=longest + 1,
            dtype=case.dtype,
            gate="headwise" if case.gated else None,
            requests=case.requests,
            fp8=case.fp8,
            seed=case.seed,
        ),
        device,
        chunk_in_cache=True,
    )
    arguments: dict[str, Any] = {
        "scale": (case.rank + case.rope) ** -0.5,
        "max_query_len": max(1, *(step for _, step in case.requests)),
        "max_seq_len": longest,
        "workspace": None,
    }
    launch = config.LatentConfig(**case.config) if case.config else None
    key_scale = None
    if case.normed:
        rng = torch.Generator(device).manual_seed(case.seed)
        slots = batch.key_cache.shape[:2]
        key_scale = torch.rand(*slots, case.heads + 3, generator=rng, device=device) + 0.5
        key_scale = key_scale[..., 2:-1]

    def call(module: Any, data: PagedBatch, out: Tensor, **more: Any) -> Tensor:
        result: Tensor = module.mla_decode(
            data.q[..., : case.rank],
            data.q[..., case.rank :],
            data.key_cache[:, :, 0],
            data.block_table,
            data.seq_lens,
            data.query_start_loc,
            **arguments,
            gate=data.gate,
            kv_scale=data.k_scale,
            key_scale=key_scale,
            out=out,
            **more,
        )
        return result

    shape = (*batch.q.shape[:2], case.rank)
    got = _twice(
        lambda out: call(kernel, batch, out, config=launch),
        poisoned(shape, batch.q.dtype, device),
        batch.written,
    )
    wide = _double(batch)
    expected = call(reference, wide, wide.q.new_empty(shape))
    return relative_error(got, expected[: batch.written])


@dataclasses.dataclass(frozen=True)
class ExpandedCase:
    """A batch for latent prefill: (keys, queries) of each request."""

    nope: int = 32
    rope: int = 16
    value: int = 32
    heads: int = 2
    dtype: str = "fp32"
    gate: str | None = None
    causal: bool = True
    normed: bool = False
    requests: tuple[tuple[int, int], ...] = ((1, 1), (40, 7), (0, 0), (33, 33))
    seed: int = 0
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        shown = f"c{self.nope}+{self.rope}-v{self.value}-h{self.heads}-{self.dtype}"
        shown += "-normed" if self.normed else ""
        return f"{shown}-{self.gate or 'nogate'}" + ("" if self.causal else "-full")


def latent_prefill_error(case: ExpandedCase, device: str = "cpu") -> float:
    """The worse of the output's error and that of its logarithm of sums."""
    from vllm_attnedit.ops.mla_prefill import reference
    from vllm_attnedit.ops.mla_prefill import triton as kernel

    rng = torch.Generator(device).manual_seed(case.seed)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device).to(dtype)

    keys = torch.tensor([0, *(n for n, _ in case.requests)]).cumsum(0).int().to(device)
    queries = torch.tensor([0, *(n for _, n in case.requests)]).cumsum(0).int().to(device)
    written, tokens = int(queries[-1]), int(queries[-1]) + 2
    q = normal(tokens, case.heads, case.nope + case.rope)
    expanded = normal(int(keys[-1]), case.heads, case.nope + case.value)
    k_rope = normal(int(keys[-1]), case.rope)
    widths = {None: 0, "headwise": 1, "elementwise": case.value}
    gate = normal(tokens, case.heads * widths[case.gate]) if case.gate else None

    def call(module: Any, cast: Any, out: Tensor, lse: Tensor, **more: Any) -> None:
        module.mla_prefill(
            cast(q)[..., : case.nope],
            cast(q)[..., case.nope :],
            cast(expanded)[..., : case.nope],
            cast(k_rope),
            cast(expanded)[..., case.nope :],
            queries,
            keys,
            scale=(case.nope + case.rope) ** -0.5,
            causal=case.causal,
            gate=cast(gate) if gate is not None else None,
            out=out,
            lse=lse,
            key_scale=key_scale,
            **more,
        )

    key_scale = None
    if case.normed:
        factors = torch.rand(int(keys[-1]), case.heads + 2, generator=rng, device=device) + 0.5
        key_scale = factors[:, 1:-1]
    launch = kernel.ExpandedConfig(**case.config) if case.config else None
    lse = poisoned((tokens, case.heads), torch.float32, device)
    out = _twice(
        lambda target: call(kernel, lambda x: x, target, lse, config=launch),
        poisoned((tokens, case.heads, case.value), dtype, device),
        written,
    )
    wide = q.double()
    expected = wide.new_empty((tokens, case.heads, case.value))
    expected_lse = wide.new_empty((tokens, case.heads))
    call(reference, lambda x: x.double(), expected, expected_lse)
    assert lse[written:].isnan().all(), "padding of lse was written"
    return max(
        relative_error(out, expected[:written]),
        relative_error(lse[:written], expected_lse[:written]),
    )


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
