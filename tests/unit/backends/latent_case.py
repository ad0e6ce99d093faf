"""Steps of a batch through a latent backend, against latent attention in its naive form.

A module of its own, so that a worker process that interprets Triton can run it.
"""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

C, P, V, B = 32, 16, 48, 16
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Case:
    """(tokens computed, new tokens) of each request, step by step; requests keep their row."""

    steps: tuple[tuple[tuple[int, int], ...], ...]
    rank: int = 64
    heads: int = 3
    dtype: str = "fp32"
    kv_cache_dtype: str = "auto"
    context_tokens: int = 24
    backend: str = "latent:LatentBackend"
    operators: str = "auto"
    normed: bool = False  # keys carry a factor for each head
    seed: int = 0


def run(case: Case) -> float:
    """The worst relative L2 error of a step's output; NaN if anything was not written."""
    os.environ["VLLM_ATTNEDIT_OPS"] = case.operators
    try:
        return _run(case)
    finally:
        del os.environ["VLLM_ATTNEDIT_OPS"]


def builder_for(backend: Any, case: Case) -> Any:
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    config = SimpleNamespace(
        speculative_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    cls = type("Small", (backend.get_builder_cls(),), {"context_tokens": case.context_tokens})
    width = case.rank + P + factors_width(case)
    spec = MLAAttentionSpec(block_size=B, num_kv_heads=1, head_size=width, dtype=DTYPES[case.dtype])
    return cls(spec, ["layer"], config, torch.device("cpu"))


def factors_width(case: Case) -> int:
    """Elements of a cache entry behind latent and RoPE key."""
    return case.heads * torch.float32.itemsize // DTYPES[case.dtype].itemsize * case.normed


def common_metadata(computed: list[int], new: list[int], table: Tensor) -> Any:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *new]).cumsum(0).int()
    lengths = torch.tensor(computed).int() + torch.tensor(new).int()
    positions = torch.cat([torch.arange(c, c + n) for c, n in zip(computed, new, strict=True)])
    rows = torch.repeat_interleave(torch.arange(len(new)), torch.tensor(new))
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=len(new),
        num_actual_tokens=sum(new),
        max_query_len=max(new),
        max_seq_len=int(lengths.max()),
        block_table_tensor=table,
        slot_mapping=table[rows, positions // B].long() * B + positions % B,
        seq_lens_cpu_upper_bound=lengths,
    )


@torch.no_grad()
def _run(case: Case) -> float:
    import importlib

    from vllm_attnedit.layers.latent_projection import LatentUpProjection

    module, name = case.backend.split(":")
    backend = getattr(importlib.import_module(f"vllm_attnedit.backends.{module}"), name)
    generator = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    up = LatentUpProjection(case.rank, case.heads, C, V)
    up.weight.copy_(random(*up.weight.shape) * case.rank**-0.5)
    up = up.to(dtype)
    k_scale = torch.tensor(0.5)
    layer = SimpleNamespace(up=up, _k_scale=k_scale)
    scale = (C + P) ** -0.5
    width = case.rank + P + factors_width(case)
    impl = backend.get_impl_cls()(
        case.heads, width, scale, 1, None, None, case.kv_cache_dtype,
        kv_lora_rank=case.rank, qk_rope_head_dim=P,
    )  # fmt: skip
    builder = builder_for(backend, case)

    requests = len(case.steps[0])
    longest = max(c + n for step in case.steps for c, n in step)
    blocks = -(-longest // B)
    order = torch.randperm(requests * blocks, generator=generator)
    table = (1 + order).view(requests, blocks).int()
    fp8 = case.kv_cache_dtype != "auto"
    shape = backend.get_kv_cache_shape(1 + requests * blocks, B, 1, width)
    cache = torch.full(shape, float("nan")).to(torch.float8_e4m3fn if fp8 else dtype)
    if fp8:
        cache = cache.view(torch.uint8)
    history: list[list[Tensor]] = [[] for _ in range(requests)]
    worst = 0.0
    for step in case.steps:
        # As the runner orders a step: few tokens first.
        rows = sorted((r for r in range(requests) if step[r][1]), key=lambda r: step[r][1])
        computed, new = ([step[r][i] for r in rows] for i in (0, 1))
        query = (3 * random(sum(new) + 2, case.heads, C + P)).to(dtype)
        key = random(sum(new) + 2, case.rank + P).to(dtype)
        if case.normed:
            factors = torch.rand(len(key), case.heads, generator=generator) + 0.5
            key = torch.cat([key, factors.view(dtype)], dim=-1)
        metadata = builder.build(0, common_metadata(computed, new, table[rows]))
        out = torch.full((sum(new) + 2, case.heads, V), float("nan"), dtype=dtype)
        impl.forward(layer, query, key.unsqueeze(1), key.unsqueeze(1), cache, metadata, out)
        at = 0
        for row, count in zip(rows, new, strict=True):
            kept = key[at : at + count]
            if fp8:
                kept = (kept.float() / k_scale).to(torch.float8_e4m3fn).float() * k_scale
            history[row].append(kept)
            expected = naive(query[at : at + count], torch.cat(history[row]), up, scale)
            got = out[at : at + count].double()
            worst = max(worst, float((got - expected).norm() / expected.norm()))
            if not got.isfinite().all():
                return float("nan")
            at += count
    return worst


def naive(query: Tensor, entries: Tensor, up: Any, scale: float) -> Tensor:
    """(t, N, C + P), the last of S tokens, to (S, R + P), in float64; (t, N, V)."""
    rank = up.weight.shape[1]
    weight = up.weight.double().unflatten(0, (up.num_heads, -1))  # (N, C + V, R)
    both = torch.einsum("sr,nwr->snw", entries[:, :rank].double(), weight)
    rotated = entries[:, None, rank : rank + P].double().expand(-1, up.num_heads, -1)
    keys = torch.cat([both[..., :C], rotated], dim=-1)
    scores = torch.einsum("tnd,snd->nts", query.double(), keys) * scale
    if entries.shape[1] > rank + P:
        scores *= entries[:, rank + P :].view(torch.float32).double().T[:, None]
    tokens, length = query.shape[0], len(entries)
    hidden = torch.ones(tokens, length, dtype=torch.bool).triu(length - tokens + 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("nts,snv->tnv", weights, both[..., C:])
