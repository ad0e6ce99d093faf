"""Bytes of KV cache per token and per request, on the GPU that holds most, against the teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_attnedit.accounting.layers import LayerKV, kv_layers
from vllm_attnedit.accounting.placement import check_tp, require_positive, stage_sizes
from vllm_attnedit.errors import AttnEditError

KV_DTYPE_BYTES = {"auto": 2, "bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}
"""Bytes an element. ``auto`` is vLLM's: the dtype served, which is 16 bits wide even where the
checkpoint is float32. ``fp8`` leaves out the scales (a handful of bytes a layer)."""


def kv_bytes_per_token(config: Any, *, kv_dtype: str = "auto", tp: int = 1, pp: int = 1) -> int:
    """Bytes that one more token costs a GPU, in the long-context limit.

    Window layers cost nothing there: they are full, and every new token replaces an old one.

    Args:
        config: of an edited model or a plain teacher.
        kv_dtype: a key of :data:`KV_DTYPE_BYTES`.
        tp: tensor-parallel GPUs; with 1 the result is the whole model's.
        pp: pipeline stages; the result is that of the stage which holds most.

    Raises:
        AttnEditError: for an unknown dtype, or a tp or pp that does not fit the model.
    """
    return _most_loaded_stage(
        config, kv_dtype, tp, pp, lambda layer: 0 if layer.window is not None else 1
    )


def kv_bytes_per_request(
    config: Any,
    length: int,
    *,
    kv_dtype: str = "auto",
    tp: int = 1,
    pp: int = 1,
    block_size: int | None = None,
) -> int:
    """Bytes that a request of ``length`` tokens (prompt and answer) holds on a GPU.

    Args:
        length: tokens, >= 1.
        block_size: tokens a block, >= 1, to count whole blocks as vLLM allocates them; ``None``
            counts exact tokens.

    The others, and what is raised, are those of :func:`kv_bytes_per_token`.
    """
    require_positive("length", length)
    if block_size is not None:
        require_positive("block_size", block_size)
    return _most_loaded_stage(
        config, kv_dtype, tp, pp, lambda layer: layer.tokens_held(length, block_size)
    )


def requests_that_fit(
    config: Any,
    length: int,
    memory: int,
    *,
    kv_dtype: str = "auto",
    tp: int = 1,
    pp: int = 1,
    block_size: int | None = 16,
) -> int:
    """How many requests of ``length`` tokens fit at once, all of them decoding.

    Args:
        memory: bytes on each GPU for the KV cache alone, without weights and activations.

    The others are those of :func:`kv_bytes_per_request`. vLLM may admit fewer: it also keeps room
    for the windows of a prompt that is being read.
    """
    if memory < 0:
        raise AttnEditError("memory", memory, "give a number of bytes >= 0")
    return memory // kv_bytes_per_request(
        config, length, kv_dtype=kv_dtype, tp=tp, pp=pp, block_size=block_size
    )


def kv_reduction(
    config: Any,
    teacher: Any = None,
    length: int | None = None,
    *,
    kv_dtype: str = "auto",
    tp: int = 1,
    pp: int = 1,
    block_size: int | None = None,
) -> float:
    """The share of the teacher's KV memory per GPU that is saved; negative if more is held.

    Args:
        teacher: a configuration; by default that of the model which ``config`` was edited from.
        length: tokens of a request; ``None`` compares bytes per token in the long-context limit.
        block_size: as in :func:`kv_bytes_per_request`; without effect where ``length`` is ``None``.
    """
    if teacher is None:
        teacher = config.teacher_config()

    def held(of: Any) -> int:
        if length is None:
            return kv_bytes_per_token(of, kv_dtype=kv_dtype, tp=tp, pp=pp)
        sizes: dict[str, Any] = {"tp": tp, "pp": pp, "block_size": block_size}
        return kv_bytes_per_request(of, length, kv_dtype=kv_dtype, **sizes)

    if held(teacher) == 0:
        fix = "give a length: this teacher has window layers only, whose limit is 0 bytes a token"
        raise AttnEditError("length", length, fix)
    return 1 - held(config) / held(teacher)


def _most_loaded_stage(
    config: Any, kv_dtype: str, tp: int, pp: int, tokens: Callable[[LayerKV], int]
) -> int:
    if kv_dtype not in KV_DTYPE_BYTES:
        raise AttnEditError("kv_dtype", kv_dtype, f"use one of {', '.join(KV_DTYPE_BYTES)}")
    check_tp(config, tp)
    layers = kv_layers(config)
    itemsize = KV_DTYPE_BYTES[kv_dtype]
    stages, start = [], 0
    for size in stage_sizes(len(layers), pp):
        stage = layers[start : start + size]
        stages.append(sum(layer.bytes_per_token(itemsize, tp) * tokens(layer) for layer in stage))
        start += size
    return max(stages)
