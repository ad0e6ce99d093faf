"""GateSWA attention as a vLLM layer: the teacher's attention, windowed and gated.

Shapes: T tokens of the batch, N query heads and K KV heads of this rank, D head width, E hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.v1.attention.backend import AttentionBackend

from vllm_attnedit.backends.prologue import Prologue, can_rotate
from vllm_attnedit.config import SLIDING, AttnEditConfig
from vllm_attnedit.layers.fast_prefill import fast_prefill, tokens_stored
from vllm_attnedit.layers.packing import find_pack
from vllm_attnedit.layers.window import WindowAttention, window_backend
from vllm_attnedit.ops.sigmoid_gate.reference import gated


def gate_projection(config: AttnEditConfig, prefix: str) -> ColumnParallelLinear | None:
    """``g_proj``, sharded by head. Never quantised: it is small, and a head-wise gate's rows are
    too few for group scales."""
    if config.gate_size == 0:
        return None
    return ColumnParallelLinear(
        config.hidden_size,
        config.gate_size,
        bias=False,
        quant_config=None,
        prefix=f"{prefix}.g_proj",
    )


class GatedAttention(nn.Module):
    """One GateSWA layer, full or windowed; held to :class:`vllm_attnedit.hf.GatedAttention`."""

    def __init__(self, vllm_config: VllmConfig, layer_idx: int, prefix: str) -> None:
        super().__init__()
        config: AttnEditConfig = vllm_config.model_config.hf_text_config
        quant_config = vllm_config.quant_config
        tp_size = get_tensor_model_parallel_world_size()
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads // tp_size
        # With fewer KV heads than ranks, each rank holds a copy of one.
        self.num_kv_heads = max(1, config.num_key_value_heads // tp_size)
        self.q_size = self.num_heads * self.head_dim
        self.kv_size = self.num_kv_heads * self.head_dim

        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=config.o_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.g_proj = gate_projection(config, prefix)
        self.has_qk_norm = config.family.qk_norm
        if self.has_qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
        self.attn = self._attention(vllm_config, layer_idx, f"{prefix}.attn")

    def _attention(self, vllm_config: VllmConfig, layer_idx: int, prefix: str) -> Attention:
        """Full layers, and window layers without a backend of their own, take what vLLM selects."""
        config: AttnEditConfig = vllm_config.model_config.hf_text_config
        arguments = (self.num_heads, self.head_dim, self.head_dim**-0.5)
        options: dict[str, Any] = {
            "num_kv_heads": self.num_kv_heads,
            "cache_config": vllm_config.cache_config,
            "quant_config": vllm_config.quant_config,
            "prefix": prefix,
        }
        types = config.edit.layer_types
        if types[layer_idx] != SLIDING:
            return Attention(*arguments, **options)
        options["per_layer_sliding_window"] = config.sliding_window
        backend = window_backend(vllm_config)
        if backend is None:
            return Attention(*arguments, **options)
        assert config.sliding_window  # the schema guarantees it
        stored = tokens_stored(config.sliding_window) if fast_prefill(vllm_config) else None
        return WindowAttention(
            *arguments,
            layer_idx=layer_idx,
            pack=find_pack(vllm_config, types, layer_idx),
            prologue=self._prologue(backend),
            stored_tail=stored,
            attn_backend=backend,
            **options,
        )

    def _prologue(self, backend: type[AttentionBackend]) -> Prologue | None:
        """Norm and rotation, where the backend does them along with its write."""
        if not getattr(backend, "takes_prologue", False) or not can_rotate(self.rotary_emb):
            return None
        if self.has_qk_norm:
            return Prologue(self.rotary_emb, self.q_norm, self.k_norm)
        return Prologue(self.rotary_emb)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """``positions`` (T,), ``hidden_states`` (T, E), normed; returns (T, E)."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        gate = None if self.g_proj is None else self.g_proj(hidden_states)[0]
        if not isinstance(self.attn, WindowAttention) or self.attn.prologue is None:
            q, k = self._finish(positions, q, k)
        if isinstance(self.attn, WindowAttention):
            attn = self.attn.forward_gated(q, k, v, gate)
        else:
            attn = self.attn(q, k, v)
            if gate is not None:
                attn = gated(attn.unflatten(-1, (self.num_heads, -1)), gate).flatten(1)
        output, _ = self.o_proj(attn)
        return output

    def _finish(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Norm each head's queries and keys, and rotate them."""
        if self.has_qk_norm:
            q = self.q_norm(q.reshape(-1, self.num_heads, self.head_dim)).flatten(-2)
            k = self.k_norm(k.reshape(-1, self.num_kv_heads, self.head_dim)).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        return q, k
