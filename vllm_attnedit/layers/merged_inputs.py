"""One matrix product for projections that read the same activations.

A decode step of few requests is bound by the number of kernels as much as by the bytes they read:
beside a product of 6,144 rows, one of 576 and one of 32 cost a launch each. The projections stay
layers of their own, loaded and sharded as ever; only their weights lie behind each other in one
tensor, which is multiplied at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm import envs
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.offloader import NoopOffloader, get_offloader
from vllm.platforms import current_platform

ROW_MULTIPLE = 8
"""Of the joint weight's rows, so that its product's stay aligned to 16 bytes: a gate has few."""


class MergedInputs(nn.Module):
    """The joint weight of several layers, and its product.

    Args:
        layers: unquantised, without biases, of one input width. Their weights become views of
            rows of this module's, so that whatever is loaded into them is loaded into it.

    Attributes:
        weight: (rows, E), the layers' rows behind each other and at most seven of zeros. A buffer:
            as parameters and in checkpoints there are the layers' own.
    """

    weight: Tensor

    def __init__(self, layers: Sequence[LinearBase]) -> None:
        super().__init__()
        self.sizes = [layer.weight.shape[0] for layer in layers]
        first = layers[0].weight
        rows = sum(self.sizes)
        self.padding = -rows % ROW_MULTIPLE
        weight = torch.zeros(
            rows + self.padding, first.shape[1], dtype=first.dtype, device=first.device
        )
        self.register_buffer("weight", weight, persistent=False)
        for layer, part in zip(layers, weight[:rows].split(self.sizes), strict=True):
            layer.weight.data = part

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """(T, E) to each layer's output (T, rows), views of one tensor."""
        product = functional.linear(hidden_states, self.weight)
        if self.padding:
            product = product[:, : -self.padding]
        return product.split(self.sizes, dim=-1)


def merge_inputs(
    vllm_config: VllmConfig, layers: Sequence[LinearBase | None]
) -> MergedInputs | None:
    """Merge ``layers`` (``None`` among them is left out) if their products can be one, else
    ``None``.

    They cannot where a layer is quantised or has a bias, with LoRA adapters (which wrap each layer
    on its own), with weights kept in the host's memory (which are moved there one by one, before
    they are loaded: the joint weight would stay empty), and where vLLM replaces the product itself:
    on other platforms than CUDA and in its batch-invariant mode.
    """
    there = [layer for layer in layers if layer is not None]
    if not current_platform.is_cuda() or envs.VLLM_BATCH_INVARIANT:
        return None
    if vllm_config.lora_config is not None or not isinstance(get_offloader(), NoopOffloader):
        return None
    if len(there) < 2:
        return None
    for layer in there:
        if not isinstance(layer.quant_method, UnquantizedLinearMethod) or layer.bias is not None:
            return None
    return MergedInputs(there)
