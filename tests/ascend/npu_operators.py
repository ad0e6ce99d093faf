"""What NPU operators compute, in plain torch, as the CPU kernels of torch_npu's own schemas.

So vllm-ascend's backend classes run on a CPU, and a call that the schema does not take fails as it
would on the device. Contracts that the schema cannot express are asserted. Formulas follow CANN's
documentation of each operator.

Shapes: T tokens, R requests, N query heads, K KV heads, D head width, B block size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_npu  # noqa: F401  (defines the schemas)
from torch import Tensor

#: Side of the compressed causal mask that sparse modes 2 to 4 take.
MASK = 2048
UNBOUNDED = 2147483647
#: Registrations last as long as these live.
_LIBRARIES: list[torch.library.Library] = []
_SEEN_MASKS: list[Tensor] = []


def register(namespace: str, name: str, kernel: Callable[..., Any]) -> None:
    """Make ``kernel`` the CPU kernel of an operator that torch_npu defines."""
    library = torch.library.Library(namespace, "IMPL")
    library.impl(name, kernel, "CPU")
    _LIBRARIES.append(library)


def check_mask(mask: Tensor | None) -> None:
    """The compressed mask of sparse modes 2 to 4: ones above the diagonal. Read once each."""
    assert mask is not None and tuple(mask.shape) == (MASK, MASK)
    assert mask.dtype in (torch.int8, torch.uint8, torch.bool)
    if not any(mask is seen for seen in _SEEN_MASKS):
        assert mask.equal(torch.ones(MASK, MASK).triu(1).to(mask.dtype))
        _SEEN_MASKS.append(mask)


def visible(queries: int, keys: int, mode: int, before: int, after: int) -> Tensor:
    """``(queries, keys)``: which keys a query sees. The last query stands at the last key.

    Mode 0 sees all, 3 is causal, 4 is a band of ``before`` keys before the query's own to
    ``after`` behind it: ``before + after + 1`` in all.
    """
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    if mode == 3:
        return distance >= 0
    if mode == 4:
        return (distance <= before) & (distance >= -after)
    return torch.ones_like(distance, dtype=torch.bool)


def attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``(t, N, D)`` queries to ``(s, K, D)`` keys under the mask ``(t, s)``.

    Returns the output and the logarithm ``(t, N)`` of the softmax's sum.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(group, 1) for x in (key, value))
    scores = torch.einsum("tnd,snd->nts", query.float(), key) * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    if sink is not None:
        column = sink.float()[:, None, None].expand(-1, query.shape[0], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    output = torch.einsum("nts,snd->tnd", weights, value).to(query.dtype)
    return output, scores.logsumexp(-1).T


def fused_infer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = UNBOUNDED,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    block_size: int = 0,
    learnable_sink: Tensor | None = None,
    softmax_lse_flag: bool = False,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """``npu_fused_infer_attention_score`` with the TND layout."""
    assert input_layout == "TND", input_layout
    assert actual_seq_lengths is not None and actual_seq_lengths_kv is not None
    kv_heads = num_key_value_heads or num_heads
    assert query.dim() == 3 and query.shape[1] == num_heads and num_heads % kv_heads == 0
    assert query.shape[2] in (64, 128, 192)
    assert query.shape[2] != 64 or kv_heads == num_heads
    assert list(actual_seq_lengths) == sorted(actual_seq_lengths), "query lengths are cumulative"
    assert query.shape[0] == actual_seq_lengths[-1], "every query token belongs to a request"
    assert len(actual_seq_lengths) == len(actual_seq_lengths_kv)
    if sparse_mode in (2, 3, 4):
        check_mask(atten_mask)
    if block_table is not None:
        assert block_table.dtype == torch.int32 and block_size % 16 == 0
        assert block_table.shape[0] == len(actual_seq_lengths)
        assert key.dim() == 3 and key.shape[1] == block_size  # (blocks, B, K * D)
    else:
        assert list(actual_seq_lengths_kv) == sorted(actual_seq_lengths_kv), "cumulative unpaged"
        assert key.shape[0] == value.shape[0] == actual_seq_lengths_kv[-1]
    if query_rope is not None and key_rope is not None:
        query, key = torch.cat([query, query_rope], -1), torch.cat([key, key_rope], -1)
    out = query.new_empty(
        *query.shape[:2], value.shape[-1] if block_table is None else query.shape[2]
    )
    lse = query.new_empty(*query.shape[:2], dtype=torch.float32)
    begin = key_begin = 0
    for request, (end, length) in enumerate(zip(actual_seq_lengths, actual_seq_lengths_kv)):
        if block_table is not None:
            blocks = block_table[request, : -(-length // block_size)].long()
            keys, values = (
                x[blocks].flatten(0, 1)[:length].unflatten(-1, (kv_heads, -1)) for x in (key, value)
            )
        else:
            keys, values = key[key_begin:length], value[key_begin:length]
            key_begin = length
        seen = visible(end - begin, len(keys), sparse_mode, pre_tokens, next_tokens)
        out[begin:end], lse[begin:end] = attend(
            query[begin:end], keys, values, seen, scale, learnable_sink
        )
        begin = end
    return out, lse.unsqueeze(-1)


def write_pages(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor
) -> None:
    """``_npu_reshape_and_cache``: one slot, ``block * B + offset``, a token."""
    assert slot_indices.dtype == torch.int32 and len(slot_indices) == len(key) == len(value)
    assert int(slot_indices.min()) >= 0
    for cache, new in ((key_cache, key), (value_cache, value)):
        cache.flatten(0, 1)[slot_indices.long()] = new


def install() -> None:
    """Register all, and vLLM's attention operator, which has no CPU kernel on an NPU's platform."""
    from vllm.model_executor.layers.attention.attention import unified_attention_with_output

    register("npu", "npu_fused_infer_attention_score", fused_infer_attention)
    register("atb", "_npu_reshape_and_cache", write_pages)
    register("vllm", "unified_attention_with_output", unified_attention_with_output)
