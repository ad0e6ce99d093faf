"""What differs between the teacher families this project edits. A table, and nothing heavier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_attnedit.errors import AttnEditError


@dataclass(frozen=True)
class Family:
    """The traits of one ``model_type`` that an edited attention layer must honour."""

    model_type: str
    class_prefix: str
    """How transformers spells the family's classes: ``<prefix>DecoderLayer``, ..."""
    qk_norm: bool = False
    """RMSNorm over each query and key head, before RoPE."""
    always_qkv_bias: bool = False
    """Qwen2 has q/k/v biases (never an o bias) without a config field that says so."""
    moe: bool = False
    """Some or all MLPs are mixtures of experts."""

    def qkv_bias(self, config: Any) -> bool:
        """Whether q, k and v projections carry a bias in a model with this ``config``."""
        return self.always_qkv_bias or bool(getattr(config, "attention_bias", False))

    def o_bias(self, config: Any) -> bool:
        """Whether the output projection carries a bias in a model with this ``config``."""
        return not self.always_qkv_bias and bool(getattr(config, "attention_bias", False))

    @property
    def modeling_module(self) -> str:
        return f"transformers.models.{self.model_type}.modeling_{self.model_type}"


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama"),
        Family("qwen2", "Qwen2", always_qkv_bias=True),
        Family("qwen3", "Qwen3", qk_norm=True),
        Family("qwen3_moe", "Qwen3Moe", qk_norm=True, moe=True),
    )
}


def get_family(model_type: object, field: str = "base_model_type") -> Family:
    """The family of a teacher's ``model_type``.

    Raises:
        AttnEditError: if the family is not supported.
    """
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(FAMILIES)
        raise AttnEditError(field, model_type, f"use a teacher of a supported family ({known})")
    return family
