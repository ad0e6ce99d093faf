"""Latent attention on this project's operators behind vLLM's backend interface.

Decodes attend over cached latents, with the halves of ``kv_b_proj`` folded into the query and
applied to the result; prompts attend over keys and values expanded from latents, their own first
and then, part by part, those of their cached context.

Shapes: T tokens, N heads, R kv_lora_rank, P qk_rope_head_dim, C qk_nope_head_dim, V v_head_dim,
S context tokens, L elements of a cache entry: R + P, and with a per-head norm of keys the factors
of all heads as float32, in units of the cache's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, MultipleOf

from vllm_attnedit.backends.latent_steps import (
    CONTEXT_TOKENS,
    LatentMetadata,
    LatentMetadataBuilder,
)
from vllm_attnedit.ops.mla_decode import mla_decode
from vllm_attnedit.ops.mla_prefill import mla_prefill


class LatentImpl(AttentionImpl[LatentMetadata]):
    """Attention of one layer.

    ``expanded_operator`` attends over expanded keys and values, as :func:`mla_prefill` does.

    Args:
        num_heads: N of this rank.
        head_size: elements of a cache entry.
        scale: factor of the scores.
        kv_lora_rank: R.
        qk_rope_head_dim: P.
        kv_cache_dtype: vLLM's name of it.
    """

    expanded_operator: ClassVar[Callable[..., Tensor]] = staticmethod(mla_prefill)

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        *unused: Any,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        **unused_kw: Any,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = 1
        self.rank = kv_lora_rank
        self.rope = qk_rope_head_dim
        self.kv_cache_dtype = kv_cache_dtype
        self.fp8_dtype = (
            current_platform.fp8_dtype() if is_quantized_kv_cache(kv_cache_dtype) else None
        )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: LatentMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the step's latents, then attend.

        Args:
            layer: holds ``up``, the two halves of ``kv_b_proj``.
            query: ``(T, N, C + P)``, the last P rotated.
            key: ``(T, 1, L)``: normed latent, then rotated key, then factors.
            value: not read.
            kv_cache: ``(blocks, block_size, L)``.
            output: ``(T, N, V)``, filled in place.
        """
        if attn_metadata is None:  # profiling run: no cache yet, but a prompt's memory
            width = self.num_heads * (query.shape[2] - self.rope + output.shape[2])
            query.new_empty(CONTEXT_TOKENS, width)
            return output.zero_()
        tokens, decodes = attn_metadata.num_actual_tokens, attn_metadata.num_decode_tokens
        kv_scale: Tensor | None = None
        if self.fp8_dtype is not None:
            kv_cache, kv_scale = kv_cache.view(self.fp8_dtype), layer._k_scale
        self._write(layer, key[:tokens], kv_cache, attn_metadata.slot_mapping[:tokens])
        if decodes:
            self._decode(
                layer, query[:decodes], kv_cache, kv_scale, attn_metadata, output[:decodes]
            )
        if decodes < tokens:
            rows = slice(decodes, tokens)
            self._prefill(
                layer, query[rows], key[rows, 0], kv_cache, kv_scale, attn_metadata, output[rows]
            )
        return output

    def _write(self, layer: Any, key: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        if kv_cache.is_cuda:
            cache = kv_cache.view(torch.uint8) if self.fp8_dtype is not None else kv_cache
            _custom_ops.concat_and_cache_mla(
                key[:, 0, : self.rank],
                key[:, 0, self.rank :],
                cache,
                slots,
                self.kv_cache_dtype,
                layer._k_scale,
            )
            return
        written = slots >= 0
        flat = kv_cache.view(-1, kv_cache.shape[-1])
        entries = key[written, 0]
        if self.fp8_dtype is not None:
            limit = torch.finfo(self.fp8_dtype).max
            scaled = (entries.float() / layer._k_scale).clamp(-limit, limit)
            flat, entries = (x.view(torch.uint8) for x in (flat, scaled.to(self.fp8_dtype)))
        flat[slots[written]] = entries

    def _read(
        self, flat: Tensor, slots: Tensor, kv_scale: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if kv_scale is None:
            return flat[slots].to(dtype)
        # Bytes: not every device indexes FP8.
        entries = flat.view(torch.uint8)[slots].view(flat.dtype)
        return (entries.float() * kv_scale).to(dtype)

    def _factors(self, entries: Tensor) -> Tensor | None:
        """(..., L) to the factors of all heads, (..., N) float32, if there are any."""
        beside = entries[..., self.rank + self.rope :]
        return beside.view(torch.float32) if beside.shape[-1] else None

    def _decode(
        self,
        layer: Any,
        query: Tensor,
        kv_cache: Tensor,
        kv_scale: Tensor | None,
        metadata: LatentMetadata,
        output: Tensor,
    ) -> None:
        q_nope, q_rope = query.split([query.shape[2] - self.rope, self.rope], dim=-1)
        latent = query.new_empty(*query.shape[:2], self.rank)
        q_latent = layer.up.absorb_query(q_nope)
        self._attend_pages(q_latent, q_rope, kv_cache, kv_scale, metadata, latent)
        layer.up.expand_value(latent, output)

    def _attend_pages(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        kv_cache: Tensor,
        kv_scale: Tensor | None,
        metadata: LatentMetadata,
        out: Tensor,
    ) -> None:
        """(T, N, R) and (T, N, P) to the cache; ``out`` (T, N, R)."""
        mla_decode(
            q_latent,
            q_rope,
            kv_cache[..., : self.rank + self.rope],
            metadata.block_table,
            metadata.seq_lens,
            metadata.query_start_loc,
            scale=self.scale,
            max_seq_len=metadata.max_seq_len,
            max_query_len=metadata.max_decode_len,
            out=out,
            kv_scale=kv_scale,
            key_scale=self._factors(kv_cache),
        )

    def _prefill(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        kv_cache: Tensor,
        kv_scale: Tensor | None,
        metadata: LatentMetadata,
        output: Tensor,
    ) -> None:
        starts = metadata.prompt_start_loc
        assert starts is not None
        if not metadata.context:
            self._expanded(layer, query, key, starts, starts, output, causal=True)
            return
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        part_lse, part = torch.empty_like(lse), torch.empty_like(output)
        self._expanded(layer, query, key, starts, starts, output, causal=True, lse=lse)
        merged = output.float()
        flat = kv_cache.view(-1, kv_cache.shape[-1])
        for context in metadata.context:
            entries = self._read(flat, context.slots, kv_scale, query.dtype)  # (S, L)
            key_starts = context.key_start_loc
            self._expanded(
                layer, query, entries, starts, key_starts, part, causal=False, lse=part_lse
            )
            total = torch.logaddexp(lse, part_lse)
            merged *= (lse - total).exp_()[..., None]
            merged += part * (part_lse - total).exp_()[..., None]
            lse = total
        output.copy_(merged)

    def _expanded(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        query_starts: Tensor,
        key_starts: Tensor,
        out: Tensor,
        *,
        causal: bool,
        lse: Tensor | None = None,
    ) -> None:
        """Attention of (T, N, C + P) to the keys and values of (S, L)."""
        q_nope, q_rope = query.split([query.shape[2] - self.rope, self.rope], dim=-1)
        latent, k_rope = key[:, : self.rank], key[:, self.rank : self.rank + self.rope]
        k_nope, value = layer.up.expand(latent)
        self.expanded_operator(
            q_nope,
            q_rope,
            k_nope,
            k_rope,
            value,
            query_starts,
            key_starts,
            scale=self.scale,
            causal=causal,
            out=out,
            lse=lse,
            key_scale=self._factors(key),
        )


class LatentBackend(AttentionBackend):
    """Names the parts. ``CUSTOM`` is the one name vLLM leaves to backends from outside."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[LatentImpl]:
        return LatentImpl

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        return LatentMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return 64  # a tile of the decode kernel lies in one page

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return (num_blocks, block_size, head_size)
