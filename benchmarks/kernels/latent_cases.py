"""Cases of the latent operators, for latents of 512 + 64 and 32 heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import controls
from benchmarks.kernels.contest import OURS, Case, Contest
from benchmarks.kernels.timing import rotation
from benchmarks.kernels.window_cases import _ints, _normal
from vllm_attnedit.ops.mla_decode import mla_decode
from vllm_attnedit.ops.mla_prefill import mla_prefill

RANK, ROPE, NOPE, VALUE = 512, 64, 128, 128
PAGE = 64
SCALE = (NOPE + ROPE) ** -0.5


def decode_contest(batch: int, length: int, heads: int, gated: bool) -> Contest:
    """One token a request, all of one length."""
    traffic = 2 * batch * (length * (RANK + ROPE) + heads * (2 * RANK + ROPE + gated))
    operations = 2 * batch * length * heads * (2 * RANK + ROPE)
    sets = min(rotation(traffic), 4)
    pages = -(-length // PAGE)
    cache = _normal(sets * batch * pages + 1, PAGE, RANK + ROPE)
    order = torch.randperm(sets * batch * pages, device="cuda").int() + 1
    seq_lens, starts = _ints([length] * batch), _ints(range(batch + 1))
    contest = Contest(traffic, operations, {OURS: []})
    for table in order.view(sets, batch, pages):
        q = _normal(batch, heads, RANK + ROPE)
        logits = _normal(batch, heads) if gated else None
        out = torch.empty_like(q[..., :RANK])
        parts = (q[..., :RANK], q[..., RANK:], cache, table, seq_lens, starts)

        def ours(parts: Any = parts, logits: Any = logits, out: Tensor = out) -> Tensor:
            return mla_decode(*parts, scale=SCALE, max_seq_len=length, gate=logits, out=out)

        contest.calls[OURS].append(ours)
        suffix = " + gate" if gated else ""
        for name, make in (
            ("FlashMLA", _flashmla),
            ("FA3-MLA", _fa3_mla),
            ("vLLM Triton MLA", _triton_mla),
        ):
            try:
                call = controls.gated(make(q, cache, table, seq_lens, starts, length), logits)
            except controls.Unavailable as error:
                contest.notes[name + suffix] = str(error)
                continue
            contest.calls.setdefault(name + suffix, []).append(call)
    return contest


def _flashmla(
    q: Tensor, cache: Tensor, table: Tensor, seq_lens: Tensor, starts: Tensor, length: int
) -> Callable[[], Tensor]:
    controls.available()
    from vllm.v1.attention.ops.flashmla import (
        flash_mla_with_kvcache,
        get_mla_metadata,
        is_flashmla_dense_supported,
    )

    supported, reason = is_flashmla_dense_supported()
    if not supported:
        raise controls.Unavailable(str(reason))
    schedule, _ = get_mla_metadata()

    def call() -> Tensor:
        out: Tensor
        out, _ = flash_mla_with_kvcache(
            q=q.unsqueeze(1),
            k_cache=cache.unsqueeze(2),
            block_table=table,
            cache_seqlens=seq_lens,
            head_dim_v=RANK,
            tile_scheduler_metadata=schedule,
            softmax_scale=SCALE,
            causal=True,
        )
        return out.squeeze(1)

    return call


def _fa3_mla(
    q: Tensor, cache: Tensor, table: Tensor, seq_lens: Tensor, starts: Tensor, length: int
) -> Callable[[], Tensor]:
    attend = controls.fa3()
    from vllm.vllm_flash_attn.flash_attn_interface import get_scheduler_metadata

    schedule = get_scheduler_metadata(
        batch_size=q.shape[0],
        max_seqlen_q=1,
        max_seqlen_k=length,
        num_heads_q=q.shape[1],
        num_heads_kv=1,
        headdim=ROPE,
        cache_seqlens=seq_lens,
        qkv_dtype=q.dtype,
        headdim_v=RANK,
        page_size=PAGE,
        cu_seqlens_q=starts,
        causal=True,
        num_splits=controls.FA3_SPLITS,
    )

    def call() -> Tensor:
        out: Tensor = attend(
            q=q[..., RANK:],
            k=cache[..., RANK:].unsqueeze(2),
            v=cache[..., :RANK].unsqueeze(2),
            q_v=q[..., :RANK],
            max_seqlen_q=1,
            cu_seqlens_q=starts,
            max_seqlen_k=length,
            seqused_k=seq_lens,
            block_table=table,
            softmax_scale=SCALE,
            causal=True,
            fa_version=3,
            scheduler_metadata=schedule,
            num_splits=controls.FA3_SPLITS,
        )
        return out

    return call


def _triton_mla(
    q: Tensor, cache: Tensor, table: Tensor, seq_lens: Tensor, starts: Tensor, length: int
) -> Callable[[], Tensor]:
    controls.available()
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    # As its backend chooses: 512 tokens a split at least, two splits a multiprocessor at most.
    count = torch.cuda.get_device_properties(0).multi_processor_count
    splits = min(1 << (max(1, length // 512) - 1).bit_length(), 2 * count)
    batch, heads, _ = q.shape
    out = q.new_zeros(batch, heads, RANK)
    lse = q.new_zeros(batch, heads)
    logits = torch.empty(batch, heads, splits, RANK + 1, device="cuda")
    one = torch.ones(1, device="cuda")

    def call() -> Tensor:
        decode_attention_fwd(
            q,
            cache.unsqueeze(2),
            cache.unsqueeze(2)[..., :RANK],
            out,
            lse,
            table,
            seq_lens,
            logits,
            splits,
            SCALE,
            PAGE,
            k_scale=one,
            v_scale=one,
            is_mla=True,
        )
        return out

    return call


def prefill_contest(tokens: int, heads: int) -> Contest:
    """One prompt."""
    traffic = 2 * tokens * (heads * (2 * NOPE + ROPE + 2 * VALUE) + ROPE)
    operations = tokens * (tokens + 1) * heads * (NOPE + ROPE + VALUE)
    starts = _ints([0, tokens])
    contest = Contest(traffic, operations, {OURS: []})
    for _ in range(rotation(traffic)):
        q = _normal(tokens, heads, NOPE + ROPE)
        expanded = _normal(tokens, heads, NOPE + VALUE)
        k_rope = _normal(tokens, ROPE)
        out = q.new_empty(tokens, heads, VALUE)

        def ours(
            q: Tensor = q, expanded: Tensor = expanded, k_rope: Tensor = k_rope, out: Tensor = out
        ) -> Tensor:
            return mla_prefill(
                q[..., :NOPE],
                q[..., NOPE:],
                expanded[..., :NOPE],
                k_rope,
                expanded[..., NOPE:],
                starts,
                starts,
                scale=SCALE,
                out=out,
            )

        contest.calls[OURS].append(ours)
        # FA3 wants whole keys; the copy that makes them is not counted.
        k = torch.cat([expanded[..., :NOPE], k_rope[:, None].expand(-1, heads, -1)], -1)
        v = expanded[..., NOPE:].contiguous()
        try:
            call = controls.fa3_dense(q, k, v, starts, window=None, max_len=tokens, scale=SCALE)
        except controls.Unavailable as error:
            contest.notes["FA3"] = str(error)
            continue
        contest.calls.setdefault("FA3", []).append(call)
    return contest


def _decode(batch: int, length: int, *, gated: bool = False, quick: bool = False) -> Case:
    name = f"mla_decode r{RANK}+{ROPE} h32 B{batch} L{length} page{PAGE}"
    return Case(
        name + (" headwise" if gated else " nogate"),
        lambda: decode_contest(batch, length, 32, gated),
        quick,
    )


CASES = [
    _decode(64, 8192, quick=True),
    _decode(128, 4096),
    _decode(16, 8192),
    _decode(1, 32_768),
    _decode(64, 8192, gated=True),
    Case(
        f"mla_prefill c{NOPE}+{ROPE} v{VALUE} h32 B1 L4096 nogate",
        lambda: prefill_contest(4096, 32),
    ),
]
