"""Names and shapes: what a teacher checkpoint must hold, and what an edited layer holds instead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.edit.store import WEIGHT_DTYPES, TensorInfo
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.tensors import Shape, attention_tensors, expected_tensors

__all__ = [
    "Shape",
    "attention_prefix",
    "check_tensors",
    "edited_attention",
    "is_attention",
    "teacher_tensors",
    "unedited",
]

# Buffers that old versions of transformers stored; they follow from the configuration.
_OBSOLETE = re.compile(r"rotary_emb\.inv_freq$")


def attention_prefix(layer: int) -> str:
    """Where a layer's attention tensors live."""
    return f"model.layers.{layer}.self_attn."


def is_attention(name: str) -> bool:
    """Whether a tensor belongs to some layer's attention."""
    return ".self_attn." in name


def unedited(config: Any) -> AttnEditConfig:
    """A teacher's configuration as that of an edited model without edits: the same tensors."""
    values = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    return AttnEditConfig(base_model_type=config.model_type, **values)


def teacher_tensors(config: Any) -> dict[str, Shape]:
    """Every tensor of a teacher with this configuration."""
    return expected_tensors(unedited(config))


def edited_attention(config: AttnEditConfig, layer: int) -> dict[str, Shape]:
    """The attention tensors of an edited layer, by their full names."""
    prefix = attention_prefix(layer)
    return {prefix + name: shape for name, shape in attention_tensors(config, layer).items()}


def check_tensors(
    found: Mapping[str, TensorInfo], expected: Mapping[str, Shape], where: str
) -> None:
    """Refuse a checkpoint with missing, misshapen, unexpected or quantised tensors.

    Args:
        found: what the checkpoint holds.
        expected: what its configuration implies.
        where: the checkpoint, as messages name it.

    Raises:
        AttnEditError: naming the first offending tensor.
    """
    for name, shape in expected.items():
        info = found.get(name)
        if info is None:
            raise AttnEditError(
                name, f"missing from {where}", "download the checkpoint again, it is incomplete"
            )
        if info.shape != shape:
            fix = f"config.json asks for {list(shape)}: use a checkpoint that fits its config.json"
            raise AttnEditError(name, list(info.shape), fix)
        if info.dtype not in WEIGHT_DTYPES:
            raise AttnEditError(name, info.dtype, "use the unquantised checkpoint")
    for name in found:
        # With tied embeddings some checkpoints store the head as well; it is the embedding.
        if name not in expected and not _OBSOLETE.search(name) and name != "lm_head.weight":
            fix = "use a checkpoint of the plain architecture, which has no such tensor"
            raise AttnEditError(name, f"unexpected in {where}", fix)
