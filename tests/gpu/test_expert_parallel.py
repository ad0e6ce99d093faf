"""Experts, and latents or windows beside them, on two GPUs.

python -m pytest -m gpu tests/gpu/test_expert_parallel.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.engine import random_prompts, reference
from tests.integration.test_parallel_latent import STEPS, run
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("expert_parallel", [True, False])
@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_two_ranks_equal_the_reference(target: str, expert_parallel: bool, tmp_path: Path):
    edit = tiny_edit(target, gate="headwise", **({"window": 32} if target == "gateswa" else {}))
    model = tiny_edited("qwen3_moe", edit, head_dim=32, moe_intermediate_size=64)
    prompts = random_prompts([3, 40, 90])
    folder = tiny_edited_checkpoint(model, tmp_path / "model")
    memory = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 28}
    result = run(folder, prompts, tmp_path, enable_expert_parallel=expert_parallel, **memory)
    assert result["tokens"] == [reference(model, p, STEPS).tokens for p in prompts]
