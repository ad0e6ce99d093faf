"""Paged window attention for one or a few query tokens a request, with the sigmoid gate applied.

Only the window is read. Shapes: T tokens, R requests, N query heads, K KV heads, D head width.
"""

from __future__ import annotations

from torch import Tensor

from vllm_attnedit.ops import checks
from vllm_attnedit.ops.dispatch import implementation

__all__ = ["gateswa_decode"]


def gateswa_decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    sliding_window: int,
    scale: float,
    max_query_len: int = 1,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Attend from the last tokens of each request to the window that ends at each of them.

    A token at position p sees positions ``p - sliding_window + 1`` to p: ``sliding_window`` keys,
    its own included, which must be in the cache already. Entries of ``block_table`` before the
    window are never used and may be null.

    Args:
        q: ``(T, N, D)`` bfloat16, float16 or float32; D a multiple of 16 up to 256.
        key_cache: ``(num_blocks, block_size, K, D)``, any strides but a contiguous last axis: half
            of vLLM's ``(2, num_blocks, ...)``, NHD or HND, or the heads of one layer in a packed
            page. Of q's dtype, float8_e4m3fn or float8_e5m2.
        value_cache: like ``key_cache``.
        block_table: ``(R, max_blocks)`` int32.
        seq_lens: ``(R,)`` int32, tokens a request, the queried ones included.
        query_start_loc: ``(R + 1,)`` int32. Requests may have no query; tokens from its last entry
            on are padding, whose output is not written.
        sliding_window: keys a token sees, at least 1.
        scale: factor of the scores before the softmax.
        max_query_len: upper bound on the query tokens of a request, known on the host.
        gate: logits, head-wise ``(T, N)`` or element-wise ``(T, N * D)``; None for no gate.
        out: ``(T, N, D)`` like q, written in place; None for a new one.
        k_scale: one float32, factor of the entries of an FP8 ``key_cache``.
        v_scale: likewise for ``value_cache``.
        workspace: float32 scratch for windows that several programs share (a small batch with a
            long window); None for a new one. Either way its size follows from the arguments'
            shapes, so that a CUDA graph can be captured.

    Returns:
        ``out``.

    Raises:
        AttnEditError: an argument that no kernel takes; names it, its value and what to pass.
    """
    checks.check_query(q)
    tokens, heads, width = q.shape
    checks.check_head_dim(width, "q.shape[2]")
    checks.check_window(sliding_window)
    checks.require(max_query_len >= 1, "max_query_len", max_query_len, "pass at least 1")
    num_kv_heads = key_cache.shape[2] if key_cache.dim() == 4 else 0
    checks.check_paged_cache(key_cache, value_cache, q, num_kv_heads)
    checks.check_groups(heads, num_kv_heads, "key_cache.shape[2]")
    checks.check_batch(block_table, seq_lens, query_start_loc, q)
    checks.check_gate(gate, q, width)
    checks.check_scale(k_scale, key_cache, "k_scale")
    checks.check_scale(v_scale, value_cache, "v_scale")
    out = checks.prepare_out(out, (tokens, heads, width), q)
    if tokens == 0:
        return out
    result: Tensor = implementation("gateswa_decode", q.device).gateswa_decode(
        q,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        query_start_loc,
        sliding_window=sliding_window,
        scale=scale,
        max_query_len=max_query_len,
        gate=gate,
        out=out,
        k_scale=k_scale,
        v_scale=v_scale,
        workspace=workspace,
    )
    return result
