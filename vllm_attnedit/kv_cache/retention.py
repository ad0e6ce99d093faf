"""Which window blocks are worth keeping for prefix caching.

A prefix can be resumed at a boundary only if the window's tail before it is still stored. vLLM
keeps every block, so that any boundary works, and fills its cache with blocks nobody resumes at.
Here a request leaves behind

* its last tail: the next turn of a conversation resumes there;
* the tail of its prompt, for a replay of it or another answer to it;
* the tail at the end of each large chunk, a boundary that costs little of what it covers;
* the tail at a *branching point*: where full-attention layers had a longer hit than window layers,
  a prefix is shared by requests that differ afterwards (a system prompt, a document). The first two
  requests find it out, the later ones resume there.

When a conversation moves on, what its earlier turns left behind goes; a branching point's tail
stays. Losing any of these costs a hit, never a wrong result.

Blocks are counted in this group's size B. A hit ends at a multiple of the *alignment*: B, or the
larger block of the full-attention layers where window pages are packed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock

from vllm_attnedit.kv_cache.branches import BranchPoints

# A chunk's tail is kept if it is at most this share of the chunk.
_CHUNK_TAIL_SHARE = 4
_REMEMBERED = 65_536  # conversations and branching points, each a few words of host memory


@dataclass(frozen=True)
class LeftBehind:
    """A block that a request returned with its hash."""

    index: int
    block: KVCacheBlock
    block_hash: BlockHashWithGroupId

    @property
    def idle(self) -> bool:
        """Whether it is as it was left: neither hit since nor reused for something else."""
        return self.block.block_hash == self.block_hash and self.block.ref_cnt == 0


@dataclass
class _Request:
    """What is kept on behalf of one request. Ends are block indices, exclusive."""

    branch_end: int = 0
    ahead_end: int = 0  # of the tail that the coming chunk stores though it leaves the window
    hit_end: int = 0
    shared_end: int = 0  # of a hit at a known branching point
    prompt_end: int = 0
    chunk_ends: set[int] = field(default_factory=set)
    latest_end: int = 0  # where the next turn would resume
    latest: list[LeftBehind] = field(default_factory=list)
    own: list[LeftBehind] = field(default_factory=list)  # left behind by this turn
    earlier: list[LeftBehind] = field(default_factory=list)  # by the turns before it


class RetainedTails:
    """The bookkeeping of one window group.

    Args:
        sliding_window: keys a query sees.
        block_size: tokens a block.
        alignment: tokens; every hit ends at a multiple.
    """

    def __init__(self, sliding_window: int, block_size: int, alignment: int) -> None:
        self.alignment = alignment
        self.block_size = block_size
        self.tail_blocks = cdiv(sliding_window - 1, block_size)
        self.seen_generation = 0
        self.requests: dict[str, _Request] = {}
        # last block of a finished request -> what its conversation left behind before it
        self.conversations: OrderedDict[BlockHashWithGroupId, list[LeftBehind]] = OrderedDict()
        self.branch_ends: OrderedDict[BlockHashWithGroupId, None] = OrderedDict()

    def _of(self, request_id: str) -> _Request:
        return self.requests.setdefault(request_id, _Request())

    def _in_tail(self, index: int, end: int) -> bool:
        return end - self.tail_blocks <= index < end

    def _end(self, num_tokens: int) -> int:
        """The last boundary within ``num_tokens`` tokens."""
        return num_tokens // self.alignment * self.alignment // self.block_size

    # While a request runs

    def arrive(self, request_id: str, points: BranchPoints) -> None:
        """A new request: take the branching point that the search for it has noted, if any."""
        if points.generation != self.seen_generation:
            self.seen_generation = points.generation
            self._of(request_id).branch_end = points.boundary // self.block_size

    def hit(self, request_id: str, blocks: int, last: KVCacheBlock) -> None:
        """The request resumes after ``blocks`` blocks, of which ``last`` is the last."""
        request = self._of(request_id)
        request.hit_end = blocks
        if last.block_hash in self.branch_ends:
            request.shared_end = blocks
        elif last.block_hash is not None:
            request.earlier += self.conversations.pop(last.block_hash, [])

    def plan(self, request_id: str, num_tokens: int, *, plenty: bool) -> None:
        """A chunk to ``num_tokens`` is coming: store the tail of the boundary before its end."""
        # One less: a replay recomputes its last token.
        self._of(request_id).ahead_end = self._end(num_tokens - 1) if plenty else 0

    def scheduled(self, request_id: str, computed_tokens: int, num_tokens: int) -> None:
        """A step from ``computed_tokens`` to ``num_tokens`` was scheduled."""
        span = max(1, self.tail_blocks) * self.block_size
        if num_tokens - computed_tokens >= _CHUNK_TAIL_SHARE * span:
            self._of(request_id).chunk_ends.add(self._end(num_tokens))

    def prompt(self, request_id: str, num_prompt_tokens: int) -> None:
        """Keep the last boundary at which a replay of the prompt can resume."""
        self._of(request_id).prompt_end = self._end(num_prompt_tokens - 1)

    def advance(self, request_id: str, computed_tokens: int) -> set[int]:
        """The next turn would now resume later; returns ids of blocks whose hash can go."""
        request, end = self._of(request_id), self._end(computed_tokens)
        if end == request.latest_end:
            return set()
        request.latest_end = end
        passed = [b for b in request.latest if not self._in_tail(b.index, end)]
        request.latest = [b for b in request.latest if self._in_tail(b.index, end)]
        return {b.block.block_id for b in passed if b.idle}

    # What to keep

    def retains_ahead(self, request_id: str, index: int) -> bool:
        """Whether a block that leaves the window within its chunk is stored all the same."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        ends = (request.branch_end, request.ahead_end)
        return any(self._in_tail(index, end) for end in ends)

    def spares(self, request_id: str, index: int) -> bool:
        """Whether a block that a chunk could overwrite is part of a tail worth keeping: one that is
        stored, or one that the chunk completes. Such a block has no hash yet where the boundary
        lies within the chunk."""
        request = self.requests.get(request_id)
        if request is None:
            return False
        return self._in_tail(index, request.ahead_end) or self._kept(request, index)

    def wants(self, request_id: str, index: int, block: KVCacheBlock) -> bool:
        """Whether a hashed block belongs to a tail that is worth keeping."""
        request = self.requests.get(request_id)
        if request is None or block.block_hash is None:
            return False
        return self._kept(request, index)

    def _kept(self, request: _Request, index: int) -> bool:
        ends = {
            request.branch_end,
            request.shared_end,
            request.hit_end,
            request.prompt_end,
            request.latest_end,
            *request.chunk_ends,
        }
        return any(self._in_tail(index, end) for end in ends)

    def keeps(self, request_id: str, index: int, block: KVCacheBlock) -> bool:
        """Whether a block that left the window is returned with its hash."""
        if not self.wants(request_id, index, block):
            return False
        request, block_hash = self.requests[request_id], block.block_hash
        assert block_hash is not None
        left = LeftBehind(index, block, block_hash)
        if self._in_tail(index, request.branch_end):
            if index == request.branch_end - 1:
                _remember(self.branch_ends, block_hash, None)
        elif self._in_tail(index, request.shared_end):
            pass  # not this request's to drop
        elif self._in_tail(index, request.hit_end):
            request.earlier.append(left)
        elif any(self._in_tail(index, end) for end in (request.prompt_end, *request.chunk_ends)):
            request.own.append(left)
        else:
            request.latest.append(left)
        return True

    # When it ends

    def finish(self, request_id: str, num_tokens: int, held: list[KVCacheBlock]) -> set[int]:
        """The request ends with ``num_tokens`` tokens stored and ``held`` its blocks, by index.

        Returns the ids of blocks whose hash can go: what earlier turns left behind, but for what is
        part of this turn's prompt's tail.
        """
        request = self._of(request_id)
        gone = self.advance(request_id, num_tokens)
        last = self._hash_before(request, request.latest_end, held)
        if last is None:
            return gone
        kept = [b for b in request.earlier if self._in_tail(b.index, request.prompt_end)]
        _remember(self.conversations, last, request.own + kept)
        stays = {b.block.block_id for b in kept}
        return gone | ({b.block.block_id for b in request.earlier if b.idle} - stays)

    def _hash_before(
        self, request: _Request, end: int, held: list[KVCacheBlock]
    ) -> BlockHashWithGroupId | None:
        """The hash of the last block before a boundary, held still or left behind."""
        if 0 < end <= len(held) and held[end - 1].block_hash is not None:
            return held[end - 1].block_hash
        left: Iterable[LeftBehind] = (*request.latest, *request.own, *request.earlier)
        return next((b.block_hash for b in left if b.index == end - 1), None)

    def forget(self, request_id: str) -> None:
        self.requests.pop(request_id, None)


def _remember(
    memory: OrderedDict, key: BlockHashWithGroupId, value: list[LeftBehind] | None
) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > _REMEMBERED:
        memory.popitem(last=False)
