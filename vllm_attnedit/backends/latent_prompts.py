"""Prompts of latent attention: they attend over keys and values expanded from latents, their own
first and then, part by part, those of their cached context.

Shapes: T prompt tokens, S key tokens, N heads, R kv_lora_rank, P qk_rope_head_dim,
C qk_nope_head_dim, V v_head_dim, L elements of a cache entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_attnedit.backends.latent_cache import key_factors
from vllm_attnedit.backends.latent_steps import ContextPart


@dataclass(frozen=True)
class PromptAttention:
    """Attention of one layer's prompts.

    Attributes:
        operator: attends over expanded keys and values, as
            :func:`~vllm_attnedit.ops.mla_prefill.mla_prefill` does.
        up: the two halves of ``kv_b_proj``.
        rank: R.
        rope: P.
        scale: factor of the scores.
    """

    operator: Callable[..., Tensor]
    up: Any
    rank: int
    rope: int
    scale: float

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        starts: Tensor,
        context: Sequence[ContextPart],
        read: Callable[[Tensor], Tensor],
        output: Tensor,
    ) -> None:
        """Attend to the prompts themselves and to what they have in the cache.

        Args:
            query: ``(T, N, C + P)``, the last P rotated.
            key: ``(T, L)``, the entries of the prompts' own tokens.
            starts: ``(prompts + 1,)`` int32, the first token of each prompt.
            context: the cached contexts, in parts.
            read: a part's slots ``(S,)`` to its entries ``(S, L)``, in the query's dtype.
            output: ``(T, N, V)``, filled in place.
        """
        if not context:
            self._expanded(query, key, starts, starts, output, causal=True)
            return
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        part_lse, part = torch.empty_like(lse), torch.empty_like(output)
        self._expanded(query, key, starts, starts, output, causal=True, lse=lse)
        merged = output.float()
        for piece in context:
            entries = read(piece.slots)
            key_starts = piece.key_start_loc
            self._expanded(query, entries, starts, key_starts, part, causal=False, lse=part_lse)
            total = torch.logaddexp(lse, part_lse)
            merged *= (lse - total).exp_()[..., None]
            merged += part * (part_lse - total).exp_()[..., None]
            lse = total
        output.copy_(merged)

    def _expanded(
        self,
        query: Tensor,
        key: Tensor,
        query_starts: Tensor,
        key_starts: Tensor,
        out: Tensor,
        *,
        causal: bool,
        lse: Tensor | None = None,
    ) -> None:
        """Attention of (T, N, C + P) to the keys and values of (S, L)."""
        q_nope, q_rope = query.split([query.shape[2] - self.rope, self.rope], dim=-1)
        width = self.rank + self.rope
        latent, k_rope = key[:, : self.rank], key[:, self.rank : width]
        k_nope, value = self.up.expand(latent)
        self.operator(
            q_nope,
            q_rope,
            k_nope,
            k_rope,
            value,
            query_starts,
            key_starts,
            scale=self.scale,
            causal=causal,
            out=out,
            lse=lse,
            key_scale=key_factors(key, width),
        )
