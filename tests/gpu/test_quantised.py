"""Edited models with quantised MLPs on CUDA: serialised GPTQ, AWQ and FP8, and FP8 at loading.

python -m pytest -m gpu tests/gpu/test_quantised.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.engine import engine, generate, random_prompts
from tests.unit.quantised import quantised_checkpoint
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

STEPS = 16


def served_and_expected(model: Any, folder: Path, **options: Any) -> float:
    """The worst log-probability gap to the float32 reference with the weights as they stand."""
    prompts = random_prompts([3, 20, 60, 200])
    with engine(folder, dtype="bfloat16", block_size=64, **options) as llm:
        outputs = generate(llm, prompts, STEPS)
    worst = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert completion.logprobs is not None
        served = [step[t].logprob for step, t in zip(completion.logprobs, tokens, strict=True)]
        worst = max(worst, float((torch.tensor(served) - expected).abs().max()))
    return worst


def tiny(target: str) -> Any:
    """Of the sizes that GPU kernels for four bits take."""
    edit = tiny_edit(target, gate="headwise", **({"window": 32} if target == "gateswa" else {}))
    widths = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    if target == "mla":
        edit = tiny_edit(target, gate="headwise", v_head_dim=64)
    return tiny_edited("qwen3", edit, **widths)


# FP8 quantises activations as well, by token.
@pytest.mark.parametrize(("method", "tolerance"), [("gptq", 0.5), ("awq", 0.5), ("fp8", 1.5)])
@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_serialised(target: str, method: str, tolerance: float, tmp_path: Path):
    model = tiny(target)
    folder = quantised_checkpoint(model, method, tmp_path / "model")
    assert served_and_expected(model, folder) < tolerance


@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_fp8_at_loading(target: str, tmp_path: Path):
    """All linear layers but gate and ``kv_b_proj``."""
    model = tiny(target)
    folder = tiny_edited_checkpoint(model, tmp_path / "model")
    assert served_and_expected(model, folder, quantization="fp8") < 2.5
