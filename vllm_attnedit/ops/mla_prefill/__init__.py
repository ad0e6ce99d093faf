"""Latent attention (MLA) over expanded keys and values: prompts and chunks.

Where many tokens attend, expanding the latents once costs less than attending over them. The RoPE
key stays shared by all heads: it is never copied per head.
Shapes: T query tokens, S key tokens, R requests, N heads, C qk_nope_head_dim, P qk_rope_head_dim,
V v_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_attnedit.ops import checks
from vllm_attnedit.ops.checks import require
from vllm_attnedit.ops.dispatch import implementation

__all__ = ["mla_prefill"]


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
    causal: bool = True,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    key_scale: Tensor | None = None,
) -> Tensor:
    """Attend from the query tokens of each request to its key tokens.

    Keys are a request's whole prefix and chunk with ``causal=True``: the last query sees the last
    key, earlier ones see correspondingly less. With ``causal=False`` every query sees every key:
    one part of a long prefix, to be merged with others by means of ``lse``.

    Args:
        q_nope: ``(T, N, C)`` bfloat16, float16 or float32; C a multiple of 16 up to 256.
        q_rope: ``(T, N, P)`` of q_nope's dtype, rotated. Both may be slices of one tensor.
        k_nope: ``(S, N, C)``.
        k_rope: ``(S, P)``, rotated.
        v: ``(S, N, V)``; V a multiple of 16 up to 256. ``k_nope`` and ``v`` may be slices of one
            tensor, the output of ``kv_b_proj``.
        query_start_loc: ``(R + 1,)`` int32, where each request's queries start; tokens from its
            last entry on are padding, whose output is not written.
        key_start_loc: ``(R + 1,)`` int32, likewise for its keys.
        scale: factor of the scores before the softmax.
        causal: see above.
        gate: logits, head-wise ``(T, N)`` or element-wise ``(T, N * V)``; None for no gate.
        out: ``(T, N, V)`` like q_nope, written in place; None for a new one. Zero where a query
            sees no key.
        lse: ``(T, N)`` float32, takes the natural logarithm of each softmax's denominator; minus
            infinity where a query sees no key. The gate does not enter it.

        key_scale: ``(S, N)`` float32, a factor of each key's scores by head: the inverse root mean
            square of a per-head norm. Any strides but a contiguous last axis.

    Returns:
        ``out``.

    Raises:
        AttnEditError: an argument that no kernel takes; names it, its value and what to pass.
    """
    checks.check_query(q_nope, field="q_nope")
    tokens, heads, nope = q_nope.shape
    rope = q_rope.shape[2] if q_rope.dim() == 3 else 0
    value = v.shape[2] if v.dim() == 3 else 0
    keys = k_nope.shape[0]
    checks.check_like(q_rope, (tokens, heads, rope), q_nope, "q_rope")
    checks.check_like(k_nope, (keys, heads, nope), q_nope, "k_nope")
    checks.check_like(k_rope, (keys, rope), q_nope, "k_rope")
    checks.check_like(v, (keys, heads, value), q_nope, "v")
    checks.check_head_dim(nope, "q_nope.shape[2]")
    checks.check_head_dim(rope, "q_rope.shape[2]")
    checks.check_head_dim(value, "v.shape[2]")
    checks.check_batch(None, None, query_start_loc, q_nope)
    require(
        key_start_loc.shape == query_start_loc.shape and key_start_loc.dtype == torch.int32,
        "key_start_loc",
        f"{key_start_loc.dtype} {tuple(key_start_loc.shape)}",
        f"pass int32 {tuple(query_start_loc.shape)}, as query_start_loc",
    )
    checks.check_device(key_start_loc, q_nope, "key_start_loc")
    checks.check_gate(gate, q_nope, value)
    out = checks.prepare_out(out, (tokens, heads, value), q_nope)
    if lse is not None:
        require(
            tuple(lse.shape) == (tokens, heads) and lse.dtype == torch.float32,
            "lse",
            f"{lse.dtype} {tuple(lse.shape)}",
            f"pass float32 {(tokens, heads)}",
        )
        checks.check_device(lse, q_nope, "lse")
        checks.check_adjacent(lse, "lse")
    if key_scale is not None:
        require(
            tuple(key_scale.shape) == (keys, heads) and key_scale.dtype == torch.float32,
            "key_scale",
            f"{key_scale.dtype} {tuple(key_scale.shape)}",
            f"pass float32 {(keys, heads)}",
        )
        checks.check_device(key_scale, q_nope, "key_scale")
        checks.check_adjacent(key_scale, "key_scale")
    if tokens == 0:
        return out
    result: Tensor = implementation("mla_prefill", q_nope.device).mla_prefill(
        q_nope,
        q_rope,
        k_nope,
        k_rope,
        v,
        query_start_loc,
        key_start_loc,
        scale=scale,
        causal=causal,
        gate=gate,
        out=out,
        lse=lse,
        key_scale=key_scale,
    )
    return result
