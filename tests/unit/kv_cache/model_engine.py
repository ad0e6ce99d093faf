"""A scheduler and a worker in plain Python around the real block managers.

The worker keeps what a GPU worker keeps: a block table a request that only ever grows by the ids
the scheduler hands out (stale ids of returned blocks included), and memory by (block, offset). What
a position must hold is a hash of its whole prefix, so equal prefixes of different requests agree.
Each step reads and writes in the order the backend promises and checks every value read.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request, RequestStatus

from vllm_attnedit.kv_cache.spec import GateSWASpec, blocks_per_request, register_spec

FULL_GROUP, WINDOW_GROUP = 0, 1
GROUPS = ("full", "window", "window")


@dataclass
class Running:
    """A request as the model sees it."""

    request: Request
    tables: list[list[int]] = field(default_factory=lambda: [[] for _ in GROUPS])
    first_step: bool = True

    def content(self, position: int, drafts: list[int]) -> int:
        """What the cache must hold at a position: a hash of the tokens up to it."""
        tokens = [*self.request.all_token_ids, *drafts]
        return hash(tuple(tokens[: position + 1]))


class ModelEngine:
    """Requests in, checked steps out."""

    def __init__(
        self,
        *,
        window: int,
        block_size: int = 4,
        pack: int = 1,
        num_blocks: int = 200,
        max_model_len: int = 400,
        drafts: int = 0,
        caching: bool = True,
        stock: bool = False,
        stored_tail: int | None = None,
        check_memory: bool = True,
        layer_order: tuple[int, ...] = (1, 0, 2),
    ) -> None:
        register_spec()
        init_none_hash(sha256)
        self.window, self.block_size, self.drafts = window, block_size, drafts
        self.stock, self.stored_tail = stock, stored_tail
        # Packed window pages: full layers count in larger blocks, and hits end at those.
        self.block_sizes = [block_size * pack, block_size, block_size]
        self.check_memory = check_memory  # costs the square of the length
        # One layer a group; layers of different groups share memory, so their order matters.
        self.layer_order = layer_order
        shared: dict[str, Any] = {
            "block_size": block_size,
            "num_kv_heads": 1,
            "head_size": 8,
            "dtype": torch.float32,
        }
        windowed = (
            SlidingWindowSpec(sliding_window=window, **shared)
            if stock
            else GateSWASpec(
                sliding_window=window,
                num_speculative_tokens=drafts,
                stored_tail=stored_tail,
                **shared,
            )
        )
        groups = [
            KVCacheGroupSpec(
                ["full"], FullAttentionSpec(**shared | {"block_size": self.block_sizes[0]})
            ),
            KVCacheGroupSpec(["window"], windowed),
            KVCacheGroupSpec(["other window"], windowed),
        ]
        self.manager = KVCacheManager(
            KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            max_model_len=max_model_len,
            scheduler_block_size=block_size * pack,
            hash_block_size=block_size,
            max_num_batched_tokens=max_model_len,
            enable_caching=caching,
            log_stats=True,
        )
        self.pool = self.manager.block_pool
        self.baseline = self.pool.get_num_free_blocks()
        self.hasher = get_request_block_hasher(block_size, sha256) if caching else None
        self.running: dict[str, Running] = {}
        self.memory: dict[tuple[int, int], int] = {}
        self.hit_tokens = 0
        self.peak_held = 0
        self.added = 0

    # Requests

    def add(self, prompt: list[int]) -> str:
        name = f"r{self.added}"
        self.added += 1
        request = Request(
            name,
            prompt,
            SamplingParams(max_tokens=1000, temperature=0),
            None,
            block_hasher=self.hasher,
        )
        self.running[name] = Running(request)
        return name

    def preempt(self, name: str) -> None:
        run = self.running[name]
        self.manager.free(run.request)
        run.request.num_computed_tokens = 0
        self.running[name] = Running(run.request)

    def finish(self, name: str) -> None:
        request = self.running.pop(name).request
        request.status = RequestStatus.FINISHED_STOPPED
        self.manager.free(request)

    # Steps

    def step(self, wanted: dict[str, int], accept: random.Random) -> list[str]:
        """Schedule up to ``wanted[name]`` tokens of each request, run the step, sample.

        Returns the names that were scheduled; the others found no memory.
        """
        self.manager.new_step_starts()
        batch: list[tuple[Running, int, int, list[int]]] = []
        for name, tokens in wanted.items():
            entry = self._schedule(self.running[name], tokens, accept)
            if entry is not None:
                batch.append(entry)
        if self.check_memory:
            self._execute(batch)
        for run, computed, new, draft in batch:
            self._sample(run, computed, new, draft, accept)
        return [run.request.request_id for run, *_ in batch]

    def _schedule(
        self, run: Running, tokens: int, rng: random.Random
    ) -> tuple[Running, int, int, list[int]] | None:
        request = run.request
        computed_blocks, hit = None, 0
        if run.first_step and request.num_computed_tokens == 0:
            computed_blocks, hit = self.manager.get_computed_blocks(request)
        computed = request.num_computed_tokens + hit
        new = max(1, min(tokens, request.num_tokens - computed))
        decoding = computed + new == request.num_tokens and new == 1
        draft = [rng.randrange(50) for _ in range(self.drafts)] if decoding else []
        allocated = self.manager.allocate_slots(
            request,
            new + len(draft),
            hit,
            computed_blocks,
            full_sequence_must_fit=run.first_step,
        )
        if allocated is None:
            return None
        if run.first_step:
            self.hit_tokens += hit
            run.tables = [list(ids) for ids in self.manager.get_block_ids(request.request_id)]
        else:
            for table, ids in zip(run.tables, allocated.get_block_ids(), strict=True):
                table.extend(ids)
        self._check_held(run, computed, new + len(draft))
        run.first_step = False
        return run, computed, new + len(draft), draft

    def _check_held(self, run: Running, computed: int, new: int) -> None:
        """Nothing is held that nobody can read, and never more than the bound."""
        if self.stock:
            return
        manager = self.manager.coordinator.single_type_managers[WINDOW_GROUP]
        name, size = run.request.request_id, self.block_size
        blocks = manager.req_to_blocks[name]
        held = [i for i, block in enumerate(blocks) if not block.is_null]
        branch = [i for i in held if manager.tails.retains_ahead(name, i)]
        # A hit's own tail is handed to the worker with the first step and returned with the next.
        # While memory is plentiful, a tail that is worth a later hit is not overwritten at once.
        kept = any(manager.tails.wants(name, i, blocks[i]) for i in held)
        if not run.first_step and not branch and not kept:
            # A block that another request shares cannot be overwritten, nor is it ours alone.
            own = sum(blocks[i].ref_cnt == 1 for i in held)
            self.peak_held = max(self.peak_held, own)
            assert own <= blocks_per_request(self.window, size, self.drafts)
        readable_from = computed - self.drafts - (self.window - 1)
        for i in held:
            assert (i + 1) * size > readable_from or i in branch, "held, but nobody can read it"

    def _execute(self, batch: list[tuple[Running, int, int, list[int]]]) -> None:
        any_chunk = any(new > 1 + self.drafts for _, _, new, _ in batch)
        for group in self.layer_order:
            windowed = GROUPS[group] == "window"
            reads_first = windowed and any_chunk and not self.stock
            if not reads_first:
                self._write(batch, group)
            for run, computed, new, draft in batch:
                first = max(0, computed - self.window + 1) if windowed else 0
                last = computed if reads_first else computed + new
                self._read(run, group, range(first, last), draft)
            if reads_first:
                self._write(batch, group)

    def _write(self, batch: list[tuple[Running, int, int, list[int]]], group: int) -> None:
        writers: dict[int, str] = {}
        written: set[tuple[int, int]] = set()
        for run, computed, new, draft in batch:
            begin = computed
            if GROUPS[group] == "window" and self.stored_tail is not None:
                # Some layer of the group has no more: what lies in the other slots is old.
                begin = max(begin, computed + new - self.stored_tail)
            for position in range(begin, computed + new):
                size = self.block_sizes[group]
                block = run.tables[group][position // size]
                if block == 0:
                    continue
                name = run.request.request_id
                assert writers.setdefault(block, name) == name, "two requests write one block"
                slot = (block, position % size)
                assert slot not in written, "two tokens go to one slot"
                written.add(slot)
                self.memory[slot] = run.content(position, draft)

    def _read(self, run: Running, group: int, positions: range, draft: list[int]) -> None:
        for position in positions:
            size = self.block_sizes[group]
            block = run.tables[group][position // size]
            assert block != 0, f"position {position} is in the null block"
            found = self.memory.get((block, position % size))
            assert found == run.content(position, draft), f"position {position} was overwritten"

    def _sample(
        self, run: Running, computed: int, new: int, draft: list[int], rng: random.Random
    ) -> None:
        request = run.request
        if computed + new - len(draft) < request.num_tokens:
            request.num_computed_tokens = computed + new
            return
        accepted = rng.randint(0, len(draft))
        request.num_computed_tokens = computed + new - len(draft) + accepted
        request.append_output_token_ids([*draft[:accepted], rng.randrange(50)])

    # What must be true at any time

    def check_pool(self) -> None:
        free = 0
        for block in self.pool.blocks:
            if block.is_null:
                continue
            assert block.ref_cnt >= 0, "freed twice"
            free += block.ref_cnt == 0
        assert free == self.pool.get_num_free_blocks(), "the free list and the counts disagree"
        held = sum(
            not block.is_null
            for manager in self.manager.coordinator.single_type_managers
            for blocks in manager.req_to_blocks.values()
            for block in blocks
        )
        references = sum(b.ref_cnt for b in self.pool.blocks if not b.is_null)
        assert held == references, "a block is leaked"

    def hashed_window_blocks(self) -> int:
        """Blocks of the window group that the prefix cache holds."""
        suffix = WINDOW_GROUP.to_bytes(4, "big", signed=False)
        return sum(
            block.block_hash is not None and bytes(block.block_hash).endswith(suffix)
            for block in self.pool.blocks
        )
