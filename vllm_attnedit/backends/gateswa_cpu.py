"""GateSWA window attention on CPU, on vLLM's own CPU kernels.

Those read keys and values from pages only. So a step with any chunk runs on scratch pages: each
request's cached tail is copied there block by block (a block's inner layout is the kernel's
secret), the chunk's keys and values are stored behind it, and the kernel attends to that. Then the
tokens that stay in the window are written to the real pages. A step of decodes uses the real pages
alone.

Shapes: T tokens, R requests, N query heads, K KV heads, D head width, B block size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_attnedit.backends.steps import Step, chunk_requests, decode_query_len
from vllm_attnedit.ops.sigmoid_gate import sigmoid_gate


@dataclass
class Scratch:
    """The scratch pages of one step and how to fill them."""

    num_blocks: int
    source_blocks: Tensor  # (tail blocks,) in the cache
    target_blocks: Tensor  # (tail blocks,) in scratch
    attention: CPUAttentionMetadata  # the step as scratch holds it


@dataclass
class GateSWACPUMetadata(AttentionMetadata):
    """One step, shared by all window layers of a cache group."""

    pages: CPUAttentionMetadata
    scratch: Scratch | None  # None for a step of decodes
    step: Step


class GateSWACPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """vLLM's CPU metadata, and scratch pages where the step has chunks."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.decode_query_len = decode_query_len(vllm_config)
        self.page_size = kv_cache_spec.block_size

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> GateSWACPUMetadata:
        common = common_attn_metadata
        step = Step(common, self.page_size, partial(self.build, 0))
        if common.max_query_len <= self.decode_query_len:
            pages = super().build(common_prefix_len, common, fast_build)
            return GateSWACPUMetadata(pages, None, step)
        slots = common.slot_mapping
        # The null block takes no tokens: those leave the window by the chunk's end.
        stored = common.replace(slot_mapping=torch.where(slots < self.page_size, -1, slots))
        pages = super().build(common_prefix_len, stored, fast_build)
        return GateSWACPUMetadata(pages, self._scratch(common), step)

    def _scratch(self, common: CommonAttentionMetadata) -> Scratch:
        size = self.page_size
        requests = chunk_requests(
            common.query_start_loc_cpu[1:].tolist(), common.seq_lens.tolist(), self.window_size
        )
        source: list[Tensor] = []
        target: list[Tensor] = []
        tables: list[Tensor] = []
        slots = torch.full_like(common.slot_mapping, -1)
        lengths: list[int] = []
        used = 0
        for index, (begin, end, tail, computed) in enumerate(requests):
            first = tail // size  # the tail's first block
            behind = -(-computed // size)  # after its last one
            held = computed - first * size  # cached tokens in these blocks
            kept = held + end - begin  # tokens the scratch pages stand for
            blocks = torch.arange(used, used - (-kept // size), dtype=torch.int32)
            source.append(common.block_table_tensor[index, first:behind])
            target.append(blocks[: behind - first])
            position = torch.arange(held, kept)
            slots[begin:end] = blocks[position // size].long() * size + position % size
            tables.append(blocks)
            lengths.append(kept)
            used += len(blocks)
        table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)
        as_scratch = common.replace(
            block_table_tensor=table,
            slot_mapping=slots,
            seq_lens=torch.tensor(lengths, dtype=common.seq_lens.dtype),
            max_seq_len=max(lengths),
        )
        return Scratch(used, torch.cat(source), torch.cat(target), super().build(0, as_scratch))


class GateSWACPUImpl(CPUAttentionBackendImpl):
    """Windowed attention of one layer; the gate arrives as ``output_scale``."""

    def __init__(self, *arguments: Any, first_kv_head: int = 0, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # In pages shared by several layers, this one's slice of the heads. vLLM takes layers that
        # share pages for layers that share keys and values, and would not write them.
        self.kv_heads = slice(first_kv_head, first_kv_head + self.num_kv_heads)
        self.kv_sharing_target_layer_name = None

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: GateSWACPUMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend, gate and store.

        Args:
            query: ``(T, N, D)``, rotated.
            key: ``(T, K, D)``, rotated.
            value: ``(T, K, D)``.
            kv_cache: ``(blocks, K, B, 2 * D)``; of packed pages, all layers' heads.
            output: ``(T, N, D)``, filled in place.
            output_scale: gate logits ``(T, N)`` or ``(T, N * D)``, or ``None``.
        """
        if attn_metadata is None:  # profiling run: no cache yet
            return output.zero_()
        kv_cache = kv_cache[:, self.kv_heads]
        pages, scratch = attn_metadata.pages, attn_metadata.scratch
        if scratch is None:
            super().forward(layer, query, key, value, kv_cache, pages, output)
        else:
            # Zeros: the kernel multiplies what it masks, so it must be finite.
            filled = kv_cache.new_zeros((scratch.num_blocks, *kv_cache.shape[1:]))
            filled[scratch.target_blocks] = kv_cache[scratch.source_blocks]
            super().forward(layer, query, key, value, filled, scratch.attention, output)
            self._store(layer, key, value, kv_cache, pages)
        if output_scale is not None:
            tokens = pages.num_actual_tokens
            sigmoid_gate(output[:tokens], output_scale[:tokens], out=output[:tokens])
        return output

    def _store(
        self,
        layer: torch.nn.Module,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: CPUAttentionMetadata,
    ) -> None:
        blocks, heads, size, _ = kv_cache.shape
        key_cache, value_cache = kv_cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key,
            value,
            key_cache,
            value_cache,
            metadata.slot_mapping,
            metadata.isa,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )


class GateSWACPUBackend(CPUAttentionBackend):
    """vLLM's CPU page layout, so that window and full layers share one pool of memory."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[GateSWACPUImpl]:
        return GateSWACPUImpl

    @staticmethod
    def get_builder_cls() -> type[GateSWACPUMetadataBuilder]:
        return GateSWACPUMetadataBuilder
