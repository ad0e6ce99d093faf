"""What compiled code of a model depends on, for vLLM's cache of it.

vLLM keeps compiled graphs under a hash of its configuration. How a window layer is served follows
from more than that covers (the hybrid KV-cache manager, for instance), and decides what is traced:
whether norm and rotation are in the graph or in the backend, and where the gate is applied. A graph
of the other kind would load without a complaint and compute something else.
"""

from __future__ import annotations

import hashlib

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from vllm_attnedit.layers.window import WindowAttention

OPTION = "attnedit_graph"
"""Key of vLLM's ``additional_config``, which the hash covers; set here, not by users."""


def graph_key(model: nn.Module) -> str:
    """A hash of a model's modules and of how each of its attention layers is served."""
    parts = [repr(model)]
    for name, layer in model.named_modules():
        if isinstance(layer, Attention):
            backend = layer.get_attn_backend()
            parts.append(f"{name} {type(layer).__qualname__} {backend.__module__} {backend}")
        if isinstance(layer, WindowAttention):
            parts.append(f"{layer.prologue is not None} {layer.pack} {layer.stored_tail}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def note_graph(vllm_config: VllmConfig, model: nn.Module, prefix: str) -> None:
    """Make the configuration's hash depend on what was built. Must come before the first pass.

    Args:
        vllm_config: of the model.
        model: built, its weights not necessarily loaded.
        prefix: tells models of one engine apart, a target from its draft.
    """
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config[f"{OPTION}.{prefix}"] = graph_key(model)
