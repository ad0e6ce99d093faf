"""What vllm-ascend's MLA calls compute, in plain torch; see :mod:`tests.ascend.npu_operators`.

Shapes: T tokens, N heads, R = 512 latent width, P = 64 RoPE width, B block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.ascend.npu_operators import register

RANK, ROPE = 512, 64


def interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs ``(2 i, 2 i + 1)`` turn; the result has first halves first."""
    a, b = x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def norm_rope_cache(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
    **unused: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm the latent, rotate the key, write both into their pages."""
    assert kv.shape[-1] == RANK + ROPE and gamma.shape == (RANK,) and cache_mode == "PA"
    assert index.dtype == torch.int64 and cos.shape[-1] == ROPE
    wide = kv[..., :RANK].float()
    latent = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(kv.dtype)
    latent = latent * gamma
    rotated = interleave_rope(kv[..., RANK:], cos, sin)
    k_cache.view(-1, ROPE)[index] = rotated.reshape(-1, ROPE)
    ckv_cache.view(-1, RANK)[index] = latent.reshape(-1, RANK)
    return k_cache, ckv_cache, rotated, latent


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """``npu_fused_infer_attention_score_v2`` on pages of latents: ``(N, T, 1, R)``."""
    assert input_layout == "BNSD_NBSD" and sparse_mode == 0 and atten_mask is None
    assert num_query_heads in (1, 2, 4, 8, 16, 32, 64, 128) and num_key_value_heads == 1
    assert block_table is not None and block_table.dtype == torch.int32 and block_size == 128
    assert query_rope is not None and key_rope is not None and actual_seq_kvlen is not None
    assert query.shape[1:] == (num_query_heads, 1, RANK) and key is value
    assert query_rope.shape[1:] == (num_query_heads, 1, ROPE)
    out = query.new_empty(num_query_heads, query.shape[0], 1, RANK)
    for request, length in enumerate(actual_seq_kvlen):
        blocks = block_table[request].long()
        latent = key[blocks].reshape(-1, RANK)[:length].float()
        rope = key_rope[blocks].reshape(-1, ROPE)[:length].float()
        scores = query[request, :, 0].float() @ latent.T
        scores = scores + query_rope[request, :, 0].float() @ rope.T
        weights = (scores * softmax_scale).softmax(-1)
        out[:, request, 0] = (weights @ latent).to(out.dtype)
    return out, query.new_empty(0, dtype=torch.float32)


def load_pages(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    seq_starts: Tensor | None = None,
    cumsum: bool = False,
    key: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor]:
    """``npu_paged_cache_load``: each request's tokens from a start on, end to end."""
    assert seq_starts is not None and not cumsum
    at = 0
    for blocks, length, start in zip(block_table, context_lens.tolist(), seq_starts.tolist()):
        for target, cache in ((key, key_cache), (value, value_cache)):
            entries = cache[blocks.long()].flatten(0, 1)[start : start + length]
            target[at : at + length] = entries
        at += length
    return key, value


def merge(lse: Sequence[Tensor], outputs: Sequence[Tensor], kind: int) -> tuple[Tensor, Tensor]:
    """``npu_attention_update``: shares of one softmax, weighed by their sums."""
    assert kind == 0 and all(x.dtype == torch.float32 for x in (*lse, *outputs))
    weights = torch.stack(list(lse)).softmax(0).unsqueeze(-1)
    return (weights * torch.stack(list(outputs))).sum(0), torch.stack(list(lse)).logsumexp(0)


def transposed_product(a: Tensor, b: Tensor, *, perm_y: Sequence[int], **unused: Any) -> Tensor:
    """``npu_transpose_batchmatmul``."""
    return torch.bmm(a, b).permute(*perm_y).contiguous()


def install() -> None:
    """Register all, and the operators of vllm-ascend's own that an MLA layer goes through."""
    from vllm_ascend.ops.mla import mla_forward

    register("npu", "npu_interleave_rope", interleave_rope)
    register("npu", "npu_kv_rmsnorm_rope_cache", norm_rope_cache)
    register("npu", "npu_fused_infer_attention_score_v2", decode)
    register("npu", "npu_attention_update", merge)
    register("npu", "npu_transpose_batchmatmul", transposed_product)
    register("npu", "npu_format_cast", lambda x, *_, **__: x)
    register("atb", "npu_paged_cache_load.out", load_pages)
    register("vllm", "mla_forward", mla_forward)
    register("vllm", "maybe_all_gather_and_maybe_unpad", lambda x, *_: x)
