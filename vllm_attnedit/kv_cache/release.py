"""What becomes of a window block once it is written: hashed a step later, and returned.

A step with a chunk reads before it writes (:mod:`vllm_attnedit.kv_cache.manager` says why). So a
block that it writes cannot serve a hit of the same step, and gets its hash when the next one
starts.

A scheduler asks every manager about every running request in every step, and of a decode's 16
steps or so only two change anything here. The others end at a comparison.
"""

from __future__ import annotations

from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.request import Request

from vllm_attnedit.kv_cache.gauge import block_gauge
from vllm_attnedit.kv_cache.retention import RetainedTails

_NEVER = (0, 0)


class ReleasingWindowManager(SlidingWindowManager):
    """One window group's blocks from the end of a step on. Per request it keeps how far vLLM's
    ``req_to_blocks`` list is known to be null, and what its last step wrote."""

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.num_speculative_tokens: int = kv_cache_spec.num_speculative_tokens
        self.null_below: dict[str, int] = {}
        # Per request: between which numbers of computed tokens there is nothing to return.
        self.settled: dict[str, tuple[int, int]] = {}
        self.written: dict[str, tuple[Request, int, int | None]] = {}
        self.to_hash: dict[str, None] = {}  # keys of ``written``, in order
        # Per request: blocks that some layer does not fill, which nobody may find by their hash.
        self.unfilled: dict[str, range] = {}
        self.tails = RetainedTails(self.sliding_window, self.block_size, self.scheduler_block_size)
        self.gauge = block_gauge(self)

    def _first_needed_block(self, num_tokens: int) -> int:
        """The first block that the request itself may still read once ``num_tokens`` tokens are
        computed: the next query sees ``W - 1`` tokens back, also if the step's drafts are rejected.
        """
        tokens = max(0, num_tokens - self.num_speculative_tokens)
        return self.get_num_skipped_tokens(tokens) // self.block_size

    def cache_blocks(
        self, request: Request, num_tokens: int, retention_interval: int | None = None
    ) -> None:
        """Have the step's full blocks hashed once it is over; keep the prompt's tail."""
        request_id = request.request_id
        before = self.written.get(request_id)
        if before is None:
            self.tails.prompt(request_id, request.num_prompt_tokens)
        elif before[1] == num_tokens:
            return
        self.written[request_id] = (request, num_tokens, retention_interval)
        if num_tokens // self.block_size > self.num_cached_block.get(request_id, 0):
            self.to_hash[request_id] = None

    def new_step_starts(self) -> None:
        """Hash what the last step wrote."""
        for request_id in self.to_hash:
            self._hash(request_id)
        self.to_hash.clear()
        if self.gauge is not None:
            self.gauge.update()

    def _hash(self, request_id: str) -> None:
        super().cache_blocks(*self.written[request_id])
        unfilled = self.unfilled.get(request_id)
        if unfilled is None:
            return
        blocks = self.req_to_blocks[request_id][unfilled.start : unfilled.stop]
        self.block_pool.evict_blocks({block.block_id for block in blocks if not block.is_null})
        # A block is hashed once a boundary of all groups is reached: that may be steps later.
        if self.num_cached_block[request_id] >= unfilled.stop:
            del self.unfilled[request_id]

    def note_unfilled(self, request_id: str, begin: int, end: int) -> None:
        """Some layer does not store the tokens from ``begin`` to ``end``: of all blocks with any of
        them none may be found by its hash."""
        first, stop = begin // self.block_size, cdiv(end, self.block_size)
        if request_id in self.unfilled:
            first = min(first, self.unfilled[request_id].start)
        self.unfilled[request_id] = range(first, stop)

    def remove_skipped_blocks(self, request_id: str, total_computed_tokens: int) -> None:
        """Return what left the window. vLLM stops at the first null block; here null blocks and
        real ones alternate, so it would leak."""
        low, high = self.settled.get(request_id, _NEVER)
        if low <= total_computed_tokens < high:
            return
        tokens = max(0, total_computed_tokens - self.num_speculative_tokens)
        if self.enable_caching:
            self.block_pool.evict_blocks(self.tails.advance(request_id, tokens))
        end = self._first_needed_block(total_computed_tokens)
        self._release(request_id, end)
        if end <= len(self.req_to_blocks.get(request_id, ())):
            self.settled[request_id] = self._settled_around(tokens)

    def _settled_around(self, tokens: int) -> tuple[int, int]:
        """The computed tokens, drafts included, around ``tokens`` without them, between which
        neither a block leaves the window nor the next turn would resume elsewhere."""
        first = self.get_num_skipped_tokens(tokens) // self.block_size
        left = self.sliding_window - 1 + first * self.block_size if first else 0
        leaves = self.sliding_window - 1 + (first + 1) * self.block_size
        resumes = tokens // self.tails.alignment * self.tails.alignment
        low, high = max(left, resumes), min(leaves, resumes + self.tails.alignment)
        drafts = self.num_speculative_tokens
        return (low + drafts if low else 0), high + drafts

    def _release(self, request_id: str, end: int) -> None:
        """Return the real blocks before index ``end``.

        Those that can serve a later hit keep their hash and are reused last; the others lose it
        and are reused first.
        """
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        start, end = self.null_below.get(request_id, 0), min(end, len(blocks))
        cached: list[KVCacheBlock] = []
        scratch: list[KVCacheBlock] = []
        for i in range(end - 1, start - 1, -1):
            block = blocks[i]
            if block.is_null:
                continue
            if not self.tails.keeps(request_id, i, block) and block.ref_cnt == 1:
                self.block_pool.evict_blocks({block.block_id})
            (scratch if block.block_hash is None else cached).append(block)
            blocks[i] = self._null_block
        self.null_below[request_id] = max(start, end)
        self.block_pool.free_blocks(cached)
        self.block_pool.free_blocks(scratch, prepend=True)

    def free(self, request_id: str) -> None:
        """Return everything. A finished request's last tail stays cached for the next turn; a
        preempted one may not have written it."""
        written = self.written.get(request_id)
        if written is not None and written[0].is_finished():
            if request_id in self.to_hash:
                self._hash(request_id)
            held = self.req_to_blocks.get(request_id, [])
            self.block_pool.evict_blocks(self.tails.finish(request_id, written[1], held))
        super().free(request_id)
        self.written.pop(request_id, None)
        self.unfilled.pop(request_id, None)
        self.to_hash.pop(request_id, None)
        self.null_below.pop(request_id, None)
        self.settled.pop(request_id, None)
        self.tails.forget(request_id)
        if self.gauge is not None:
            self.gauge.update()
