"""A small real model split over all GPUs against itself on one.

    ATTNEDIT_TEST_TEACHER=Qwen/Qwen2.5-Coder-0.5B-Instruct \\
      python -m pytest -m gpu tests/gpu/test_real_model_split.py

The demo's teacher has nine heads, which no two GPUs can share: name one whose heads can be split, a
folder, a hub id or a ``.gguf`` file.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.gpu.test_real_model import PROMPTS, tokens
from tests.integration.engine import engine, greedy
from vllm_attnedit.edit.convert import edit_checkpoint
from vllm_attnedit.edit.patterns import EditPlan

TEACHER = os.environ.get("ATTNEDIT_TEST_TEACHER", "")
GPUS = torch.cuda.device_count()
STEPS = 48
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(GPUS < 2, reason="needs two GPUs"),
    pytest.mark.skipif(not TEACHER, reason="name a model in ATTNEDIT_TEST_TEACHER"),
]


@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_tokens_of_a_real_model(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """float32, chunks of 128 and decodes, with CUDA graphs: only the order of sums differs."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    edited = tmp_path / target
    edit_checkpoint(TEACHER, edited, EditPlan(target=target))
    found = {}
    for gpus in (1, GPUS):
        settings = {"max_num_batched_tokens": 128, "tensor_parallel_size": gpus}
        with engine(edited, enforce_eager=False, **settings) as llm:
            outputs = llm.generate(list(PROMPTS), greedy(STEPS), use_tqdm=False)
        found[gpus] = tokens(outputs)
    assert found[GPUS] == found[1]
    assert len({tuple(answer) for answer in found[1]}) > 1  # it does say something
