"""What the block manager and every window backend must agree on about a step."""

from __future__ import annotations

from vllm.config import VllmConfig


def decode_query_len(vllm_config: VllmConfig) -> int:
    """The most tokens a request may have in a step for that step to be a decode; more is a chunk.

    One, and the drafts that it may carry.
    """
    speculative = vllm_config.speculative_config
    return 1 + (speculative.num_speculative_tokens if speculative is not None else 0)
