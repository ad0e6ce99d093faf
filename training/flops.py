"""Floating-point operations that a step needs by definition of the model, for the MFU.

A multiplication and an addition are two operations. Recomputation, padding and masks are not
counted: they are what a run should not spend time on. Attention counts the pairs of query and key
that see each other, exactly, from the documents of the batch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from training.data.batches import Batch
from vllm_attnedit.config import SLIDING, AttnEditConfig
from vllm_attnedit.tensors import attention_tensors, expected_tensors, is_moe_layer

PEAK_TFLOPS = {
    # Dense bf16, by the vendors' data sheets.
    "H200": 989.0,
    "H100": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "GB200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "V100": 125.0,
}


def peak_tflops(device_name: str) -> float | None:
    """bf16 peak of a device by its name, if known."""
    found = (peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name))
    return next(found, None)


def visible_pairs(batches: Sequence[Batch], window: int | None) -> float:
    """Pairs of query and key that see each other, over all documents of the batches."""
    total = 0.0
    for batch in batches:
        length = np.diff(batch.cu_seqlens.cpu().numpy()).astype(np.float64)
        inside = length if window is None else np.minimum(length, window)
        # The first `inside` queries see 1, 2, ... keys, the others a whole window.
        total += float((inside * (inside + 1) / 2 + (length - inside) * inside).sum())
    return total


@dataclass(frozen=True)
class ModelCost:
    """Costs of one model: operations a token of one forward pass.

    Attributes:
        attention: projections of all attention layers.
        output: the part of ``attention`` behind the softmax (``o_proj``).
        mlp: all MLPs; of a mixture, the experts that a token visits.
        head: the output head.
        pair_full: operations a visible pair, over all full and latent layers.
        pair_window: the same over all window layers.
        window: of the window layers.
    """

    attention: float
    output: float
    mlp: float
    head: float
    pair_full: float
    pair_window: float
    window: int | None

    def pairs(self, batches: Sequence[Batch]) -> float:
        """Operations of softmax attention in one forward pass over the batches."""
        full = self.pair_full * visible_pairs(batches, None)
        if self.window is None:
            return full
        return full + self.pair_window * visible_pairs(batches, self.window)


def model_cost(config: AttnEditConfig, layers: Sequence[int] | None = None) -> ModelCost:
    """The costs of a model, or of some of its layers."""
    chosen = range(config.num_hidden_layers) if layers is None else layers
    attention = output = mlp = pair_full = pair_window = 0.0
    tensors = expected_tensors(config)
    for layer in chosen:
        for name, shape in attention_tensors(config, layer).items():
            if len(shape) == 2:
                attention += 2.0 * prod(shape)
                output += 2.0 * prod(shape) if name == "o_proj.weight" else 0.0
        prefix = f"model.layers.{layer}.mlp."
        for name, shape in tensors.items():
            if name.startswith(prefix) and len(shape) == 2:
                share = 1.0
                if ".experts." in name and is_moe_layer(config, layer):
                    share = config.num_experts_per_tok / config.num_experts
                mlp += 2.0 * share * prod(shape)
        edit = config.edit
        if edit.layer_types[layer] == SLIDING:
            pair_window += 4.0 * config.num_attention_heads * config.head_dim
        elif edit.kv_lora_rank is not None:
            assert edit.v_head_dim is not None
            pair_full += 2.0 * config.num_attention_heads * (edit.qk_head_dim + edit.v_head_dim)
        else:
            pair_full += 4.0 * config.num_attention_heads * config.head_dim
    head = 2.0 * config.vocab_size * config.hidden_size
    return ModelCost(attention, output, mlp, head, pair_full, pair_window, config.sliding_window)
