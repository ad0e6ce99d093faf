"""A plain torch backend for latent attention, on any device: the fallback and the served oracle.

One softmax a request over its gathered pages; correct everywhere, fast nowhere. It reads sequence
lengths on the host, so it never runs under CUDA graphs.

Shapes: T tokens, N heads, L = R + P latent and RoPE width, R latent width, S tokens of a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec


@dataclass
class LatentTorchMetadata(AttentionMetadata):
    """What one step's attention needs, lengths on the host."""

    num_actual_tokens: int
    query_start_loc: list[int]  # (requests + 1,)
    seq_lens: list[int]  # (requests,), the step's tokens included
    block_table: Tensor  # (requests, max_blocks)
    slot_mapping: Tensor  # (T,)


class LatentTorchMetadataBuilder(AttentionMetadataBuilder[LatentTorchMetadata]):
    """Copies the batch's layout to the host once a step."""

    def __init__(  # abstract in the base class, though it does all that is needed
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> LatentTorchMetadata:
        common = common_attn_metadata
        return LatentTorchMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc_cpu.tolist(),
            seq_lens=common.seq_lens.tolist(),
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
        )


class LatentTorchImpl(AttentionImpl[LatentTorchMetadata]):
    """Causal attention of all heads to one cached latent head."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        *unused: Any,
        **unused_kw: Any,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = 1

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: LatentTorchMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the step's keys, then attend.

        Args:
            query: ``(T, N, L)``, absorbed.
            key: ``(T, 1, L)``: latent, then RoPE key.
            value: the latent again, ``(T, 1, R)``; only its width is used.
            kv_cache: ``(blocks, block_size, L)``.
            output: ``(T, N, R)``, filled in place.
        """
        if attn_metadata is None:  # profiling run: no cache yet
            return output.zero_()
        tokens = attn_metadata.num_actual_tokens
        rank, block_size = value.shape[-1], kv_cache.shape[1]
        slots = attn_metadata.slot_mapping[:tokens].long()
        flat = kv_cache.view(-1, kv_cache.shape[-1])
        # Negative slots mark padding.
        written = slots >= 0
        flat[slots[written]] = key[:tokens, 0][written].to(flat.dtype)

        starts = attn_metadata.query_start_loc
        for request, length in enumerate(attn_metadata.seq_lens):
            begin, end = starts[request], starts[request + 1]
            if begin == end:
                continue
            blocks = attn_metadata.block_table[request, : -(-length // block_size)].long()
            keys = kv_cache[blocks].flatten(0, 1)[:length].to(query.dtype)  # (S, L)
            output[begin:end] = self._attend(query[begin:end], keys, rank)
        return output

    def _attend(self, query: Tensor, keys: Tensor, rank: int) -> Tensor:
        """(t, N, L) queries, the last of S tokens, to (S, L) keys: (t, N, R)."""
        tokens, length = query.shape[0], keys.shape[0]
        position = torch.arange(length, device=keys.device)
        mask = position[None] <= position[length - tokens :, None] if tokens > 1 else None
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1),
            keys.expand(self.num_heads, -1, -1),
            keys[:, :rank].expand(self.num_heads, -1, -1),
            attn_mask=mask,
            scale=self.scale,
        )
        return attended.transpose(0, 1)


class LatentTorchBackend(AttentionBackend):
    """Names the parts. ``CUSTOM`` is the one name vLLM leaves to backends from outside."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[LatentTorchImpl]:
        return LatentTorchImpl

    @staticmethod
    def get_builder_cls() -> type[LatentTorchMetadataBuilder]:
        return LatentTorchMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return (num_blocks, block_size, head_size)
