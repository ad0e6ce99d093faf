"""Multi-head latent attention (MLA) in plain PyTorch: the reference of a latent layer.

The naive form: latents are expanded to keys and values. Served layers use the absorbed form, which
computes the same function (DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix).

Shapes: B batch, T query tokens, S keys, N heads, R kv_lora_rank, P qk_rope_head_dim,
C qk_nope_head_dim, V v_head_dim, E hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.hf.attention import EditedAttention, rms_norm


class LatentAttention(EditedAttention):
    """MLA with decoupled RoPE, an optional q LoRA and an optional sigmoid gate.

    ``c, k_pe = split(kv_a_proj_with_mqa(x))``; the cache holds ``kv_a_layernorm(c)`` (R wide) and
    ``rope(k_pe)`` (P wide), one of each a token for all heads. ``kv_b_proj`` expands the latent to
    every head's ``[k_nope | v]``. RoPE has the teacher's base and scaling at width P, in the
    half-rotation ("neox") layout. Where the teacher has q/k/v biases, ``q_proj`` (or ``q_a_proj``)
    and ``kv_a_proj_with_mqa`` carry one. A teacher's per-head QK-norm is replaced by the latent
    norm, or kept exactly with ``qk_norm`` "per_head": every head's whole query and key, C + P wide,
    is normed before rotation, and the latent is not. Then the cache holds the inverse root mean
    square of each head's key as well. See docs/method.md.
    """

    def __init__(self, config: AttnEditConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        edit = config.edit
        assert edit.kv_lora_rank and edit.qk_rope_head_dim  # the schema guarantees them
        assert edit.qk_nope_head_dim and edit.v_head_dim
        self.num_heads = config.num_attention_heads
        self.num_key_value_groups = 1  # after expansion every head has its own keys and values
        self.kv_lora_rank = edit.kv_lora_rank
        self.qk_nope_head_dim = edit.qk_nope_head_dim
        self.qk_rope_head_dim = edit.qk_rope_head_dim
        self.v_head_dim = edit.v_head_dim
        self.scaling = edit.qk_head_dim**-0.5
        self.has_q_lora = edit.q_lora_rank is not None

        hidden, bias = config.hidden_size, config.qkv_bias
        q_width = self.num_heads * edit.qk_head_dim
        if edit.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, q_width, bias=bias)
        else:
            self.q_a_proj = nn.Linear(hidden, edit.q_lora_rank, bias=bias)
            self.q_a_layernorm = rms_norm(config, edit.q_lora_rank)
            self.q_b_proj = nn.Linear(edit.q_lora_rank, q_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            hidden, self.kv_lora_rank + self.qk_rope_head_dim, bias=bias
        )
        self.per_head_norm = edit.per_head_norm
        if self.per_head_norm:
            self.q_norm = rms_norm(config, edit.qk_head_dim)
            self.k_norm = rms_norm(config, edit.qk_head_dim)
        else:
            self.kv_a_layernorm = rms_norm(config, self.kv_lora_rank)
        kv_width = self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, kv_width, bias=False)

    def _query(self, hidden_states: Tensor) -> Tensor:
        if self.has_q_lora:
            query: Tensor = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        else:
            query = self.q_proj(hidden_states)
        return query

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``hidden_states`` (B, T, E), normed; returns (B, T, E) and the weights if eager.

        ``position_embeddings`` are cos and sin of width P.
        """
        batch, tokens, _ = hidden_states.shape
        query = self._query(hidden_states).view(batch, tokens, self.num_heads, -1).transpose(1, 2)
        if self.per_head_norm:
            query = self.q_norm(query)
        q_nope, q_pe = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent, k_pe = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        k_pe = k_pe.unsqueeze(1)  # (B, 1, T, P)
        inverse: Tensor | None = None
        if self.per_head_norm:
            latent = latent.unsqueeze(1)
            inverse = self._inverse_rms(latent, k_pe)
            k_pe = k_pe * self._key_weight()[self.qk_nope_head_dim :]
        else:
            latent = self.kv_a_layernorm(latent).unsqueeze(1)  # (B, 1, T, R)
        q_pe, k_pe = self._apply_rope(q_pe, k_pe, *position_embeddings)

        if past_key_values is not None:
            # Cached in place of keys and values: one latent and one RoPE key a token, and with a
            # per-head norm the factor of every head behind the latter.
            beside = k_pe if inverse is None else torch.cat([k_pe, inverse], dim=-1)
            # A static cache has one dtype for both.
            latent_dtype = latent.dtype
            latent, beside = past_key_values.update(latent.to(beside.dtype), beside, self.layer_idx)
            latent = latent.to(latent_dtype)
            k_pe = beside[..., : self.qk_rope_head_dim]
            if inverse is not None:
                inverse = beside[..., self.qk_rope_head_dim :]
        k_nope, value = self._expand(latent)
        if inverse is not None:
            k_nope = k_nope * self._key_weight()[: self.qk_nope_head_dim]
        key = torch.cat([k_nope, k_pe.expand(-1, self.num_heads, -1, -1)], dim=-1)
        if inverse is not None:  # (B, 1, S, N)
            key = (key * inverse.transpose(1, 3)).to(value.dtype)
        query = torch.cat([q_nope, q_pe], dim=-1)
        return self.attend(hidden_states, query, key, value, attention_mask, **kwargs)

    def _key_weight(self) -> Tensor:
        weight = self.k_norm.weight
        assert isinstance(weight, Tensor)
        return weight

    def _expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, S, R) to unrotated keys (B, N, S, C) and values (B, N, S, V)."""
        expanded = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.num_heads, -1))
        k_nope, value = expanded.transpose(1, 2).split(
            [self.qk_nope_head_dim, self.v_head_dim], dim=-1
        )
        return k_nope, value

    def _inverse_rms(self, latent: Tensor, k_pe: Tensor) -> Tensor:
        """Of each head's key ``[k_nope | k_pe]`` before rotation: (B, 1, T, N), float32."""
        k_nope, _ = self._expand(latent)
        square = k_nope.float().square().sum(-1) + k_pe.float().square().sum(-1)  # (B, N, T)
        mean = square / (self.qk_nope_head_dim + self.qk_rope_head_dim)
        inverse = (mean + self.config.rms_norm_eps).rsqrt()
        return inverse.transpose(1, 2).unsqueeze(1)
