"""What vLLM ships for the same work, called the way its backends call it.

Functions return a call for one input set, or raise :class:`Unavailable`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.timing import Call
from vllm_attnedit.ops.sigmoid_gate import sigmoid_gate

#: Upper bound on splits that vLLM gives FA3 under CUDA graphs.
FA3_SPLITS = 32
#: vLLM's Triton kernel: segments of its split form, and the grid below which it splits.
SEGMENTS, SPLIT_BELOW_GRID = 16, 128


class Unavailable(Exception):
    """A control cannot run here; the text says why."""


def available() -> None:
    """Raise :class:`Unavailable` without a vLLM that sees this GPU."""
    try:
        import vllm  # noqa: F401
        from vllm.platforms import current_platform
    except ImportError as error:
        raise Unavailable(f"no vLLM here: {error}") from error
    if not current_platform.is_cuda():
        raise Unavailable("vLLM has no CUDA platform here")


def fa3() -> Callable[..., Any]:
    """``flash_attn_varlen_func``, known to run version 3."""
    available()
    from vllm.vllm_flash_attn import flash_attn_varlen_func
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    if not is_fa_version_supported(3):
        raise Unavailable("FA3 runs on Hopper GPUs only")
    function: Callable[..., Any] = flash_attn_varlen_func
    return function


def gated(attend: Callable[[], Tensor], gate: Tensor | None) -> Call:
    """The gate as a kernel of its own, in place, after ``attend``."""
    if gate is None:
        return attend

    def call() -> Tensor:
        out = attend()
        return sigmoid_gate(out, gate, out)

    return call


def fa3_window(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    window: int,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    scheduled: bool,
) -> Callable[[], Tensor]:
    """FA3 over pages. ``scheduled``: with the metadata that vLLM computes once a step."""
    attend = fa3()
    out = torch.empty_like(q)
    options: dict[str, Any] = {}
    if scheduled:
        from vllm.vllm_flash_attn.flash_attn_interface import get_scheduler_metadata

        options["num_splits"] = FA3_SPLITS
        options["scheduler_metadata"] = get_scheduler_metadata(
            batch_size=seq_lens.shape[0],
            max_seqlen_q=max_query_len,
            max_seqlen_k=max_seq_len,
            num_heads_q=q.shape[1],
            num_heads_kv=key_cache.shape[2],
            headdim=q.shape[2],
            cache_seqlens=seq_lens,
            qkv_dtype=q.dtype,
            cu_seqlens_q=query_start_loc,
            page_size=key_cache.shape[1],
            causal=True,
            window_size=(window - 1, 0),
            num_splits=FA3_SPLITS,
        )

    def call() -> Tensor:
        attend(
            q,
            key_cache,
            value_cache,
            out=out,
            cu_seqlens_q=query_start_loc,
            max_seqlen_q=max_query_len,
            seqused_k=seq_lens,
            max_seqlen_k=max_seq_len,
            softmax_scale=scale,
            causal=True,
            window_size=[window - 1, 0],
            block_table=block_table,
            fa_version=3,
            **options,
        )
        return out

    return call


def fa3_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start_loc: Tensor,
    *,
    window: int | None,
    max_len: int,
    scale: float,
) -> Callable[[], Tensor]:
    """FA3 over dense keys and values of whole prompts."""
    attend = fa3()
    out = torch.empty((*q.shape[:2], v.shape[2]), dtype=q.dtype, device=q.device)

    def call() -> Tensor:
        attend(
            q,
            k,
            v,
            out=out,
            cu_seqlens_q=query_start_loc,
            cu_seqlens_k=query_start_loc,
            max_seqlen_q=max_len,
            max_seqlen_k=max_len,
            softmax_scale=scale,
            causal=True,
            window_size=[window - 1, 0] if window else None,
            fa_version=3,
        )
        return out

    return call


def triton_window(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    window: int,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
) -> Callable[[], Tensor]:
    """vLLM's unified Triton kernel over pages, with the buffers of its split form."""
    available()
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    out = torch.empty_like(q)
    _, heads, width = q.shape
    threshold = SPLIT_BELOW_GRID // key_cache.shape[2]

    def segments(*more: int) -> Tensor:
        return torch.empty((threshold, heads, SEGMENTS, *more), device=q.device)

    buffers = (segments(1 << (width - 1).bit_length()), segments(), segments())

    def call() -> Tensor:
        unified_attention(
            q=q,
            k=key_cache,
            v=value_cache,
            out=out,
            cu_seqlens_q=query_start_loc,
            max_seqlen_q=max_query_len,
            seqused_k=seq_lens,
            max_seqlen_k=max_seq_len,
            softmax_scale=scale,
            causal=True,
            window_size=(window - 1, 0),
            block_table=block_table,
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=threshold,
            num_par_softmax_segments=SEGMENTS,
            softmax_segm_output=buffers[0],
            softmax_segm_max=buffers[1],
            softmax_segm_expsum=buffers[2],
        )
        return out

    return call
