"""Latent attention (MLA) as a vLLM layer, in its absorbed form.

The cache holds one latent and one RoPE key a token, shared by all heads. Folding the key half of
``kv_b_proj`` into the query turns MLA into attention with a single KV head of width R + P whose
value is the first R elements of its key; the value half is applied to the result. Same function as
the naive form of :class:`vllm_attnedit.hf.LatentAttention`, without expanding any cached token.

Shapes: T tokens of the batch, N heads of this rank, R kv_lora_rank, P qk_rope_head_dim,
C qk_nope_head_dim, V v_head_dim, E hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.utils import set_weight_attrs
from vllm.v1.kv_cache_interface import KVCacheSpec, MLAAttentionSpec

from vllm_attnedit.backends.latent_torch import LatentTorchBackend
from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.layers.gated import gate_projection
from vllm_attnedit.ops.sigmoid_gate.reference import gated


class LatentUpProjection(nn.Module):
    """``kv_b_proj`` in the two products of the absorbed form. Sharded by head, never quantised.

    A bare parameter rather than a vLLM linear layer: the CPU platform repacks and empties a linear
    layer's weight after loading, and both products need a view of it.
    """

    def __init__(self, rank: int, num_heads: int, nope_dim: int, value_dim: int) -> None:
        super().__init__()
        self.num_heads, self.nope_dim = num_heads, nope_dim
        self.weight = nn.Parameter(
            torch.empty(num_heads * (nope_dim + value_dim), rank), requires_grad=False
        )
        set_weight_attrs(self.weight, {"weight_loader": self._load})

    def _load(self, param: nn.Parameter, loaded: Tensor) -> None:
        rows = param.shape[0]
        start = get_tensor_model_parallel_rank() * rows
        param.data.copy_(loaded[start : start + rows])

    def absorb_query(self, q_nope: Tensor) -> Tensor:
        """(T, N, C) to the latent space: (T, N, R)."""
        w_uk = self.weight.unflatten(0, (self.num_heads, -1))[:, : self.nope_dim]  # (N, C, R)
        return torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)

    def expand_value(self, latent: Tensor) -> Tensor:
        """(T, N, R) from the latent space: (T, N, V)."""
        w_uv = self.weight.unflatten(0, (self.num_heads, -1))[:, self.nope_dim :]  # (N, V, R)
        return torch.bmm(latent.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)


class LatentCacheAttention(Attention):
    """Attention over cached latents: one KV head whose value is the head of its key."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.head_size,
            dtype=self.kv_cache_torch_dtype,
            cache_dtype_str=vllm_config.cache_config.cache_dtype,
        )


class LatentAttention(nn.Module):
    """One MLA layer."""

    def __init__(self, vllm_config: VllmConfig, layer_idx: int, prefix: str) -> None:
        super().__init__()
        config: AttnEditConfig = vllm_config.model_config.hf_text_config
        quant_config = vllm_config.quant_config
        edit, hidden, bias = config.edit, config.hidden_size, config.qkv_bias
        assert edit.kv_lora_rank and edit.qk_rope_head_dim  # the schema guarantees them
        assert edit.qk_nope_head_dim and edit.v_head_dim
        total_heads = config.num_attention_heads
        self.num_heads = total_heads // get_tensor_model_parallel_world_size()
        self.kv_lora_rank = edit.kv_lora_rank
        self.qk_nope_head_dim = edit.qk_nope_head_dim
        self.qk_rope_head_dim = edit.qk_rope_head_dim
        self.has_q_lora = edit.q_lora_rank is not None

        q_width = total_heads * edit.qk_head_dim
        if edit.q_lora_rank is None:
            self.q_proj = ColumnParallelLinear(
                hidden, q_width, bias=bias, quant_config=quant_config, prefix=f"{prefix}.q_proj"
            )
        else:
            self.q_a_proj = ReplicatedLinear(
                hidden,
                edit.q_lora_rank,
                bias=bias,
                quant_config=quant_config,
                prefix=f"{prefix}.q_a_proj",
            )
            self.q_a_layernorm = RMSNorm(edit.q_lora_rank, eps=config.rms_norm_eps)
            self.q_b_proj = ColumnParallelLinear(
                edit.q_lora_rank,
                q_width,
                bias=False,
                quant_config=quant_config,
                prefix=f"{prefix}.q_b_proj",
            )
        self.kv_a_proj_with_mqa = ReplicatedLinear(
            hidden,
            self.kv_lora_rank + self.qk_rope_head_dim,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.kv_a_proj_with_mqa",
        )
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, eps=config.rms_norm_eps)
        self.kv_b_proj = LatentUpProjection(
            self.kv_lora_rank, self.num_heads, edit.qk_nope_head_dim, edit.v_head_dim
        )
        self.o_proj = RowParallelLinear(
            total_heads * edit.v_head_dim,
            hidden,
            bias=config.o_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.g_proj = gate_projection(config, prefix)
        self.rotary_emb = get_rope(
            self.qk_rope_head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
        self.attn = LatentCacheAttention(
            self.num_heads,
            self.kv_lora_rank + self.qk_rope_head_dim,
            edit.qk_head_dim**-0.5,
            num_kv_heads=1,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            attn_backend=LatentTorchBackend,
            head_size_v=self.kv_lora_rank,
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """``positions`` (T,), ``hidden_states`` (T, E), normed; returns (T, E)."""
        if self.has_q_lora:
            q_a, _ = self.q_a_proj(hidden_states)
            query, _ = self.q_b_proj(self.q_a_layernorm(q_a))
        else:
            query, _ = self.q_proj(hidden_states)
        q_nope, q_pe = query.unflatten(-1, (self.num_heads, -1)).split(
            [self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1
        )
        kv_a, _ = self.kv_a_proj_with_mqa(hidden_states)
        latent, k_pe = kv_a.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent.contiguous())
        q_pe, k_pe = self.rotary_emb(positions, q_pe.flatten(-2), k_pe.contiguous())

        query = torch.cat(
            [self.kv_b_proj.absorb_query(q_nope), q_pe.unflatten(-1, (self.num_heads, -1))], dim=-1
        )  # (T, N, R + P)
        key = torch.cat([latent, k_pe], dim=-1)  # (T, R + P)
        attn = self.attn(query, key, latent).unflatten(-1, (self.num_heads, -1))  # (T, N, R)
        output = self.kv_b_proj.expand_value(attn)  # (T, N, V)
        if self.g_proj is not None:
            gate, _ = self.g_proj(hidden_states)
            output = gated(output, gate)
        output, _ = self.o_proj(output.flatten(-2))
        return output
