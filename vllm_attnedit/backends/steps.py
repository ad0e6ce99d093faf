"""What the block manager and every window backend must agree on about a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata


def decode_query_len(vllm_config: VllmConfig) -> int:
    """The most tokens a request may have in a step for that step to be a decode; more is a chunk.

    One, and the drafts that it may carry.
    """
    speculative = vllm_config.speculative_config
    return 1 + (speculative.num_speculative_tokens if speculative is not None else 0)


@dataclass(frozen=True)
class Step:
    """What a step's metadata was built from, to build it again for a part of its tokens.

    Attributes:
        common: what vLLM says of the step.
        page_size: tokens of a block.
        again: metadata of another step, by the same builder.
    """

    common: CommonAttentionMetadata
    page_size: int
    again: Callable[[CommonAttentionMetadata], Any]


class ChunkRequest(NamedTuple):
    """One request of a step with any chunk, and what of its past the step reads.

    Attributes:
        begin: its first new token, among the step's.
        end: after its last one.
        tail: the first position of its cached tail, the keys that its first new token may see.
        computed: after the last one: tokens it had before the step.
    """

    begin: int
    end: int
    tail: int
    computed: int


def chunk_requests(
    query_ends: Sequence[int], seq_lens: Sequence[int], sliding_window: int
) -> list[ChunkRequest]:
    """The requests of a step, in its order.

    Args:
        query_ends: new tokens up to each request's end.
        seq_lens: tokens a request, the new ones included. A padding request may have more new
            tokens than that; it has no past.
        sliding_window: keys a token sees, its own included.
    """
    requests = []
    for (begin, end), length in zip(pairwise((0, *query_ends)), seq_lens, strict=True):
        computed = max(0, length - (end - begin))
        tail = max(0, computed - sliding_window + 1)
        requests.append(ChunkRequest(begin, end, tail, computed))
    return requests
