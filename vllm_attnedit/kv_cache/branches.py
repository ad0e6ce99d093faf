"""Branching points: how the search for a prefix hit tells the allocation after it of one."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from vllm.v1.core.block_pool import BlockPool


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
