"""Tiny edited models with random weights, in memory or as a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.unit.tiny import randomise, tiny_config, tiny_edit, tiny_tokenizer
from vllm_attnedit.config import AttentionEdit, AttnEditConfig
from vllm_attnedit.hf import AttnEditForCausalLM


def tiny_edited(
    family: str, edit: AttentionEdit | None = None, *, seed: int = 0, **overrides: Any
) -> AttnEditForCausalLM:
    """A random edited model of ``family`` in float32 and evaluation mode."""
    fields = tiny_config(family, **overrides).to_dict() | {"dtype": torch.float32}
    config = AttnEditConfig(base_model_type=family, attention_edit=edit or tiny_edit(), **fields)
    model = AttnEditForCausalLM(config)
    randomise(model, torch.Generator().manual_seed(seed))
    return model.float().eval()


def tiny_edited_checkpoint(model: AttnEditForCausalLM, folder: Path) -> Path:
    """Write ``model`` with a tokenizer; returns the folder."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
