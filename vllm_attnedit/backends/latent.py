"""Latent attention on this project's operators behind vLLM's backend interface.

Decodes attend over cached latents, with the halves of ``kv_b_proj`` folded into the query and
applied to the result; prompts attend over keys and values expanded from latents
(:mod:`~vllm_attnedit.backends.latent_prompts`).

Shapes: T tokens, N heads, R kv_lora_rank, P qk_rope_head_dim, C qk_nope_head_dim, V v_head_dim,
L elements of a cache entry: R + P, and with a per-head norm of keys the factors of all heads as
float32, in units of the cache's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, MultipleOf

from vllm_attnedit.backends.latent_cache import key_factors, read_entries, write_entries
from vllm_attnedit.backends.latent_prompts import PromptAttention
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
        write_entries(
            key[:tokens, 0],
            kv_cache,
            attn_metadata.slot_mapping[:tokens],
            rank=self.rank,
            kv_cache_dtype=self.kv_cache_dtype,
            scale=layer._k_scale,
        )
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
            key_scale=key_factors(kv_cache, self.rank + self.rope),
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
        assert metadata.prompt_start_loc is not None
        prompts = PromptAttention(
            self.expanded_operator, layer.up, self.rank, self.rope, self.scale
        )
        prompts.attend(
            query,
            key,
            metadata.prompt_start_loc,
            metadata.context,
            lambda slots: read_entries(kv_cache, slots, kv_scale, query.dtype),
            output,
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
