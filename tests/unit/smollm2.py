"""Configurations at SmolLM2-135M's dimensions, no weights."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.edit.patterns import EditPlan, build_edit

SMOLLM2: dict[str, Any] = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_size": 576,
}


def teacher_config(dims: dict[str, Any]) -> Any:
    return CONFIG_MAPPING["llama"](**dims)


def config_of(target: str = "gateswa", **dims: Any) -> AttnEditConfig:
    dims = {**SMOLLM2, **dims}
    return AttnEditConfig(
        "llama", build_edit(EditPlan(target=target), teacher_config(dims)), **dims
    )
