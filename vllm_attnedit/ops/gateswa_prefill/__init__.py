"""Window attention over a dense chunk and the cached tail before it, with the sigmoid gate applied.

The chunk's keys and values come dense, so that those of its tokens that leave the window by the
chunk's end need never be written to the cache. Prompts, chunks and single tokens mix in one launch.
Shapes: T tokens, R requests, N query heads, K KV heads, D head width.
"""

from __future__ import annotations

from torch import Tensor

from vllm_attnedit.ops import checks
from vllm_attnedit.ops.dispatch import implementation

__all__ = ["gateswa_prefill"]


def gateswa_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    sliding_window: int,
    scale: float,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attend from each token of the chunks to the window that ends at it.

    A token at position p sees positions ``p - sliding_window + 1`` to p. Those in its request's
    chunk are read from ``k`` and ``v``, earlier ones from the cache: at most
    ``sliding_window - 1`` tokens before the chunk, which must be there. Whatever the cache holds
    for the chunk itself is not read.

    Args:
        q: ``(T, N, D)`` bfloat16, float16 or float32; D a multiple of 16 up to 256.
        k: ``(T, K, D)`` of q's dtype, normed and rotated.
        v: ``(T, K, D)`` of q's dtype.
        key_cache: ``(num_blocks, block_size, K, D)``, any strides but a contiguous last axis. Of
            q's dtype, float8_e4m3fn or float8_e5m2.
        value_cache: like ``key_cache``.
        block_table: ``(R, max_blocks)`` int32.
        seq_lens: ``(R,)`` int32, tokens a request, cached ones and the chunk's.
        query_start_loc: ``(R + 1,)`` int32, where each chunk starts in q. Chunks may be empty;
            tokens from its last entry on are padding, whose output is not written.
        sliding_window: keys a token sees, at least 1.
        scale: factor of the scores before the softmax.
        gate: logits, head-wise ``(T, N)`` or element-wise ``(T, N * D)``; None for no gate.
        out: ``(T, N, D)`` like q, written in place; None for a new one.
        k_scale: one float32, factor of the entries of an FP8 ``key_cache``; never of ``k``.
        v_scale: likewise for ``value_cache``.

    Returns:
        ``out``.

    Raises:
        AttnEditError: an argument that no kernel takes; names it, its value and what to pass.
    """
    checks.check_query(q)
    tokens, heads, width = q.shape
    checks.check_head_dim(width, "q.shape[2]")
    checks.check_window(sliding_window)
    num_kv_heads = k.shape[1] if k.dim() == 3 else 0
    checks.check_like(k, (tokens, num_kv_heads, width), q, "k")
    checks.check_like(v, (tokens, num_kv_heads, width), q, "v")
    checks.check_groups(heads, num_kv_heads, "k.shape[1]")
    checks.check_paged_cache(key_cache, value_cache, q, num_kv_heads)
    checks.check_batch(block_table, seq_lens, query_start_loc, q)
    checks.check_gate(gate, q, width)
    checks.check_scale(k_scale, key_cache, "k_scale")
    checks.check_scale(v_scale, value_cache, "v_scale")
    out = checks.prepare_out(out, (tokens, heads, width), q)
    if tokens == 0:
        return out
    result: Tensor = implementation("gateswa_prefill", q.device).gateswa_prefill(
        q,
        k,
        v,
        key_cache,
        value_cache,
        block_table,
        seq_lens,
        query_start_loc,
        sliding_window=sliding_window,
        scale=scale,
        gate=gate,
        out=out,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return result
