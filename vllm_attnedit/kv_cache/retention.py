"""Which window blocks are worth keeping for prefix caching.

A prefix can be resumed at a boundary only if the window's tail before it is still stored. vLLM
keeps every block, so that any boundary works, and fills its cache with blocks nobody resumes at.
Here a request leaves behind

* its last tail, held when it finishes: the next turn of a conversation resumes there;
* the tail of its prompt, for a replay of it or another answer to it;
* the tail at the end of each large chunk, a boundary that costs little of what it covers;
* the tail at a *branching point*: where full-attention layers had a longer hit than window layers,
  a prefix is shared by requests that differ afterwards (a system prompt, a document). The first two
  requests find it out, the later ones resume there.

When a conversation moves on, what its earlier turns left behind goes; a branching point's tail
stays. Losing any of these costs a hit, never a wrong result.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock

# A chunk's tail is kept if it is at most this share of the chunk.
_CHUNK_TAIL_SHARE = 4
_REMEMBERED = 65_536  # conversations and branching points, each a few words of host memory


class BranchPoints:
    """Hands a branching point from the search for a hit to the allocation that follows it.

    vLLM searches as a class method that knows no request, right before it allocates for the same
    one. If that order ever changed, a tail would be kept in the wrong place: a hit may be missed.
    """

    def __init__(self) -> None:
        self.generation = 0
        self.boundary = 0

    def note(self, hit_tokens: int, max_tokens: int) -> None:
        """A search found ``hit_tokens`` where other groups can resume at ``max_tokens``."""
        self.generation += 1
        self.boundary = max_tokens if hit_tokens < max_tokens else 0


_BRANCH_POINTS: WeakKeyDictionary[BlockPool, BranchPoints] = WeakKeyDictionary()


def branch_points(pool: BlockPool) -> BranchPoints:
    """The one exchange of a block pool."""
    return _BRANCH_POINTS.setdefault(pool, BranchPoints())


@dataclass(frozen=True)
class LeftBehind:
    """A block that a request returned with its hash."""

    index: int
    block: KVCacheBlock
    block_hash: BlockHashWithGroupId


@dataclass
class _Request:
    """What is kept on behalf of one request. Ends are block indices, exclusive."""

    branch_end: int = 0
    shared_end: int = 0  # of a hit at a known branching point
    prompt_end: int = 0
    kept_ends: set[int] = field(default_factory=set)
    left_behind: list[LeftBehind] = field(default_factory=list)


class RetainedTails:
    """The bookkeeping of one window group."""

    def __init__(self, sliding_window: int, block_size: int) -> None:
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

    def arrive(self, request_id: str, points: BranchPoints) -> None:
        """A new request: take the branching point that the search for it has noted, if any."""
        if points.generation != self.seen_generation:
            self.seen_generation = points.generation
            self._of(request_id).branch_end = points.boundary // self.block_size

    def hit(self, request_id: str, blocks: int, last: KVCacheBlock) -> None:
        """The request resumes after ``blocks`` blocks, of which ``last`` is the last."""
        request = self._of(request_id)
        request.kept_ends.add(blocks)
        if last.block_hash in self.branch_ends:
            request.shared_end = blocks
        elif last.block_hash is not None:
            request.left_behind += self.conversations.pop(last.block_hash, [])

    def scheduled(self, request_id: str, computed_tokens: int, num_tokens: int) -> None:
        """A step from ``computed_tokens`` to ``num_tokens`` was scheduled."""
        span = max(1, self.tail_blocks) * self.block_size
        if num_tokens - computed_tokens >= _CHUNK_TAIL_SHARE * span:
            self._of(request_id).kept_ends.add(num_tokens // self.block_size)

    def prompt(self, request_id: str, num_prompt_tokens: int, alignment: int) -> None:
        """Keep the last boundary at which a replay of the prompt can resume."""
        latest = (num_prompt_tokens - 1) // alignment * alignment
        request = self._of(request_id)
        request.prompt_end = latest // self.block_size
        request.kept_ends.add(request.prompt_end)

    def retains_ahead(self, request_id: str, index: int) -> bool:
        """Whether a block that leaves the window within its chunk is stored all the same."""
        request = self.requests.get(request_id)
        return request is not None and self._in_tail(index, request.branch_end)

    def wants(self, request_id: str, index: int, block: KVCacheBlock) -> bool:
        """Whether a hashed block belongs to a tail that is worth keeping."""
        request = self.requests.get(request_id)
        if request is None or block.block_hash is None:
            return False
        ends = {request.branch_end, request.shared_end, *request.kept_ends}
        return any(self._in_tail(index, end) for end in ends)

    def keeps(self, request_id: str, index: int, block: KVCacheBlock) -> bool:
        """Whether a block that left the window is returned with its hash."""
        request = self.requests.get(request_id)
        if request is None or block.block_hash is None:
            return False
        if self._in_tail(index, request.branch_end):
            if index == request.branch_end - 1:
                self._remember(self.branch_ends, block.block_hash, None)
            return True
        if self._in_tail(index, request.shared_end):
            return True
        if self.wants(request_id, index, block):
            request.left_behind.append(LeftBehind(index, block, block.block_hash))
            return True
        return False

    def finish(self, request_id: str, last: KVCacheBlock | None) -> set[int]:
        """The request ends, ``last`` being the last hashed block it holds.

        Returns the ids of blocks whose hash can go: left behind by the conversation, and not by
        this turn's prompt.
        """
        request = self.requests.get(request_id)
        if request is None or last is None or last.block_hash is None:
            return set()
        current = [b for b in request.left_behind if self._in_tail(b.index, request.prompt_end)]
        self._remember(self.conversations, last.block_hash, current)
        keep = {b.block.block_id for b in current}
        return {
            b.block.block_id
            for b in request.left_behind
            # Reused or hit since, it is no longer this conversation's to drop.
            if b.block.block_hash == b.block_hash and b.block.ref_cnt == 0
        } - keep

    @staticmethod
    def _remember(
        memory: OrderedDict, key: BlockHashWithGroupId, value: list[LeftBehind] | None
    ) -> None:
        memory[key] = value
        memory.move_to_end(key)
        if len(memory) > _REMEMBERED:
            memory.popitem(last=False)

    def forget(self, request_id: str) -> None:
        self.requests.pop(request_id, None)
