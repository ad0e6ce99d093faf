"""Latent attention on CPU."""

from __future__ import annotations

from vllm.v1.attention.backend import MultipleOf

from vllm_attnedit.backends.latent import LatentBackend


class LatentCPUBackend(LatentBackend):
    """Any block size."""

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return default_block_size
