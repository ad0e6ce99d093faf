"""Edited models with quantised MLPs, on what vLLM's CPU build has kernels for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.engine import engine, generate, random_prompts
from tests.unit.quantised import quantised_checkpoint
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_mlps_of_four_bits(target: str, method: str, tmp_path: Path):
    """bfloat16, which the kernels compute in, against the float32 reference with the same weights:
    the sum of all rounding, far from what a wrong zero point or order would do."""
    model = tiny_edited("qwen3", tiny_edit(target, gate="headwise"))
    folder = quantised_checkpoint(model, method, tmp_path / "model")
    prompts = random_prompts([3, 20, 60])
    with engine(folder, dtype="bfloat16") as llm:
        outputs = generate(llm, prompts, 16)
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert completion.logprobs is not None
        served = [step[t].logprob for step, t in zip(completion.logprobs, tokens, strict=True)]
        assert (torch.tensor(served) - expected).abs().max() < 0.5
