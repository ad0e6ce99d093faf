"""A gauge of the blocks that window layers really hold, for ``attnedit kv --server``.

vLLM's statistics carry no counts per group from the engine's process to the API server's. What
reaches the server's ``/metrics`` from other processes is prometheus_client's multiprocess mode,
which vLLM turns on for several API servers and an operator by setting ``PROMETHEUS_MULTIPROC_DIR``
to an empty folder. Only then is there a gauge; it is set about once a second.
"""

from __future__ import annotations

import os
import time
from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import Gauge

from vllm_attnedit.kv_server import WINDOW_BLOCKS

if TYPE_CHECKING:
    from vllm_attnedit.kv_cache.release import ReleasingWindowManager

PERIOD_S = 1.0


@cache
def _gauge() -> Gauge:
    """One for all groups of the process; engines of one server are summed up."""
    return Gauge(
        WINDOW_BLOCKS,
        "KV blocks that running requests hold in a group of window layers.",
        ("group", "block_size", "heads"),
        multiprocess_mode="livesum",
    )


class BlockGauge:
    """Counts one manager's blocks, seldom enough to cost nothing."""

    def __init__(self, manager: ReleasingWindowManager) -> None:
        spec = manager.kv_cache_spec
        self.manager = manager
        self.due = 0.0
        self.child = _gauge().labels(
            str(manager.kv_cache_group_id), str(spec.block_size), str(spec.num_kv_heads)
        )
        self.child.set(0)

    def update(self) -> None:
        """Set the gauge if it is due, or if the last request is gone and no step follows."""
        now = time.monotonic()
        if now >= self.due or not self.manager.req_to_blocks:
            self.due = now + PERIOD_S
            self.child.set(count_blocks(self.manager))


def count_blocks(manager: ReleasingWindowManager) -> int:
    """Blocks that requests hold here; one that several share counts once, as in vLLM's usage."""
    return len(
        {
            block.block_id
            for request, blocks in manager.req_to_blocks.items()
            for block in blocks[manager.null_below.get(request, 0) :]
            if not block.is_null
        }
    )


def block_gauge(manager: ReleasingWindowManager) -> BlockGauge | None:
    """The manager's gauge, or ``None`` where no other process could read it."""
    return BlockGauge(manager) if os.environ.get("PROMETHEUS_MULTIPROC_DIR") else None
