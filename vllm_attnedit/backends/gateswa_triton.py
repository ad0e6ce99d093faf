"""GateSWA window attention on CUDA: this project's Triton operators behind vLLM's backend
interface.

A step with any chunk attends to the chunk's dense keys and values and the cached tail, and writes
afterwards; a step of decodes only writes first and reads pages. The order is the backend's half of
the contract with :mod:`vllm_attnedit.kv_cache.manager`.

Shapes: T tokens, R requests, N query heads, K KV heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_attnedit.backends.prologue import Prologue
from vllm_attnedit.backends.steps import Step, decode_query_len
from vllm_attnedit.ops.gateswa_decode import gateswa_decode
from vllm_attnedit.ops.gateswa_prefill import gateswa_prefill
from vllm_attnedit.ops.kv_write import kv_write


@dataclass
class GateSWAMetadata(AttentionMetadata):
    """One step, shared by all window layers of a cache group. Device tensors only."""

    num_actual_tokens: int
    max_query_len: int
    has_chunks: bool
    query_start_loc: Tensor  # (R + 1,) int32
    seq_lens: Tensor  # (R,) int32
    positions: Tensor  # (T,) int64
    block_table: Tensor  # (R, max_blocks) int32
    slot_mapping: Tensor  # (T,) int64; slots of the null block are not written
    step: Step


class GateSWAMetadataBuilder(AttentionMetadataBuilder[GateSWAMetadata]):
    """Passes the batch's tensors on: nothing is computed, nothing is read on the host."""

    # Decodes, with or without drafts, run as one graph; chunks run piecewise.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table: bool = True

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.decode_query_len = decode_query_len(vllm_config)
        self._init_reorder_batch_threshold(self.decode_query_len, supports_spec_as_decode=False)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> GateSWAMetadata:
        common = common_attn_metadata
        assert common.positions is not None  # both of vLLM's model runners give them
        return GateSWAMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            has_chunks=common.max_query_len > self.decode_query_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            positions=common.positions,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            step=Step(common, self.kv_cache_spec.block_size, partial(self.build, 0)),
        )

    def update_block_table(
        self, metadata: GateSWAMetadata, blk_table: Tensor, slot_mapping: Tensor
    ) -> GateSWAMetadata:
        step = metadata.step
        common = step.common.replace(block_table_tensor=blk_table, slot_mapping=slot_mapping)
        return replace(
            metadata,
            block_table=blk_table,
            slot_mapping=slot_mapping,
            step=replace(step, common=common),
        )


class GateSWAImpl(AttentionImpl[GateSWAMetadata]):
    """Windowed attention of one layer; the gate arrives as ``output_scale``."""

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
        first_kv_head: int = 0,
        **unused_options: Any,
    ) -> None:
        assert sliding_window is not None and sliding_window >= 1
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads or num_heads
        # In pages shared by several layers, this one's slice of the heads.
        self.kv_heads = slice(first_kv_head, first_kv_head + self.num_kv_heads)
        self.sliding_window = sliding_window
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
        attn_metadata: GateSWAMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend, gate and store.

        Args:
            query: ``(T, N, D)``, rotated, or what ``layer.prologue`` is still to be done to.
            key: ``(T, K, D)``, likewise.
            value: ``(T, K, D)``.
            kv_cache: ``(blocks, 2, block_size, K, D)``, NHD or HND in memory; of packed pages, all
                layers' heads.
            output: ``(T, N, D)``, filled in place.
            output_scale: gate logits ``(T, N)`` or ``(T, N * D)``, or ``None``.
        """
        if attn_metadata is None:  # profiling run: no cache yet
            return output.zero_()
        tokens = attn_metadata.num_actual_tokens
        query, key, value = query[:tokens], key[:tokens], value[:tokens]
        gate = None if output_scale is None else output_scale[:tokens]
        key_cache, value_cache = kv_cache[:, :, :, self.kv_heads].unbind(1)
        k_scale: Tensor | None = None
        v_scale: Tensor | None = None
        if self.fp8_dtype is not None:
            key_cache, value_cache = (c.view(self.fp8_dtype) for c in (key_cache, value_cache))
            k_scale, v_scale = layer._k_scale, layer._v_scale
        scales: dict[str, Any] = {"k_scale": k_scale, "v_scale": v_scale}
        chunks = attn_metadata.has_chunks
        slots = attn_metadata.slot_mapping[:tokens]
        prologue: Prologue | None = layer.prologue
        if prologue is not None:
            # The operator may not change its arguments: finished queries and keys are new tensors.
            finished = query.new_empty(query.shape)
            finished_key = key.new_empty(key.shape) if chunks else None
            kv_write(
                query,
                key,
                value,
                key_cache,
                value_cache,
                slots[:0] if chunks else slots,  # tails must be read before anything is written
                positions=attn_metadata.positions[:tokens],
                q_out=finished,
                k_out=finished_key,
                store_k=chunks,
                **prologue.arguments(),
                **scales,
            )
            query, key = finished, key if finished_key is None else finished_key
        elif not chunks:
            kv_write(None, key, value, key_cache, value_cache, slots, store_k=False, **scales)
        paged = (
            key_cache,
            value_cache,
            attn_metadata.block_table,
            attn_metadata.seq_lens,
            attn_metadata.query_start_loc,
        )
        options: dict[str, Any] = {
            "sliding_window": self.sliding_window,
            "scale": self.scale,
            "gate": gate,
            "out": output[:tokens],
            **scales,
        }
        if chunks:
            gateswa_prefill(query, key, value, *paged, **options)
            kv_write(None, key, value, key_cache, value_cache, slots, store_k=False, **scales)
        else:
            gateswa_decode(query, *paged, max_query_len=attn_metadata.max_query_len, **options)
        return output


class GateSWATritonBackend(TritonAttentionBackend):
    """vLLM's page layout, so that window and full layers share one pool of memory."""

    forward_includes_kv_cache_update: bool = True
    takes_prologue: ClassVar[bool] = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[GateSWAImpl]:
        return GateSWAImpl

    @staticmethod
    def get_builder_cls() -> type[GateSWAMetadataBuilder]:
        return GateSWAMetadataBuilder

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False  # how a window is cut over the GPU depends on how many requests there are

    @staticmethod
    def use_cascade_attention(*args: Any, **kwargs: Any) -> bool:
        return False
