"""What a step of the served model runs in."""

from __future__ import annotations

import pytest
import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.cpu_fused_moe import _CPU_MOE_ACT_FN

from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited
from vllm_attnedit.models.causal_lm import forward_context


def test_experts_find_the_configuration_as_they_run() -> None:
    config = tiny_edited("qwen3_moe", tiny_edit("gateswa")).config
    host = VllmConfig()
    values = torch.randn(3, 8)
    activation = _CPU_MOE_ACT_FN[MoEActivation.SILU]
    # Without it vLLM's own fails: should it not any more, the context can go.
    with pytest.raises(AssertionError, match="Current vLLM config is not set"):
        activation(values)
    step = forward_context(config, host)
    for _ in range(2):
        with step():
            assert get_current_vllm_config() is host
            first, second = values.chunk(2, dim=-1)
            torch.testing.assert_close(activation(values), torch.nn.functional.silu(first) * second)


def test_models_without_experts_need_none() -> None:
    config = tiny_edited("qwen3", tiny_edit("gateswa")).config
    with (
        forward_context(config, VllmConfig())(),
        pytest.raises(AssertionError, match="Current vLLM config is not set"),
    ):
        get_current_vllm_config()
