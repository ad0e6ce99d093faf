"""Compiles and checkpoints parts of a model in place: the parts that repeat, layer by layer.

Both wrap ``forward`` and not the call, so that hooks stay outside, and work alike in every version
of transformers (whose own checkpointing sits in different places in different versions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_VARIANTS = 64
"""Compiled variants of one function: kinds of layers, times training or not, times mask lengths."""


def _wrap(module: nn.Module, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module.forward = wrapper(module.forward)


def compile_each(modules: Iterable[nn.Module]) -> None:
    """Compile every module's forward; equal ones share their code."""
    torch._dynamo.config.recompile_limit = max(_VARIANTS, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.accumulated_recompile_limit = 16 * _VARIANTS
    for module in modules:
        _wrap(module, lambda forward: torch.compile(forward))


def compile_function(function: Callable[..., Any], enabled: bool) -> Callable[..., Any]:
    """The function compiled, or as it is."""
    return torch.compile(function) if enabled else function


def checkpoint_each(modules: Iterable[nn.Module]) -> None:
    """Keep only the inputs of every module for the backward pass, which computes the rest again."""

    def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(
                forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )

        return run

    for module in modules:
        _wrap(module, recomputed)


def teacher_parts(model: Any) -> list[nn.Module]:
    """The parts of a decoder whose attention modules keep their hooks."""
    parts: list[nn.Module] = []
    for layer in model.model.layers:
        parts += [
            layer.input_layernorm,
            layer.self_attn,
            layer.post_attention_layernorm,
            layer.mlp,
        ]
    return parts
