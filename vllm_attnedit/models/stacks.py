# No postponed annotations here: vLLM's compile decorator reads them to find the dynamic arguments.
"""A decoder in two parts, compiled apart, between which the tokens of prompts can stop."""

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context, override_forward_context

from vllm_attnedit.layers.fast_prefill import layers_above
from vllm_attnedit.models.prompt_cut import PromptEnds, whole


def through(
    layers: list[nn.Module],
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,) and twice (T, hidden) through layers, as through one."""
    for layer in layers:
        hidden_states, residual = layer(positions, hidden_states, residual)
    assert residual is not None
    return hidden_states, residual


# Two classes, each with a forward of its own: vLLM finds compiled code by its name.


@support_torch_compile
class LowerStack(nn.Module):
    """The layers up to the last full one; they stay the model's own modules."""

    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", layers: list[nn.Module]
    ) -> None:
        super().__init__()
        self.stacked = layers  # a list: not a second time among the model's parameters

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return through(self.stacked, positions, hidden_states, None)


@support_torch_compile
class UpperStack(nn.Module):
    """The window layers above."""

    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", layers: list[nn.Module]
    ) -> None:
        super().__init__()
        self.stacked = layers

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return through(self.stacked, positions, hidden_states, residual)


class Stacks(nn.Module):
    """All layers: up to the last full one, and above it.

    Args:
        layers: the model's, in order.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str, layers: list[nn.Module]) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_text_config
        first = len(layers) - layers_above(config)
        names = [f"{prefix}.layers.{i}.self_attn.attn" for i in range(first, len(layers))]
        self.ends = PromptEnds(names, config.sliding_window)
        with set_model_tag("lower"):
            self.lower = LowerStack(
                vllm_config=vllm_config, prefix=f"{prefix}.lower", layers=layers[:first]
            )
        with set_model_tag("upper"):
            self.upper = UpperStack(
                vllm_config=vllm_config, prefix=f"{prefix}.upper", layers=layers[first:]
            )
        # What enters a captured graph. It reads where it read when it was captured: embeddings come
        # from anywhere, and what the lower graph returns, the upper one may overwrite.
        tokens = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self.entries: torch.Tensor
        entries = torch.zeros(3, tokens, config.hidden_size)
        self.register_buffer("entries", entries, persistent=False)

    def _entry(self, place: int, values: torch.Tensor) -> torch.Tensor:
        """(T, hidden) where every step of as many tokens finds it, if graphs were captured."""
        if get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return values
        return self.entries[place, : len(values)].copy_(values)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(T,) and (T, hidden) to the last layer's output and the residual stream, (T, hidden), NaN
        in rows of tokens that stopped."""
        tokens = len(positions)
        hidden_states, residual = self.lower(positions, self._entry(0, hidden_states))
        hidden_states, residual = self._entry(1, hidden_states), self._entry(2, residual)
        ends = self.ends.of_this_step()
        if ends is None:
            hidden_states, residual = self.upper(positions, hidden_states, residual)
            return hidden_states, residual
        rows = ends.rows
        with override_forward_context(ends.context):
            upper, stream = self.upper(positions[rows], hidden_states[rows], residual[rows])
        return whole(rows, upper, tokens), whole(rows, stream, tokens)
