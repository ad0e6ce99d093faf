"""KV-cache memory by formula: per token, per request and per GPU, against the teacher.

Needs a configuration only: no torch, no weights, no device. ``config`` is an ``AttnEditConfig`` or
a plain teacher's transformers configuration (of a supported family). Memory is in bytes.

A full layer caches ``2 x num_key_value_heads x head_dim`` elements for every token. A window layer
caches as much, for the last ``sliding_window`` tokens of a request only. A latent layer caches
``kv_lora_rank + qk_rope_head_dim`` elements for every token, once for all its heads, and with
per-head norms one float32 a head.

Under tensor parallelism KV heads are sharded, at least one to a GPU, while a latent has no heads
to shard and stands whole on every GPU. So MLA, which caches less in total, can hold *more* per GPU
than full attention: compare at the ``tp`` of the deployment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.families import get_family

KV_DTYPE_BYTES = {"auto": 2, "bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}
"""Bytes an element. ``auto`` is vLLM's: the dtype served, which is 16 bits wide even where the
checkpoint is float32. ``fp8`` leaves out the scales (a handful of bytes a layer)."""


@dataclass(frozen=True)
class LayerKV:
    """What one attention layer caches.

    Attributes:
        layer_type: ``full_attention``, ``sliding_attention`` or ``latent_attention``.
        width: elements a token and head: key and value together, or latent and RoPE key.
        heads: KV heads to shard over tensor-parallel ranks; ``None`` for a latent, which is
            replicated.
        window: most tokens a request ever needs to hold here; ``None`` without a bound.
        factors: float32 factors a token, one a query head and sharded, beside a latent whose keys
            keep their per-head norm.
    """

    layer_type: str
    width: int
    heads: int | None
    window: int | None = None
    factors: int = 0

    def bytes_per_token(self, itemsize: int, tp: int = 1) -> int:
        """Bytes a cached token takes on one of ``tp`` GPUs (which must fit ``heads``).

        ``itemsize`` is that of an element, in bytes.
        """
        heads = 1 if self.heads is None else max(1, self.heads // tp)
        return self.width * heads * itemsize + 4 * self.factors // tp

    def tokens_held(self, length: int, block_size: int | None = None) -> int:
        """Tokens held for a request that has reached ``length`` tokens.

        ``block_size`` (tokens) rounds up to whole blocks. A window of W keys then takes at most
        ``ceil((W - 1) / B) + 1`` blocks while decoding: the W - 1 earlier keys may begin anywhere
        in a block. A long prompt's prefill may hold more for the time it lasts.
        """
        if block_size is None:
            return length if self.window is None else min(length, self.window)
        blocks = _ceil_div(length, block_size)
        if self.window is not None:
            blocks = min(blocks, _ceil_div(self.window - 1, block_size) + 1)
        return blocks * block_size


def kv_layers(config: Any) -> tuple[LayerKV, ...]:
    """What each layer of ``config`` caches, first layer first.

    Raises:
        AttnEditError: if ``config`` is of a family that is not supported.
    """
    edit: Any = getattr(config, "attention_edit", None)
    get_family(config.model_type if edit is None else config.base_model_type, "model_type")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    if edit is not None:
        types = edit["layer_types"]
    else:
        types = (
            getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        )

    def layer(layer_type: str) -> LayerKV:
        if layer_type == "latent_attention":
            width = edit["kv_lora_rank"] + edit["qk_rope_head_dim"]
            factors = heads if edit.get("qk_norm") else 0
            return LayerKV(layer_type, width, heads=None, factors=factors)
        sliding = layer_type == "sliding_attention" and window is not None
        return LayerKV(
            "sliding_attention" if sliding else "full_attention",
            2 * head_dim,
            kv_heads,
            window if sliding else None,
        )

    return tuple(layer(layer_type) for layer_type in types)


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
    _require_positive("length", length)
    if block_size is not None:
        _require_positive("block_size", block_size)
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


def padding_layers(config: Any) -> int:
    """Empty layers that vLLM adds to a hybrid model, each as large as a real one.

    vLLM 0.23 splits the layers of each type into groups of equal size: that of the rarer type, or
    of the more frequent one if the two differ by less than half. A type whose count is no multiple
    of the size is padded. The other functions here leave padding out.
    """
    types = [layer.layer_type for layer in kv_layers(config)]
    counts = [types.count(layer_type) for layer_type in set(types)]
    size = group_size(counts)
    return sum(-count % size for count in counts)


def group_size(counts: Sequence[int]) -> int:
    """Layers of a KV cache group where there are ``counts`` of each type; see
    :func:`padding_layers`."""
    return max(counts) if max(counts) < 1.5 * min(counts) else min(counts)


def stage_sizes(num_layers: int, pp: int) -> list[int]:
    """Layers of each pipeline stage by vLLM's default: equal, what is left over going one each to
    the stages from the last but one backwards (``VLLM_PP_LAYER_PARTITION`` overrides it there)."""
    _require_positive("pp", pp)
    if pp > num_layers:
        raise AttnEditError("pp", pp, f"use at most {num_layers}, the number of layers")
    size, left = divmod(num_layers, pp)
    return [size + (1 <= pp - 1 - stage <= left) for stage in range(pp)]


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


def check_tp(config: Any, tp: int) -> None:
    """Refuse a number of tensor-parallel GPUs that ``config``'s heads cannot be sharded over.

    Raises:
        AttnEditError: if so.
    """
    _require_positive("tp", tp)
    heads = config.num_attention_heads
    if heads % tp:
        raise AttnEditError("tp", tp, f"use a divisor of num_attention_heads, {heads}")
    for kv_heads in {layer.heads for layer in kv_layers(config) if layer.heads is not None}:
        if kv_heads % tp and tp % kv_heads:
            raise AttnEditError(
                "tp", tp, f"use a divisor or a multiple of num_key_value_heads, {kv_heads}"
            )


def _require_positive(field: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AttnEditError(field, value, "give an integer >= 1")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
