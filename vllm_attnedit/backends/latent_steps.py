"""What one step's latent attention needs: decodes first, then prompts with their cached context.

Shapes: T tokens, R requests, S context tokens of one part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_attnedit.backends.steps import decode_query_len

CONTEXT_TOKENS = 16_384
"""Cached tokens that a prompt's step expands at once: bounds its memory, 256 MiB for 32 heads of
128 + 128 in 2 bytes. A longer context takes several parts, merged by their softmax sums."""

SHORT_QUERY = 16
"""Up to this many tokens of a request go the way of decodes, over latents: expanding a long context
for so few would cost more."""


@dataclass
class ContextPart:
    """A stretch of the cached contexts of a step's prompts, end to end."""

    slots: Tensor  # (S,) int64, places in the cache
    key_start_loc: Tensor  # (prompts + 1,) int32; requests may have no key in this part


@dataclass
class LatentMetadata(AttentionMetadata):
    """One step, shared by all latent layers. The first requests are decodes."""

    num_actual_tokens: int
    num_decode_tokens: int
    max_decode_len: int  # query tokens of a decode, at most
    max_seq_len: int
    slot_mapping: Tensor  # (T,) int64; negative slots are padding
    query_start_loc: Tensor  # (decodes + 1,) int32
    seq_lens: Tensor  # (decodes,) int32, the step's tokens included
    block_table: Tensor  # (decodes, max_blocks) int32
    prompt_start_loc: Tensor | None = None  # (prompts + 1,) int32, from the first prompt token
    context: tuple[ContextPart, ...] = ()


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """Splits a step; reads nothing on the host when all its requests are decodes."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    context_tokens: ClassVar[int] = CONTEXT_TOKENS

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.threshold = max(SHORT_QUERY, decode_query_len(vllm_config))
        self._init_reorder_batch_threshold(self.threshold, supports_spec_as_decode=False)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> LatentMetadata:
        common = common_attn_metadata
        decodes, prompts, decode_tokens, _ = split_decodes_and_prefills(common, self.threshold)
        metadata = LatentMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decode_tokens=decode_tokens,
            max_decode_len=max(1, common.max_query_len),
            max_seq_len=common.max_seq_len,
            slot_mapping=common.slot_mapping,
            query_start_loc=common.query_start_loc[: decodes + 1],
            seq_lens=common.seq_lens[:decodes],
            block_table=common.block_table_tensor[:decodes],
        )
        if prompts:
            self._add_prompts(metadata, common, decodes, decodes + prompts)
        return metadata

    def _add_prompts(
        self, metadata: LatentMetadata, common: CommonAttentionMetadata, first: int, last: int
    ) -> None:
        starts = common.query_start_loc_cpu
        if first:
            metadata.max_decode_len = int((starts[1 : first + 1] - starts[:first]).max())
        metadata.prompt_start_loc = (
            common.query_start_loc[first : last + 1] - common.query_start_loc[first]
        )
        lengths = common.seq_lens_cpu_upper_bound  # exact for prompts
        if lengths is None:
            lengths = common.seq_lens.cpu()
        lengths = lengths[first:last] - (starts[first + 1 : last + 1] - starts[first:last])
        blocks = common.block_table_tensor[first:last]
        metadata.context = tuple(
            ContextPart(self._slots(blocks, pieces), self._starts(pieces, last - first))
            for pieces in context_parts(lengths.tolist(), self.context_tokens)
        )

    def _slots(self, blocks: Tensor, pieces: list[tuple[int, int, int]]) -> Tensor:
        size = self.kv_cache_spec.block_size
        rows = torch.cat([torch.full((stop - start,), row) for row, start, stop in pieces])
        positions = torch.cat([torch.arange(start, stop) for _, start, stop in pieces])
        rows, positions = self._to_device(rows), self._to_device(positions)
        return blocks[rows, positions // size].long() * size + positions % size

    def _starts(self, pieces: list[tuple[int, int, int]], prompts: int) -> Tensor:
        counts = torch.zeros(prompts + 1, dtype=torch.int32)
        for row, start, stop in pieces:
            counts[row + 1] = stop - start
        return self._to_device(counts.cumsum(0, dtype=torch.int32))

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)


def context_parts(lengths: list[int], most: int) -> list[list[tuple[int, int, int]]]:
    """Cut contexts laid end to end into parts.

    Args:
        lengths: cached tokens of each request.
        most: tokens of a part, at most; >= 1.

    Returns:
        Parts of pieces (request, first token, one past the last); no empty ones.
    """
    parts: list[list[tuple[int, int, int]]] = []
    room = 0
    for request, length in enumerate(lengths):
        start = 0
        while start < length:
            if room == 0:
                parts.append([])
                room = most
            stop = min(length, start + room)
            parts[-1].append((request, start, stop))
            room -= stop - start
            start = stop
    return parts
