"""Block management of GateSWA window layers: memory for the window, and for nothing else.

vLLM's own window manager stores a prefill chunk whole before it drops what lies outside the window.
Here a chunk's tokens that leave the window by its end get the null block: the backend attends to
the chunk's dense keys and values and stores only the tail. Two rules make that safe, and the
backend (``gateswa_*`` in :mod:`vllm_attnedit.backends`) keeps its side of both:

* In a step with any chunk, a layer reads the cached tails of all requests *before* it writes. So
  the blocks of a running request that lie wholly before its chunk and leave the window by the
  chunk's end take the new tail: the same blocks of the same layers, read and then overwritten. They
  go to nobody else in that step: layers of different groups share memory, and another group's layer
  may write before this one's has read.
* A write to the null block is skipped.

Reading before writing has a price: a block that this step writes cannot serve a hit of this step.
So blocks get their hash when the next step starts (:mod:`vllm_attnedit.kv_cache.release`).

A chunk is a step of more than ``1 + num_speculative_tokens`` tokens. Smaller steps are decodes:
they write first, then read pages, and their blocks are kept as vLLM keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_attnedit.kv_cache.branches import branch_points
from vllm_attnedit.kv_cache.release import ReleasingWindowManager

_PLENTY = 4
"""Memory is plentiful while more than one block in this many is free."""


class GateSWAManager(ReleasingWindowManager):
    """One window group's blocks. Per request it keeps vLLM's ``req_to_blocks`` list, null where the
    window has passed, and whether the worker already knows the request's blocks."""

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.stored_tail: int | None = kv_cache_spec.stored_tail
        self.computed_tokens: dict[str, int] = {}
        self.known_to_worker: set[str] = set()

    # The chunk, and what of it is stored

    def _is_chunk(self, computed_tokens: int, num_tokens_main_model: int) -> bool:
        return num_tokens_main_model - computed_tokens > 1 + self.num_speculative_tokens

    def _plenty(self) -> bool:
        """Whether memory is plentiful. While a step is scheduled it can only cease to be."""
        return self.block_pool.get_num_free_blocks() * _PLENTY > self.block_pool.num_gpu_blocks

    def _null_blocks_ahead(
        self, request_id: str, held: int, num_tokens: int, num_tokens_main_model: int
    ) -> list[bool]:
        """For each block from ``held`` to the first needed one: whether it is retained (True) or
        null (False)."""
        required = cdiv(num_tokens, self.block_size)
        end = min(self._first_needed_block(num_tokens_main_model), required)
        # Nothing to retain where not all layers have keys and values.
        begin = 0
        if self.stored_tail is not None:
            begin = cdiv(num_tokens_main_model - self.stored_tail, self.block_size)
        return [i >= begin and self.tails.retains_ahead(request_id, i) for i in range(held, end)]

    # vLLM's interface

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[list[KVCacheBlock], ...]:
        """vLLM's search, plus a note of where the other groups had more: a branching point."""
        hit = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            dcp_world_size,
            pcp_world_size,
        )
        hit_tokens = len(hit[0]) * kv_cache_spec.block_size
        branch_points(block_pool).note(hit_tokens, max_length)
        return hit

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
    ) -> int:
        """vLLM's count less the null blocks that :meth:`allocate_new_blocks` will put in."""
        if request_id in self.known_to_worker and not self._is_chunk(
            total_computed_tokens, num_tokens_main_model
        ):  # a running request's decode
            self.computed_tokens[request_id] = total_computed_tokens
            return max(0, cdiv(num_tokens, self.block_size) - len(self.req_to_blocks[request_id]))
        if request_id not in self.computed_tokens and self.enable_caching:
            self.tails.arrive(request_id, branch_points(self.block_pool))
        self.computed_tokens[request_id] = total_computed_tokens
        count = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
        )
        if apply_admission_cap or not self._is_chunk(total_computed_tokens, num_tokens_main_model):
            return count
        held = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        if self.enable_caching:
            self.tails.plan(request_id, num_tokens_main_model, plenty=self._plenty())
        if request_id not in self.num_cached_block:
            skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
            held = max(held, skipped)
        ahead = self._null_blocks_ahead(request_id, held, num_tokens, num_tokens_main_model)
        new = max(0, count - ahead.count(False))
        reused = len(self._reusable(request_id, num_tokens_main_model)) if held else 0
        return max(ahead.count(True), new - reused)

    def allocate_new_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take over a hit."""
        if new_computed_blocks:
            self.tails.hit(request_id, len(new_computed_blocks), new_computed_blocks[-1])
        super().allocate_new_computed_blocks(
            request_id,
            new_computed_blocks,
            num_local_computed_tokens,
            num_external_computed_tokens,
        )

    def _reusable(self, request_id: str, num_tokens_main_model: int) -> list[int]:
        """Indices of the blocks that a chunk reads for the last time and may overwrite, if any.

        The block that the chunk starts in is none of them: its rest is written. Tails that are kept
        for later hits are spared while memory is plentiful.
        """
        computed = self.computed_tokens[request_id]
        if request_id not in self.known_to_worker:
            return []  # the worker gets its ids with this step: they must be there
        blocks = self.req_to_blocks[request_id]
        end = min(self._first_needed_block(num_tokens_main_model), computed // self.block_size)
        spare = self.enable_caching and self._plenty()
        return [
            i
            for i in range(self.null_below.get(request_id, 0), min(end, len(blocks)))
            if not blocks[i].is_null
            and blocks[i].ref_cnt == 1
            and not (spare and self.tails.spares(request_id, i))
        ]

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Blocks for the step: null where the chunk leaves the window, real from there on."""
        computed = self.computed_tokens.get(request_id, 0)
        added: list[KVCacheBlock] = []
        blocks = self.req_to_blocks[request_id]
        if self._is_chunk(computed, num_tokens_main_model):
            reusable = self._reusable(request_id, num_tokens_main_model)
            for retained in self._null_blocks_ahead(
                request_id, len(blocks), num_tokens, num_tokens_main_model
            ):
                block = self.block_pool.get_new_blocks(1)[0] if retained else self._null_block
                blocks.append(block)
                added.append(block)
            for _ in range(min(len(reusable), cdiv(num_tokens, self.block_size) - len(blocks))):
                i = reusable.pop()
                self.block_pool.evict_blocks({blocks[i].block_id})
                added.append(blocks[i])
                blocks.append(blocks[i])
                blocks[i] = self._null_block
            self.tails.scheduled(request_id, computed, num_tokens_main_model)
            stored = self.stored_tail
            if stored is not None and computed < num_tokens_main_model - stored:
                stored_from = num_tokens_main_model - stored
                self.note_unfilled(request_id, computed, stored_from)
        if num_tokens > len(blocks) * self.block_size:
            added += super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        self.known_to_worker.add(request_id)
        return added

    def free(self, request_id: str) -> None:
        """Return everything, and forget the request."""
        super().free(request_id)
        self.computed_tokens.pop(request_id, None)
        self.known_to_worker.discard(request_id)
