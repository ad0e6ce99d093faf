"""The cache of latent attention: what an entry holds, how it is written and read back.

An entry of L elements is the normed latent (R), the rotated key (P) and, with a per-head norm of
keys, the factors of all heads as float32, in units of the cache's dtype.

Shapes: T tokens, N heads, R kv_lora_rank, P qk_rope_head_dim, L elements of an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.utils.torch_utils import is_quantized_kv_cache


def write_entries(
    entries: Tensor,
    kv_cache: Tensor,
    slots: Tensor,
    *,
    rank: int,
    kv_cache_dtype: str,
    scale: Tensor,
) -> None:
    """Put a step's entries into their slots.

    Args:
        entries: ``(T, L)``.
        kv_cache: ``(blocks, block_size, L)``, of an FP8 dtype where ``kv_cache_dtype`` is one.
        slots: ``(T,)`` int64; negative ones are padding.
        rank: R.
        kv_cache_dtype: vLLM's name of the cache's dtype.
        scale: one float32, by which entries are divided before FP8 takes them.
    """
    quantised = is_quantized_kv_cache(kv_cache_dtype)
    if kv_cache.is_cuda:
        cache = kv_cache.view(torch.uint8) if quantised else kv_cache
        _custom_ops.concat_and_cache_mla(
            entries[:, :rank], entries[:, rank:], cache, slots, kv_cache_dtype, scale
        )
        return
    written = slots >= 0
    flat = kv_cache.view(-1, kv_cache.shape[-1])
    entries = entries[written]
    if quantised:
        limit = torch.finfo(kv_cache.dtype).max
        scaled = (entries.float() / scale).clamp(-limit, limit)
        flat, entries = (x.view(torch.uint8) for x in (flat, scaled.to(kv_cache.dtype)))
    flat[slots[written]] = entries


def read_entries(
    kv_cache: Tensor, slots: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The entries of some slots, ``(len(slots), L)`` of ``dtype``.

    Args:
        kv_cache: ``(blocks, block_size, L)``.
        slots: int64, all of them in the cache.
        scale: by which entries of an FP8 cache were divided; ``None`` for any other.
        dtype: of the result.
    """
    flat = kv_cache.view(-1, kv_cache.shape[-1])
    if scale is None:
        return flat[slots].to(dtype)
    # Bytes: not every device indexes FP8.
    entries = flat.view(torch.uint8)[slots].view(flat.dtype)
    return (entries.float() * scale).to(dtype)


def key_factors(entries: Tensor, width: int) -> Tensor | None:
    """Of entries ``(..., L)``, what lies behind their first R + P = ``width`` elements.

    Returns:
        ``(..., N)`` float32, or ``None`` if they end there.
    """
    beside = entries[..., width:]
    return beside.view(torch.float32) if beside.shape[-1] else None
