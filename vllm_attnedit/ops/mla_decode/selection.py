"""Which latent decode kernel to prefer where: a measured table, not a guess."""

from __future__ import annotations

#: (compute capability major, heads at most, kernel), first match wins, for latents of 512 + 64 in
#: bfloat16 or float16. From ``benchmarks/results/kernels_h200.json``: FlashMLA leads the Triton
#: kernel on Hopper by a tenth to a quarter, and FA3 leads both at small batches; no other device
#: was measured, so that elsewhere the Triton kernel of this package is the answer.
_MEASURED: tuple[tuple[int, int, int, str], ...] = (
    (9, 128, 32, "fa3"),
    (9, 128, 1 << 30, "flashmla"),
)

_MEASURED_LATENT = (512, 64)


def preferred_kernel(
    *,
    capability_major: int,
    num_heads: int,
    num_requests: int,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
) -> str:
    """``"flashmla"``, ``"fa3"`` or ``"triton"``.

    Args:
        capability_major: major compute capability of the device, 9 for Hopper.
        num_heads: query heads of this rank.
        num_requests: of the batch; the bound that a graph was captured for will do.
        kv_lora_rank: width of the latent.
        qk_rope_head_dim: width of the RoPE key.

    Returns:
        The fastest measured; ``"triton"``, which takes every shape, where nothing was measured.
        Callers fall back to it when the other library is missing.
    """
    if (kv_lora_rank, qk_rope_head_dim) == _MEASURED_LATENT:
        for major, heads, requests, kernel in _MEASURED:
            if capability_major == major and num_heads <= heads and num_requests <= requests:
                return kernel
    return "triton"
