"""MLA decode, over the latent, and prefill, over expanded keys and values."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tests.unit.ops.batches import (
    DTYPES,
    PagedBatch,
    WindowCase,
    poisoned,
    relative_error,
    window_batch,
)
from tests.unit.ops.measure.running import twice, wide_batch


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
    got = twice(
        lambda out: call(kernel, batch, out, config=launch),
        poisoned(shape, batch.q.dtype, device),
        batch.written,
    )
    wide = wide_batch(batch)
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
    out = twice(
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
