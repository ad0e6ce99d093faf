"""QK-norm and RoPE left to the backend, which does them in one pass with the write of the pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding


@dataclass(frozen=True)
class Prologue:
    """The modules whose work it is. Held here, not registered: their parameters stay where they
    are, and what reloads or moves those is seen at the next call."""

    rotary_emb: RotaryEmbedding
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None

    def arguments(self) -> dict[str, Any]:
        """For :func:`vllm_attnedit.ops.kv_write.kv_write`, but for the positions."""
        arguments: dict[str, Any] = {
            "cos_sin_cache": self.rotary_emb.cos_sin_cache,
            "is_neox": self.rotary_emb.is_neox_style,
        }
        if self.q_norm is not None and self.k_norm is not None:
            arguments["q_weight"] = self.q_norm.weight
            arguments["k_weight"] = self.k_norm.weight
            arguments["eps"] = self.q_norm.variance_epsilon
        return arguments


def can_rotate(rotary_emb: nn.Module) -> bool:
    """Whether it is the plain rotation by a table, whatever formula filled the table."""
    return (
        isinstance(rotary_emb, RotaryEmbedding)
        and type(rotary_emb).forward_native is RotaryEmbedding.forward_native
        and rotary_emb.rotary_dim % 16 == 0
    )
