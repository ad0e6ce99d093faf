"""What each attention layer caches, in elements and tokens.

A full layer caches ``2 x num_key_value_heads x head_dim`` elements for every token. A window layer
caches as much, for the last ``sliding_window`` tokens of a request only. A latent layer caches
``kv_lora_rank + qk_rope_head_dim`` elements for every token, once for all its heads, and with
per-head norms one float32 a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_attnedit.families import get_family


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


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
