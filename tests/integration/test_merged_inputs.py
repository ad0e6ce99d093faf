"""Projections merged into one product, as on CUDA, against the reference model.

vLLM's CPU platform repacks the weights of linear layers: those of the merged tensor stay as loaded.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.integration.engine import assert_equal, engine, generate, random_prompts, reference
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.layers import merged_inputs
from vllm_attnedit.layers.merged_inputs import ROW_MULTIPLE, MergedInputs

pytestmark = pytest.mark.integration


def merged(model: Any) -> list[MergedInputs]:
    """Runs in the engine's process."""
    return [module for module in model.modules() if isinstance(module, MergedInputs)]


def rows(model: Any) -> list[tuple[int, int]]:
    """Rows of each joint weight, and of the layers in it."""
    return [(module.weight.shape[0], sum(module.sizes)) for module in merged(model)]


@pytest.mark.parametrize("q_lora_rank", [None, 40])
@pytest.mark.parametrize("gate", ["headwise", "elementwise", None])
def test_merged_projections_give_the_tokens_of_the_reference(
    gate: str | None, q_lora_rank: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    platform = SimpleNamespace(is_cuda=lambda: True)
    monkeypatch.setattr(merged_inputs, "current_platform", platform)
    model = tiny_edited("llama", tiny_edit("mla", gate=gate, q_lora_rank=q_lora_rank))
    prompts = random_prompts([1, 40, 90])
    with engine(tiny_edited_checkpoint(model, tmp_path)) as llm:
        (found,) = llm.apply_model(rows)
        outputs = generate(llm, prompts, 24)
    assert len(found) == model.config.num_hidden_layers
    for padded, own in found:
        assert padded % ROW_MULTIPLE == 0 and own <= padded < own + ROW_MULTIPLE
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_equal(output, reference(model, prompt, 24))


def test_elsewhere_each_projection_is_a_product_of_its_own(tmp_path: Path):
    model = tiny_edited("llama", tiny_edit("mla", gate="headwise"))
    with engine(tiny_edited_checkpoint(model, tmp_path)) as llm:
        assert llm.apply_model(rows) == [[]]


def test_with_weights_in_host_memory_each_projection_is_a_product_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """vLLM moves each layer's weight away before it is loaded: a joint one would stay empty."""
    platform = SimpleNamespace(is_cuda=lambda: True)
    monkeypatch.setattr(merged_inputs, "current_platform", platform)
    model = tiny_edited("llama", tiny_edit("mla", gate="headwise"))
    with engine(tiny_edited_checkpoint(model, tmp_path), cpu_offload_gb=1) as llm:
        assert llm.apply_model(rows) == [[]]
