"""Runs teachers and edited models in float32 and compares what they predict."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def tokens(count: int, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 269, (batch, count), generator=generator)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    result: Tensor = model(ids).logits
    return result


@torch.no_grad()
def windowed_logits(teacher: Any, ids: Tensor, window: int, full_layers: Iterable[int]) -> Tensor:
    """The unedited teacher under hand-made masks: ``window`` keys a query but in full layers."""
    position = torch.arange(ids.shape[1])
    distance = position[:, None] - position[None]
    full = set(full_layers)

    def give_mask(mask: Tensor) -> Any:
        def hook(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {"attention_mask": mask[None, None].expand(len(ids), 1, -1, -1)}

        return hook

    handles = []
    for index, layer in enumerate(teacher.model.layers):
        seen = (distance >= 0) & (distance < (ids.shape[1] if index in full else window))
        handles.append(layer.self_attn.register_forward_pre_hook(give_mask(seen), with_kwargs=True))
    try:
        return logits(teacher, ids)
    finally:
        for handle in handles:
            handle.remove()


def divergence(teacher: Tensor, student: Tensor) -> float:
    """Mean KL(teacher || student) in nats a token."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
