"""The step that runs, cut down for the layers above the last full one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import ForwardContext, get_forward_context

from vllm_attnedit.backends.prompt_ends import cut, last_rows
from vllm_attnedit.layers.fast_prefill import tokens_that_pass


class Ends(NamedTuple):
    """What is left of a step.

    Attributes:
        rows: (M,) int64, of the step's tokens.
        context: with the attention metadata of these alone.
    """

    rows: Tensor
    context: ForwardContext


class PromptEnds:
    """Cuts steps down for the layers above the last full one.

    Args:
        layer_names: of their attention layers.
        sliding_window: W.
    """

    def __init__(self, layer_names: Sequence[str], sliding_window: int) -> None:
        self._names, self._window = layer_names, sliding_window

    def of_this_step(self) -> Ends | None:
        """What these layers need of the step that runs now; ``None``: all of it."""
        context = get_forward_context()
        metadata = context.attn_metadata
        if context.cudagraph_runtime_mode != CUDAGraphMode.NONE or not isinstance(metadata, dict):
            return None
        steps = [metadata[name].step for name in self._names]
        page_size = max(step.page_size for step in steps)
        keep = tokens_that_pass(len(self._names), self._window, page_size)
        common = steps[0].common
        if common.max_query_len <= keep:
            return None
        found = last_rows(common.query_start_loc_cpu, keep)
        if found is None:
            return None
        rows, starts = found[0].to(common.slot_mapping.device, non_blocking=True), found[1]
        made: dict[int, Any] = {}
        for step in steps:
            if id(step) not in made:
                made[id(step)] = step.again(cut(step.common, rows, starts, keep))
        replaced = copy.copy(context)
        replaced.attn_metadata = metadata | {
            name: made[id(step)] for name, step in zip(self._names, steps)
        }
        return Ends(rows, replaced)


def whole(rows: Tensor, values: Tensor, tokens: int) -> Tensor:
    """Values (M, E) of the rows in a tensor of all tokens (T, E), NaN elsewhere."""
    output = values.new_full((tokens, values.shape[1]), torch.nan)
    output[rows] = values
    return output
