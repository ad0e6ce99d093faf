"""What a GateSWA window layer tells vLLM about its KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_attnedit.kv_cache.manager import GateSWAManager


def blocks_per_request(sliding_window: int, block_size: int, num_speculative_tokens: int) -> int:
    """The most blocks a request holds in one window group, whatever the chunk size.

    The ``W - 1`` tokens before the next query span at most ``ceil((W - 1) / B) + 1`` blocks; one
    more is the partly filled block that a chunk completes. Draft tokens that may be rejected widen
    the window behind and need slots ahead.
    """
    span = sliding_window - 1 + 2 * num_speculative_tokens
    return cdiv(span, block_size) + 2


@dataclass(frozen=True, kw_only=True)
class GateSWASpec(SlidingWindowSpec):
    """A window layer whose blocks cover the window and nothing else, also during prefill.

    Attributes:
        num_speculative_tokens: draft tokens a step may append and lose again.
        stored_tail: the last tokens of a chunk that all layers have keys and values of; ``None``:
            all of them.
    """

    num_speculative_tokens: int = 0
    stored_tail: int | None = None

    def max_admission_blocks_per_request(
        self, max_num_batched_tokens: int, max_model_len: int
    ) -> int:
        """The bound that start-up sizing, the reported concurrency and admission all use.

        Independent of ``max_num_batched_tokens``: a chunk's tokens that leave the window by its
        end are never stored.
        """
        window = blocks_per_request(
            self.sliding_window, self.block_size, self.num_speculative_tokens
        )
        return min(window, cdiv(max_model_len, self.block_size) + 1)


def register_spec() -> None:
    """Tell vLLM which manager serves the spec. Idempotent.

    vLLM registers its own specs on first use and takes a filled registry for a complete one, so
    they must come first.
    """
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(
        GateSWASpec, manager_class=GateSWAManager, uniform_type_base_spec=GateSWASpec
    )
