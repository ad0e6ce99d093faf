"""Latent attention on CPU, for any widths: the operators of :mod:`vllm_attnedit.backends.latent`
replaced by those made for it.

Shapes: T tokens, N heads, R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import MultipleOf

from vllm_attnedit.backends.latent import LatentBackend, LatentImpl
from vllm_attnedit.backends.latent_steps import LatentMetadata
from vllm_attnedit.ops.mla_decode import cpu as decode
from vllm_attnedit.ops.mla_prefill import cpu as prefill


class LatentCPUImpl(LatentImpl):
    """Decodes gather into one buffer that all layers share."""

    expanded_operator: ClassVar[Callable[..., Tensor]] = staticmethod(prefill.mla_prefill)
    _workspace: ClassVar[Tensor | None] = None

    def _attend_pages(
        self,
        q_latent: Tensor,
        q_rope: Tensor,
        kv_cache: Tensor,
        kv_scale: Tensor | None,
        metadata: LatentMetadata,
        out: Tensor,
    ) -> None:
        page_bytes = kv_cache[0].numel() * kv_cache.element_size()
        needed = max(decode.TILE_BYTES, page_bytes)
        workspace = LatentCPUImpl._workspace
        if workspace is None or workspace.numel() < needed:
            workspace = LatentCPUImpl._workspace = torch.empty(needed, dtype=torch.uint8)
        decode.mla_decode(
            q_latent,
            q_rope,
            kv_cache,
            metadata.block_table,
            metadata.seq_lens,
            metadata.query_start_loc,
            scale=self.scale,
            out=out,
            kv_scale=kv_scale,
            factors=kv_cache.shape[2] - self.rank - self.rope,
            workspace=workspace,
        )


class LatentCPUBackend(LatentBackend):
    """Any block size."""

    @staticmethod
    def get_impl_cls() -> type[LatentCPUImpl]:
        return LatentCPUImpl

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return default_block_size
