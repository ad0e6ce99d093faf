"""GateSWA window attention on Ascend NPUs, on vllm-ascend's own backend. Imported on that platform
only.

Two things differ from vllm-ascend. Its band mask keeps ``pre_tokens + 1`` keys and it passes the
window for ``pre_tokens``, one key too many, which after a block's end lies in a block that the
scheduler has given away; here ``pre_tokens`` is W - 1. And with this project's KV specification a
step with any chunk attends to the chunk's dense keys and values behind the cached tail, and writes
afterwards: the backend's half of the contract with :mod:`vllm_attnedit.kv_cache.manager`. Tokens
of the null block are written there: pages are whole blocks, and nobody reads that one unmasked.

Compile- and contract-verified, not run on hardware.

Shapes: T tokens, R requests, N query heads, K KV heads, D head width, B block size, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch_npu
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm_ascend.attention.attention_v1 import (
    AscendAttentionBackend,
    AscendAttentionBackendImpl,
    AscendAttentionMetadataBuilder,
    AscendMetadata,
)
from vllm_ascend.attention.utils import AscendCommonAttentionMetadata

from vllm_attnedit.backends.ascend_limits import check_window_attention
from vllm_attnedit.backends.steps import chunk_requests, decode_query_len
from vllm_attnedit.kv_cache.spec import GateSWASpec
from vllm_attnedit.ops.sigmoid_gate import sigmoid_gate


@dataclass
class Chunk:
    """How a step's keys are laid end to end: each request's cached tail, then its new tokens.

    Attributes:
        tail_rows: ``(tails,)``, where the tails' entries lie in the cache, as block * B + offset.
        order: ``(S,)``, which of (tails, new tokens) stands where; ``None`` without tails.
        seq_lens: ``(R,)``, keys up to each request's end.
    """

    tail_rows: Tensor
    order: Tensor | None
    seq_lens: list[int]


@dataclass
class GateSWAAscendMetadata(AscendMetadata):
    """One step, shared by all window layers of a cache group."""

    chunk: Chunk | None = None  # None: attend to pages, after the write


def lay_out(
    query_ends: Sequence[int],
    seq_lens: Sequence[int],
    block_table: Tensor,
    sliding_window: int,
    block_size: int,
) -> Chunk:
    """The layout of a step with chunks.

    Args:
        query_ends: ``(R,)``, new tokens up to each request's end.
        seq_lens: ``(R,)``, tokens a request, the new ones included. A padding request may have
            more new tokens than that; it sees those.
        block_table: ``(R, max_blocks)``.
        sliding_window: keys a token sees, its own included.
        block_size: B.
    """
    requests = chunk_requests(query_ends, seq_lens, sliding_window)
    tails = sum(request.computed - request.tail for request in requests)
    owners: list[Tensor] = []
    positions: list[Tensor] = []
    order: list[Tensor] = []
    ends: list[int] = []
    tail_begin = 0
    for index, (begin, end, tail, computed) in enumerate(requests):
        position = torch.arange(tail, computed)
        owners.append(torch.full_like(position, index))
        positions.append(position)
        tail_end = tail_begin + len(position)
        order += [torch.arange(tail_begin, tail_end), tails + torch.arange(begin, end)]
        ends.append(tail_end + end)
        tail_begin = tail_end
    device = block_table.device
    owner, position = (torch.cat(x).to(device) for x in (owners, positions))
    rows = block_table[owner, position // block_size].long() * block_size + position % block_size
    return Chunk(rows, torch.cat(order).to(device) if tails else None, ends)


class GateSWAAscendMetadataBuilder(AscendAttentionMetadataBuilder):
    """vllm-ascend's metadata, and the layout of chunks where pages hold windows only."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.decode_query_len = decode_query_len(vllm_config)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        # Full graphs pair layers by name and size one workspace for all: eager or piecewise.
        return AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: AscendCommonAttentionMetadata,
        fast_build: bool = False,
    ) -> GateSWAAscendMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        values = {f.name: getattr(stock, f.name) for f in fields(AscendMetadata)}
        metadata = GateSWAAscendMetadata(**values)
        spec = self.kv_cache_spec
        if (
            isinstance(spec, GateSWASpec)
            and common_attn_metadata.max_query_len > self.decode_query_len
        ):
            metadata.chunk = lay_out(
                stock.actual_seq_lengths_q,
                stock.seq_lens_list,
                stock.block_tables,
                spec.sliding_window,
                spec.block_size,
            )
        return metadata


class GateSWAAscendImpl(AscendAttentionBackendImpl):
    """Windowed attention of one layer; the gate arrives as ``output_scale``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        assert self.sliding_window is not None
        config = self.vllm_config
        check_window_attention(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            sliding_window=self.sliding_window,
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            block_size=config.cache_config.block_size,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        )
        # vllm-ascend passes it on as pre_tokens: the keys before the query's own.
        self.sliding_window -= 1

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        attn_metadata: GateSWAAscendMetadata | None,
        output: Tensor | None = None,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend, gate and store.

        Args:
            query: ``(T, N, D)``, rotated.
            key: ``(T, K, D)``, rotated.
            value: ``(T, K, D)``.
            kv_cache: keys and values, each ``(blocks, B, K, D)``.
            output: ``(T, N, D)``, filled in place.
            output_scale: gate logits ``(T, N)`` or ``(T, N * D)``, or ``None``.
        """
        assert output is not None
        if attn_metadata is None:  # profiling run: no cache yet
            return output.zero_()
        if attn_metadata.chunk is None:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output)
        else:
            self._attend(query, key, value, kv_cache, attn_metadata, attn_metadata.chunk, output)
            self.reshape_and_cache(query, key, value, kv_cache, attn_metadata, output)
        if output_scale is not None:
            sigmoid_gate(output, output_scale, out=output)
        return output

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: tuple[Tensor, Tensor],
        metadata: GateSWAAscendMetadata,
        chunk: Chunk,
        output: Tensor,
    ) -> None:
        tokens = metadata.actual_seq_lengths_q[-1]
        keys, values = key[:tokens], value[:tokens]
        if chunk.order is not None:
            keys, values = (
                torch.cat([cache.flatten(0, 1)[chunk.tail_rows], new])[chunk.order]
                for cache, new in zip(kv_cache, (keys, values))
            )
        attended, _ = torch_npu.npu_fused_infer_attention_score(
            query[:tokens],
            keys,
            values,
            atten_mask=metadata.attn_mask,
            input_layout="TND",
            actual_seq_lengths=metadata.actual_seq_lengths_q,
            actual_seq_lengths_kv=chunk.seq_lens,
            num_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            scale=self.scale,
            sparse_mode=4,
            pre_tokens=self.sliding_window,
            next_tokens=0,
        )
        output[:tokens] = attended.view(tokens, self.num_heads, self.head_size)


class GateSWAAscendBackend(AscendAttentionBackend):
    """vllm-ascend's page layout, so that window and full layers share one pool of memory."""

    @staticmethod
    def get_impl_cls() -> type[GateSWAAscendImpl]:
        return GateSWAAscendImpl

    @staticmethod
    def get_builder_cls() -> type[GateSWAAscendMetadataBuilder]:
        return GateSWAAscendMetadataBuilder
