"""Which latent decode kernel to prefer where: a measured table, not a guess."""

from __future__ import annotations

#: (major compute capability, requests at most, kernel), first match wins, for latents of 512 + 64.
#: From ``benchmarks/results/kernels_h200.json``: on an H200 with 32 heads, FA3 is the fastest up to
#: 64 requests and FlashMLA at 128; the Triton kernel of this package takes a fifth to a quarter
#: more time than the better of the two. Other head counts take the same row, as the nearest
#: measured; on devices that were not measured the Triton kernel is the answer.
_MEASURED: tuple[tuple[int, int, str], ...] = (
    (9, 64, "fa3"),
    (9, 1 << 30, "flashmla"),
)

_MEASURED_LATENT = (512, 64)


def preferred_kernel(
    *,
    capability_major: int,
    num_requests: int,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
) -> str:
    """``"flashmla"``, ``"fa3"`` or ``"triton"``.

    Args:
        capability_major: major compute capability of the device, 9 for Hopper.
        num_requests: of the batch; the bound that a graph was captured for will do.
        kv_lora_rank: width of the latent.
        qk_rope_head_dim: width of the RoPE key.

    Returns:
        The fastest measured; ``"triton"``, which takes every shape, where nothing was measured.
        Callers fall back to it when the other library is missing.
    """
    if (kv_lora_rank, qk_rope_head_dim) == _MEASURED_LATENT:
        for major, requests, kernel in _MEASURED:
            if capability_major == major and num_requests <= requests:
                return kernel
    return "triton"


#: What FlashMLA and FA3 lose where the other is faster, at worst: a third of the time at one
#: request for FlashMLA, 0.02 at 128 for FA3 (same file).
_STEADY = {9: "fa3"}


def engine_kernel(*, capability_major: int, kv_lora_rank: int, qk_rope_head_dim: int) -> str:
    """The kernel for an engine, which keeps one for all its batches: that which loses least.

    Args and result are those of :func:`preferred_kernel`.
    """
    if (kv_lora_rank, qk_rope_head_dim) == _MEASURED_LATENT:
        return _STEADY.get(capability_major, "triton")
    return "triton"
