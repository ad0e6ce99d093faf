"""Oracle: QK-norm, RoPE and the paged write of K and V, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_attnedit.ops.paging import NULL_BLOCK


def kv_write(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    positions: Tensor | None,
    cos_sin_cache: Tensor | None,
    is_neox: bool,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    q_out: Tensor | None,
    k_out: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """See :func:`vllm_attnedit.ops.kv_write.kv_write`."""
    wide = torch.promote_types(k.dtype, torch.float32)

    def finish(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x.to(wide)
        if weight is not None:
            x = rms_norm(x, weight.to(wide), eps)
        if positions is not None and cos_sin_cache is not None:
            x = rotate(x, cos_sin_cache[positions.long()].to(wide), is_neox)
        return x

    new_keys = finish(k, k_weight)
    if q is not None and q_out is not None:
        q_out.copy_(finish(q, q_weight))
    if k_out is not None:
        k_out.copy_(new_keys)

    block_size = key_cache.shape[1]
    tokens = slot_mapping.shape[0]
    kept = slot_mapping >= (NULL_BLOCK + 1) * block_size
    blocks, offsets = slot_mapping[kept] // block_size, slot_mapping[kept] % block_size
    for cache, fresh, scale in (
        (key_cache, new_keys, k_scale),
        (value_cache, v.to(wide), v_scale),
    ):
        fresh = fresh[:tokens][kept]
        if scale is not None:
            fresh = fresh / scale.to(wide)
        if cache.dtype.itemsize == 1:
            # Quantised entries saturate, as the hardware's conversion does.
            limit = torch.finfo(cache.dtype).max
            fresh = fresh.clamp(-limit, limit)
        cache[blocks, offsets] = fresh.to(cache.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos_sin: Tensor, is_neox: bool) -> Tensor:
    """RoPE on the first ``cos_sin.shape[-1]`` elements of each head.

    Args:
        x: ``(T, heads, D)``.
        cos_sin: ``(T, rotary_dim)``, cosines then sines.
        is_neox: pairs are ``(i, i + rotary_dim / 2)``; otherwise ``(2 i, 2 i + 1)``.
    """
    rotary_dim = cos_sin.shape[-1]
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if is_neox:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([turned, rest], dim=-1)
