"""Gated softmax attention in plain PyTorch: the reference of a GateSWA layer, full or windowed.

Shapes: B batch, T query tokens, S keys, N query heads, K key/value heads, D head width, E hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_attnedit.config import SLIDING, AttnEditConfig
from vllm_attnedit.ops.sigmoid_gate.reference import gated


def family_module(config: AttnEditConfig) -> ModuleType:
    """The transformers module that holds the teacher's layers, norms and rotary embedding."""
    return import_module(config.family.modeling_module)


def rms_norm(config: AttnEditConfig, width: int) -> nn.Module:
    """The teacher's RMSNorm over the last ``width`` elements."""
    cls = getattr(family_module(config), f"{config.family.class_prefix}RMSNorm")
    norm: nn.Module = cls(width, eps=config.rms_norm_eps)
    return norm


def attention_function(
    config: AttnEditConfig, eager: Callable[..., Any]
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """transformers' implementation that ``attn_implementation`` names (sdpa, ...), or ``eager``."""
    function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        config._attn_implementation, eager
    )
    return function


class EditedAttention(nn.Module):
    """What every edited attention layer shares: softmax attention, gate and output projection.

    The gate is the "G1" position of Qwen's "Gated Attention for Large Language Models" (arXiv
    2505.06708): a sigmoid on the attention output before ``o_proj``, from the same normed input as
    the query.
    """

    num_key_value_groups: int
    scaling: float
    sliding_window: int | None = None

    def __init__(self, config: AttnEditConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        # heads x value width is the teacher's in both targets: o_proj is inherited.
        width = config.num_attention_heads * config.head_dim
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.o_bias)
        self.g_proj = (
            nn.Linear(config.hidden_size, config.gate_size, bias=False)
            if config.gate_size
            else None
        )
        # Looked up once: an import while the model runs would break torch.compile's graph.
        self._apply_rope = family_module(config).apply_rotary_pos_emb
        self._eager = family_module(config).eager_attention_forward

    def attend(
        self,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of query (B, N, T, D) to key and value (B, K, S, .), gated and projected.

        Returns (B, T, E), and the attention weights (B, N, T, S) from the eager implementation.
        """
        attn, weights = attention_function(self.config, self._eager)(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )  # (B, T, N, D)
        if self.g_proj is not None:
            attn = gated(attn, self.g_proj(hidden_states))
        return self.o_proj(attn.flatten(2)), weights


class GatedAttention(EditedAttention):
    """The teacher's attention with an optional window and an optional sigmoid gate.

    ``o_proj(sigmoid(g_proj(x)) * softmax_W(rope(q) rope(k)^T / sqrt(D)) v)``: a query sees the last
    ``sliding_window`` keys, its own included. Parameter names are the teacher's, plus ``g_proj``.
    """

    def __init__(self, config: AttnEditConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        window = config.edit.layer_types[layer_idx] == SLIDING
        self.sliding_window = config.sliding_window if window else None

        q_width = config.num_attention_heads * self.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        qk_norm = config.family.qk_norm
        self.q_norm = rms_norm(config, self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = rms_norm(config, self.head_dim) if qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``hidden_states`` (B, T, E), normed; returns (B, T, E) and the weights if eager."""
        batch, tokens, _ = hidden_states.shape
        heads = (batch, tokens, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)  # (B, N, T, D)
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)  # (B, K, T, D)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = self._apply_rope(query, key, *position_embeddings)

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
            if self.sliding_window is not None and past_key_values.is_sliding[self.layer_idx]:
                # It may keep more than a window of 1 needs; masks are sized for W - 1 + T. Other
                # caches keep everything, and so do the masks.
                visible = self.sliding_window - 1 + tokens
                key, value = key[:, :, -visible:], value[:, :, -visible:]
        return self.attend(hidden_states, query, key, value, attention_mask, **kwargs)
