"""vLLM's FA3-MLA backend in the pages it was measured with."""

from __future__ import annotations

from vllm.v1.attention.backends.mla.flashattn_mla import FlashAttnMLABackend


class LatentFA3Backend(FlashAttnMLABackend):
    """Pages of 64 tokens unless the user names a size: a tile of FA3 then lies in one page."""

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return 64
