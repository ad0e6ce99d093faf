"""The CUDA backend in the real engine against the reference model, under both model runners.

python -m pytest -m gpu tests/gpu/test_gateswa_backend.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.engine import BLOCK_SIZE, engine, generate, metric, random_prompts
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

WINDOW = 32
LENGTHS = (1, 7, WINDOW - 1, WINDOW, WINDOW + 1, 100, 201, 333)
STEPS = 48


@pytest.fixture(scope="module")
def model():
    edit = tiny_edit("gateswa", window=WINDOW, gate="headwise")
    # Wide enough heads for every GPU kernel, FlashAttention's included.
    return tiny_edited("qwen3", edit, head_dim=64, hidden_size=256, num_hidden_layers=4)


@torch.no_grad()
def worst_gap(model, prompt: list[int], tokens: list[int], served: list[float]) -> float:
    ids = torch.tensor([prompt + tokens], device="cuda")
    logits = model.cuda()(ids).logits[0, len(prompt) - 1 : -1].float()
    chosen = torch.tensor(tokens, device="cuda")[:, None]
    expected = logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()
    return max(abs(a - b) for a, b in zip(served, expected, strict=True))


def check(model, prompts, outputs, tolerance: float) -> None:
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        served = [step[t].logprob for step, t in zip(completion.logprobs, tokens, strict=True)]
        assert worst_gap(model, prompt, tokens, served) <= tolerance, len(prompt)


@pytest.mark.parametrize("runner", ["0", "1"])
@pytest.mark.parametrize("eager", [True, False])
def test_log_probabilities_equal_the_reference(
    model, runner: str, eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """float32, so that the tolerance can be tight; chunks, decodes and mixed steps, with and
    without
    compilation and CUDA graphs."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1" if eager else "0")
    prompts = random_prompts(LENGTHS)
    with engine(tiny_edited_checkpoint(model, tmp_path), enforce_eager=eager) as llm:
        outputs = generate(llm, prompts, STEPS)
    check(model, prompts, outputs, tolerance=5e-3)


@pytest.mark.parametrize("overrides", [
    {"num_gpu_blocks_override": 110, "max_model_len": 400},
    {"kv_cache_dtype": "fp8", "dtype": "bfloat16"},
    {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3,
                            "prompt_lookup_max": 3, "prompt_lookup_min": 1}},
])  # fmt: skip
def test_under_pressure_and_options(model, overrides: dict, tmp_path: Path):
    prompts = random_prompts(LENGTHS)
    with engine(tiny_edited_checkpoint(model, tmp_path), **overrides) as llm:
        outputs = generate(llm, prompts, STEPS)
        if "num_gpu_blocks_override" in overrides:
            assert metric(llm, "vllm:num_preemptions") > 0
    check(model, prompts, outputs, tolerance=0.5 if "kv_cache_dtype" in overrides else 5e-3)


def test_prefix_hit(model, tmp_path: Path):
    shared, a, b = random_prompts([160, 9, 21])
    with engine(tiny_edited_checkpoint(model, tmp_path)) as llm:
        generate(llm, [shared + a], STEPS)
        outputs = generate(llm, [shared + a], STEPS)
        assert outputs[0].num_cached_tokens >= 160 // BLOCK_SIZE * BLOCK_SIZE
        check(model, [shared + a], outputs, tolerance=5e-3)
        outputs = [generate(llm, [shared + x], STEPS)[0] for x in (b, b)]
    check(model, [shared + b] * 2, outputs, tolerance=5e-3)
