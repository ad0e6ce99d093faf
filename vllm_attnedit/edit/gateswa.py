"""Initial weights of a GateSWA layer.

``inherit`` starts as the teacher restricted to its windows. Queries, keys, values and norms are
copied. Gate weights of zero open every gate to sigmoid(0) = 1/2, so ``o_proj.weight`` is doubled:
by a power of two, which no binary float rounds. Its bias is not gated and stays.

``random`` draws the attention anew and inherits ``o_proj`` as it is (arXiv 2604.05688).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.edit.layout import Shape, attention_prefix
from vllm_attnedit.edit.store import TensorStore

OPEN_GATE_GAIN = 2.0


def draw(name: str, shape: Shape, std: float, seed: int) -> Tensor:
    """Normal noise that depends on the seed and the tensor's name alone, not on any order."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * std


def random_attention(
    store: TensorStore, config: AttnEditConfig, layer: int, shapes: dict[str, Shape], seed: int
) -> dict[str, Tensor]:
    """Random attention of any kind with the teacher's ``o_proj``: norms one, biases zero.

    Args:
        store: the teacher's tensors.
        config: of the edited model.
        layer: index.
        shapes: the layer's attention tensors by full name.
        seed: of the edit.
    """
    made: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        module = name.removeprefix(attention_prefix(layer)).split(".")[0]
        if module == "o_proj":
            made[name] = store.load(name)
        elif module.endswith("norm"):
            made[name] = torch.ones(shape)
        elif name.endswith(".bias"):
            made[name] = torch.zeros(shape)
        else:
            made[name] = draw(name, shape, config.initializer_range, seed)
    return made


def output_and_gate(store: TensorStore, layer: int, shapes: dict[str, Shape]) -> dict[str, Tensor]:
    """``o_proj`` and the open gate if there is one: what every inheriting layer starts with."""
    prefix = attention_prefix(layer)
    weight, gate = f"{prefix}o_proj.weight", f"{prefix}g_proj.weight"
    made = {weight: store.load(weight)}
    if gate in shapes:
        made[gate] = torch.zeros(shapes[gate])
        made[weight] = made[weight] * OPEN_GATE_GAIN
    if f"{prefix}o_proj.bias" in shapes:
        made[f"{prefix}o_proj.bias"] = store.load(f"{prefix}o_proj.bias")
    return made


def inherited_attention(
    store: TensorStore, layer: int, shapes: dict[str, Shape]
) -> dict[str, Tensor]:
    """The teacher's attention under an open gate. Arguments as in :func:`random_attention`."""
    made = output_and_gate(store, layer, shapes)
    return made | {name: store.load(name) for name in shapes if name not in made}
