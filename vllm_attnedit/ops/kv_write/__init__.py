"""QK-norm, RoPE and the paged write of K and V in one pass.

Only tokens that own memory are written: a slot of the null block (what a window-aware allocator
hands out for tokens that leave the window) or a negative slot (padding) is skipped.
Shapes: T tokens, N query heads, K KV heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_attnedit.ops import checks
from vllm_attnedit.ops.checks import require
from vllm_attnedit.ops.dispatch import implementation

__all__ = ["kv_write"]


def kv_write(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    positions: Tensor | None = None,
    cos_sin_cache: Tensor | None = None,
    is_neox: bool = True,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
    store_k: bool = True,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Finish the queries and keys of a step and put keys and values into their pages.

    In order: RMS norm over D of each head of q and k, where a weight is given; RoPE on their first
    ``rotary_dim`` elements, where ``cos_sin_cache`` is given; then ``q_out`` and ``k_out``, and the
    cache. Norm and rotation are computed in float32 and rounded once.

    Args:
        q: ``(T, N, D)``, or None to treat keys and values alone. Heads of one projection's output
            may be passed as views: only the last axis must be contiguous.
        k: ``(T, K, D)`` of q's dtype.
        v: ``(T, K, D)`` of q's dtype.
        key_cache: ``(num_blocks, block_size, K, D)``, any strides but a contiguous last axis. Of
            k's dtype, float8_e4m3fn or float8_e5m2.
        value_cache: like ``key_cache``.
        slot_mapping: ``(T,)`` int64, ``block * block_size + offset`` of each token. A shorter one
            leaves the tokens beyond it unwritten.
        positions: ``(T,)`` int64 or int32 token positions; with ``cos_sin_cache``.
        cos_sin_cache: ``(max_positions, rotary_dim)``, ``rotary_dim / 2`` cosines then as many
            sines, as vLLM keeps them. Any floating-point dtype.
        is_neox: element i turns with ``i + rotary_dim / 2``; otherwise 2 i turns with 2 i + 1.
        q_weight: ``(D,)`` weight of the query norm.
        k_weight: ``(D,)`` weight of the key norm.
        eps: of both norms.
        q_out: ``(T, N, D)`` like q; q itself where None.
        k_out: ``(T, K, D)`` like k; k itself where None.
        store_k: False where nobody reads the finished keys but through the cache.
        k_scale: one float32 by which keys are divided before an FP8 cache takes them.
        v_scale: likewise for values.

    Raises:
        AttnEditError: an argument that no kernel takes; names it, its value and what to pass.
    """
    checks.check_query(k, field="k")
    tokens, num_kv_heads, width = k.shape
    checks.check_head_dim(width, "k.shape[2]")
    checks.check_like(v, (tokens, num_kv_heads, width), k, "v")
    checks.check_paged_cache(key_cache, value_cache, k, num_kv_heads)
    require(
        slot_mapping.dim() == 1 and slot_mapping.shape[0] <= tokens,
        "slot_mapping.shape",
        tuple(slot_mapping.shape),
        f"pass at most ({tokens},)",
    )
    require(
        slot_mapping.dtype == torch.int64, "slot_mapping.dtype", slot_mapping.dtype, "use int64"
    )
    checks.check_device(slot_mapping, k, "slot_mapping")
    checks.check_adjacent(slot_mapping, "slot_mapping")
    if q is not None:
        checks.check_query(q)
        checks.check_like(q, (tokens, q.shape[1], width), k, "q")
        q_out = checks.prepare_out(q if q_out is None else q_out, tuple(q.shape), q)
    if store_k:
        k_out = checks.prepare_out(k if k_out is None else k_out, tuple(k.shape), k)
    require(store_k or k_out is None, "k_out", "given", "leave it out with store_k=False")
    for field, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            require(
                tuple(weight.shape) == (width,) and weight.is_floating_point(),
                field,
                f"{weight.dtype} {tuple(weight.shape)}",
                f"pass floating-point ({width},)",
            )
            checks.check_device(weight, k, field)
    _check_rotation(positions, cos_sin_cache, k)
    checks.check_scale(k_scale, key_cache, "k_scale")
    checks.check_scale(v_scale, value_cache, "v_scale")
    if tokens == 0:
        return
    implementation("kv_write", k.device).kv_write(
        q,
        k,
        v,
        key_cache,
        value_cache,
        slot_mapping,
        positions=positions,
        cos_sin_cache=cos_sin_cache,
        is_neox=is_neox,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=eps,
        q_out=q_out,
        k_out=k_out,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def _check_rotation(positions: Tensor | None, cos_sin_cache: Tensor | None, k: Tensor) -> None:
    tokens, _, width = k.shape
    require(
        (positions is None) == (cos_sin_cache is None),
        "positions",
        "given" if positions is not None else None,
        "pass positions and cos_sin_cache together, or neither",
    )
    if positions is None or cos_sin_cache is None:
        return
    require(
        tuple(positions.shape) == (tokens,) and positions.dtype in (torch.int32, torch.int64),
        "positions",
        f"{positions.dtype} {tuple(positions.shape)}",
        f"pass int64 ({tokens},)",
    )
    rotary_dim = cos_sin_cache.shape[-1]
    require(
        cos_sin_cache.dim() == 2 and rotary_dim % 16 == 0 and 16 <= rotary_dim <= width,
        "cos_sin_cache.shape",
        tuple(cos_sin_cache.shape),
        f"pass (max_positions, rotary_dim) with rotary_dim a multiple of 16 up to {width}",
    )
    require(
        cos_sin_cache.is_floating_point(),
        "cos_sin_cache.dtype",
        cos_sin_cache.dtype,
        "use floating point",
    )
    for field, x in (("positions", positions), ("cos_sin_cache", cos_sin_cache)):
        checks.check_device(x, k, field)
        checks.check_adjacent(x, field)
