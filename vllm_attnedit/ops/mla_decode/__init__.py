"""Absorbed latent attention (MLA) over a paged latent cache, for one or a few tokens a request.

The cache holds one latent and one RoPE key a token, shared by all heads: attention with one KV head
of width C + P whose value is the first C elements of its key.
Shapes: T tokens, R requests, N heads, C kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_attnedit.ops import checks
from vllm_attnedit.ops.checks import require
from vllm_attnedit.ops.dispatch import implementation
from vllm_attnedit.ops.mla_decode.selection import engine_kernel, preferred_kernel

__all__ = ["engine_kernel", "mla_decode", "preferred_kernel"]

#: Widest latent and RoPE part that a program's accumulators and tiles take.
MAX_LORA_RANK = 512
MAX_ROPE_DIM = 128


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    max_seq_len: int,
    max_query_len: int = 1,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    kv_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Attend from the last tokens of each request to all its tokens up to each of them.

    Args:
        q_latent: ``(T, N, C)``, queries with the key half of ``kv_b_proj`` folded in; bfloat16,
            float16 or float32; C a multiple of 16 up to 512.
        q_rope: ``(T, N, P)`` of q_latent's dtype, rotated; P a multiple of 16 up to 128. Both may
            be slices of one tensor.
        kv_cache: ``(num_blocks, block_size, C + P)``, any strides but a contiguous last axis. Of
            q_latent's dtype, float8_e4m3fn or float8_e5m2. The queried tokens are in it already.
        block_table: ``(R, max_blocks)`` int32.
        seq_lens: ``(R,)`` int32, tokens a request, the queried ones included.
        query_start_loc: ``(R + 1,)`` int32. Requests may have no query; tokens from its last entry
            on are padding, whose output is not written.
        scale: factor of the scores before the softmax.
        max_seq_len: upper bound on ``seq_lens``, known on the host; sets how many programs share a
            sequence.
        max_query_len: upper bound on the query tokens of a request, known on the host.
        gate: head-wise logits ``(T, N)``; None for no gate. An element-wise gate acts on the
            expanded output: apply it there with :mod:`vllm_attnedit.ops.sigmoid_gate`.
        out: ``(T, N, C)`` like q_latent, written in place; None for a new one.
        kv_scale: one float32, factor of the entries of an FP8 cache.
        key_scale: ``(num_blocks, block_size, N)`` float32, a factor of each key's scores by
            head: the inverse root mean square of a per-head norm. Any strides but a contiguous last
            axis.
        workspace: float32 scratch for sequences that several programs share; None for a new one.
            Either way its size follows from shapes and bounds, so that a CUDA graph can be
            captured.

    Returns:
        ``out``, still to be multiplied by the value half of ``kv_b_proj``.

    Raises:
        AttnEditError: an argument that no kernel takes; names it, its value and what to pass.
    """
    checks.check_query(q_latent, field="q_latent")
    tokens, heads, rank = q_latent.shape
    rope = q_rope.shape[2] if q_rope.dim() == 3 else 0
    checks.check_like(q_rope, (tokens, heads, rope), q_latent, "q_rope")
    for field, width, limit in (
        ("q_latent.shape[2]", rank, MAX_LORA_RANK),
        ("q_rope.shape[2]", rope, MAX_ROPE_DIM),
    ):
        require(
            width % 16 == 0 and 16 <= width <= limit,
            field,
            width,
            f"use a multiple of 16 from 16 to {limit}",
        )
    require(
        kv_cache.dim() == 3 and kv_cache.shape[2] == rank + rope,
        "kv_cache.shape",
        tuple(kv_cache.shape),
        f"pass (num_blocks, block_size, {rank + rope})",
    )
    require(
        kv_cache.dtype == q_latent.dtype or kv_cache.dtype in checks.FP8_DTYPES,
        "kv_cache.dtype",
        kv_cache.dtype,
        f"use {q_latent.dtype}, float8_e4m3fn or float8_e5m2",
    )
    checks.check_device(kv_cache, q_latent, "kv_cache")
    checks.check_adjacent(kv_cache, "kv_cache")
    checks.check_block_size(kv_cache.shape[1], "kv_cache.shape[1]")
    checks.check_batch(block_table, seq_lens, query_start_loc, q_latent)
    checks.check_gate(gate, q_latent, rank, elementwise=False)
    checks.check_scale(kv_scale, kv_cache, "kv_scale")
    if key_scale is not None:
        expected = (*kv_cache.shape[:2], heads)
        require(
            key_scale.dtype == torch.float32 and tuple(key_scale.shape) == expected,
            "key_scale",
            f"{key_scale.dtype} {tuple(key_scale.shape)}",
            f"pass float32 {expected}",
        )
        checks.check_device(key_scale, q_latent, "key_scale")
        checks.check_adjacent(key_scale, "key_scale")
    require(max_query_len >= 1, "max_query_len", max_query_len, "pass at least 1")
    require(max_seq_len >= 1, "max_seq_len", max_seq_len, "pass at least 1")
    out = checks.prepare_out(out, (tokens, heads, rank), q_latent)
    if tokens == 0:
        return out
    result: Tensor = implementation("mla_decode", q_latent.device).mla_decode(
        q_latent,
        q_rope,
        kv_cache,
        block_table,
        seq_lens,
        query_start_loc,
        scale=scale,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        gate=gate,
        out=out,
        kv_scale=kv_scale,
        workspace=workspace,
        key_scale=key_scale,
    )
    return result
