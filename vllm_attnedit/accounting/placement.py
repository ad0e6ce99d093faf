"""How vLLM 0.23 lays layers out: over tensor-parallel GPUs, pipeline stages and cache groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_attnedit.accounting.layers import kv_layers
from vllm_attnedit.attention_edit import FULL, SLIDING
from vllm_attnedit.errors import AttnEditError


def check_tp(config: Any, tp: int) -> None:
    """Refuse a number of tensor-parallel GPUs that ``config``'s heads cannot be sharded over.

    Raises:
        AttnEditError: if so.
    """
    require_positive("tp", tp)
    heads = config.num_attention_heads
    if heads % tp:
        raise AttnEditError("tp", tp, f"use a divisor of num_attention_heads, {heads}")
    for kv_heads in {layer.heads for layer in kv_layers(config) if layer.heads is not None}:
        if kv_heads % tp and tp % kv_heads:
            raise AttnEditError(
                "tp", tp, f"use a divisor or a multiple of num_key_value_heads, {kv_heads}"
            )


def padding_layers(config: Any) -> int:
    """Empty layers that vLLM adds to a hybrid model, each as large as a real one.

    vLLM 0.23 splits the layers of each type into groups of equal size: that of the rarer type, or
    of the more frequent one if the two differ by less than half. A type whose count is no multiple
    of the size is padded. Every other count of this package leaves padding out.
    """
    types = [layer.layer_type for layer in kv_layers(config)]
    counts = [types.count(layer_type) for layer_type in set(types)]
    size = group_size(counts)
    return sum(-count % size for count in counts)


def group_size(counts: Sequence[int]) -> int:
    """Layers of a KV cache group where there are ``counts`` of each type; see
    :func:`padding_layers`."""
    return max(counts) if max(counts) < 1.5 * min(counts) else min(counts)


def pack_size(layer_types: Sequence[str], pp: int) -> int | str:
    """Window layers that share a page of KV cache where pages are packed, or why none can: as many
    as there are for each full layer."""
    windows, fulls = layer_types.count(SLIDING), layer_types.count(FULL)
    if pp > 1:
        return "pages would cross pipeline stages"
    if not fulls or windows % fulls:
        return f"{windows} window layers do not divide over {fulls} full ones"
    if windows == fulls:
        return "there is one window layer for each full one"
    return windows // fulls


def stage_sizes(num_layers: int, pp: int) -> list[int]:
    """Layers of each pipeline stage by vLLM's default: equal, what is left over going one each to
    the stages from the last but one backwards (``VLLM_PP_LAYER_PARTITION`` overrides it there)."""
    require_positive("pp", pp)
    if pp > num_layers:
        raise AttnEditError("pp", pp, f"use at most {num_layers}, the number of layers")
    size, left = divmod(num_layers, pp)
    return [size + (1 <= pp - 1 - stage <= left) for stage in range(pp)]


def require_positive(field: str, value: int) -> None:
    """Refuse a ``value`` that is no count, naming its ``field``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AttnEditError(field, value, "give an integer >= 1")
