"""Prompts that skip layers, on CUDA: both model runners, compiled in two parts, with CUDA graphs.

python -m pytest -m gpu tests/gpu/test_fast_prefill.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.against_reference import check
from tests.integration.engine import engine, generate, random_prompts
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.config import FULL, SLIDING

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

WINDOW = 32


@pytest.fixture(scope="module")
def model():
    types = (SLIDING, FULL, SLIDING, SLIDING)
    edit = tiny_edit("gateswa", window=WINDOW, gate="headwise", layer_types=types)
    return tiny_edited("qwen3", edit, head_dim=64, hidden_size=256, num_hidden_layers=4)


@pytest.mark.parametrize("runner", ["0", "1"])
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("pages", ["separate", "packed"])
def test_log_probabilities_equal_the_reference(
    model, pages: str, runner: str, eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Steps larger than the largest graph, so that prompts are cut; small mixed steps, which are
    graphs in two parts; decodes, which are one."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1" if eager else "0")
    prompts = random_prompts([700, 1, 300, 40, WINDOW, 500, 9, 127])
    options = {"attnedit_fast_prefill": True, "attnedit_window_pages": pages}
    settings = {"max_model_len": 1024, "max_num_batched_tokens": 512}
    graphs = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}
    with engine(
        tiny_edited_checkpoint(model, tmp_path),
        enforce_eager=eager,
        additional_config=options,
        compilation_config=graphs,
        **settings,
    ) as llm:
        outputs = generate(llm, prompts, 48)
        again = generate(llm, [prompts[0][:673], prompts[0]], 48)  # behind a prefix hit
    check(model, prompts, outputs, tolerance=5e-3)
    check(model, [prompts[0][:673], prompts[0]], again, tolerance=5e-3)
