"""Latent attention (MLA) as a vLLM layer.

The cache holds one latent and one RoPE key a token, shared by all heads. Folding the key half of
``kv_b_proj`` into the query turns MLA into attention with a single KV head of width R + P whose
value is the first R elements of its key; the value half is applied to the result. Same function as
the naive form of :class:`vllm_attnedit.hf.LatentAttention`. Backends decode in this form, vLLM's
and this project's alike, and expand latents where a prompt makes that cheaper.

Shapes: T tokens of the batch, N heads of this rank, R kv_lora_rank, P qk_rope_head_dim,
C qk_nope_head_dim, V v_head_dim, E hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.attention.attention import unified_attention_with_output
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.kv_cache_interface import KVCacheSpec, MLAAttentionSpec

from vllm_attnedit.config import AttentionEdit, AttnEditConfig
from vllm_attnedit.layers.gated import gate_projection
from vllm_attnedit.layers.latent_backend import latent_backend
from vllm_attnedit.layers.latent_projection import LatentUpProjection
from vllm_attnedit.layers.merged_inputs import merge_inputs
from vllm_attnedit.ops.sigmoid_gate.reference import gated


class LatentCacheAttention(Attention):
    """Attention over cached latents by one of this project's backends.

    Args:
        up: ``kv_b_proj``, which the backend applies; it stays a module of the enclosing layer.
    """

    def __init__(self, *arguments: Any, up: LatentUpProjection, **options: Any) -> None:
        super().__init__(*arguments, num_kv_heads=1, **options)
        self._up = [up]  # in a list: not a second time among the model's parameters

    @property
    def up(self) -> LatentUpProjection:
        return self._up[0]

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.head_size,
            dtype=self.kv_cache_torch_dtype,
            cache_dtype_str=vllm_config.cache_config.cache_dtype,
        )

    def attend(self, query: Tensor, key: Tensor) -> Tensor:
        """``query`` (T, N, C + P) to the cache and ``key`` (T, R + P); returns (T, N, V)."""
        output = query.new_empty(query.shape[0], self.num_heads, self.head_size_v)
        key = key.unsqueeze(1)
        if self.use_direct_call:
            unified_attention_with_output(query, key, key, output, self.layer_name)
        else:
            name = _encode_layer_name(self.layer_name)
            torch.ops.vllm.unified_attention_with_output(query, key, key, output, name)
        return output


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
        self.v_head_dim = edit.v_head_dim
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
        self.per_head_norm, self.eps = edit.per_head_norm, config.rms_norm_eps
        if self.per_head_norm:
            self.q_norm = RMSNorm(edit.qk_head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(edit.qk_head_dim, eps=config.rms_norm_eps)
        else:
            self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, eps=config.rms_norm_eps)
        self.o_proj = RowParallelLinear(
            total_heads * edit.v_head_dim,
            hidden,
            bias=config.o_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.g_proj = gate_projection(config, prefix)
        query = self.q_a_proj if self.has_q_lora else self.q_proj
        self.inputs = merge_inputs(vllm_config, [query, self.kv_a_proj_with_mqa, self.g_proj])
        self.rotary_emb = get_rope(
            self.qk_rope_head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
        self._build_attention(vllm_config, edit, f"{prefix}.attn")

    def _build_attention(self, vllm_config: VllmConfig, edit: AttentionEdit, prefix: str) -> None:
        """``attn`` and ``kv_b_proj``, which it applies."""
        assert edit.qk_nope_head_dim and edit.v_head_dim
        scale = edit.qk_head_dim**-0.5
        backend = latent_backend(vllm_config, edit, self.num_heads)
        shared: dict[str, Any] = {
            "cache_config": vllm_config.cache_config,
            "quant_config": vllm_config.quant_config,
            "prefix": prefix,
            "attn_backend": backend,
        }
        self.kv_b_proj = LatentUpProjection(
            self.kv_lora_rank, self.num_heads, edit.qk_nope_head_dim, edit.v_head_dim
        )
        self.attn: LatentCacheAttention | MLAAttention
        if backend.is_mla():
            self.attn = MLAAttention(
                self.num_heads,
                scale,
                edit.qk_nope_head_dim,
                self.qk_rope_head_dim,
                edit.v_head_dim,
                edit.q_lora_rank,
                self.kv_lora_rank,
                self.kv_b_proj,
                **shared,
            )
            return
        width = self.kv_lora_rank + self.qk_rope_head_dim
        if self.per_head_norm:
            width += self.num_heads * (torch.float32.itemsize // torch.get_default_dtype().itemsize)
        self.attn = LatentCacheAttention(
            self.num_heads,
            width,
            scale,
            up=self.kv_b_proj,
            head_size_v=edit.v_head_dim,
            kv_lora_rank=self.kv_lora_rank,
            qk_rope_head_dim=self.qk_rope_head_dim,
            **shared,
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """``positions`` (T,), ``hidden_states`` (T, E), normed; returns (T, E)."""
        query, kv_a, gate = self._project(hidden_states)
        if self.has_q_lora:
            query, _ = self.q_b_proj(self.q_a_layernorm(query.contiguous()))
        query = query.unflatten(-1, (self.num_heads, -1))
        if self.per_head_norm:
            query = self.q_norm(query.contiguous())
        q_nope, q_pe = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent, k_pe = kv_a.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        inverse: Tensor | None = None
        if self.per_head_norm:
            # The weight of the shared part goes into the cache, that of the rest into the query.
            inverse = self._inverse_rms(latent, k_pe)
            q_nope = q_nope * self.k_norm.weight[: self.qk_nope_head_dim]
            k_pe = k_pe * self.k_norm.weight[self.qk_nope_head_dim :]
        else:
            latent = self.kv_a_layernorm(latent.contiguous())
        q_pe, k_pe = self.rotary_emb(positions, q_pe.flatten(-2), k_pe.contiguous())
        query = torch.cat([q_nope, q_pe.unflatten(-1, (self.num_heads, -1))], dim=-1)
        output = self._attend(query, latent, k_pe, inverse)  # (T, N, V)
        if gate is not None:
            output = gated(output, gate)
        output, _ = self.o_proj(output.flatten(-2))
        return output

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(T, E) to the query or its latent, ``[latent | k_pe]``, and the gate."""
        if self.inputs is not None:
            query, kv_a, *gates = self.inputs(hidden_states)
            return query, kv_a, gates[0] if gates else None
        query, _ = self.q_a_proj(hidden_states) if self.has_q_lora else self.q_proj(hidden_states)
        kv_a, _ = self.kv_a_proj_with_mqa(hidden_states)
        return query, kv_a, None if self.g_proj is None else self.g_proj(hidden_states)[0]

    def _inverse_rms(self, latent: Tensor, k_pe: Tensor) -> Tensor:
        """Of each head's key ``[k_nope | k_pe]`` before rotation: (T, N), float32."""
        k_nope = self.kv_b_proj.expand_key(latent).float()
        square = k_nope.square().sum(-1) + k_pe.float().square().sum(-1, keepdim=True)
        mean = square / (self.qk_nope_head_dim + self.qk_rope_head_dim)
        return (mean + self.eps).rsqrt()

    def _attend(
        self, query: Tensor, latent: Tensor, k_pe: Tensor, inverse: Tensor | None
    ) -> Tensor:
        """(T, N, C + P) to (T, R) and (T, P), keys' factors (T, N); (T, N, V)."""
        if isinstance(self.attn, LatentCacheAttention):
            key = [latent, k_pe]
            if inverse is not None:  # its bits: float32 in the cache whatever the dtype
                key.append(inverse.view(latent.dtype))
            return self.attn.attend(query, torch.cat(key, dim=-1))
        shape = torch.Size((query.shape[0], self.num_heads * self.v_head_dim))
        output = self.attn(query, latent, k_pe.unsqueeze(1), output_shape=shape)
        return output.unflatten(-1, (self.num_heads, -1))
