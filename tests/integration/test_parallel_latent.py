"""Two CPU processes: what latents take on each of them, and that experts are not spread there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine import engine, random_prompts, reference
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.accounting import kv_bytes_per_token
from vllm_attnedit.errors import AttnEditError

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

STEPS = 24
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    folder, options, prompts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8,
              max_num_batched_tokens=64, block_size=16, tensor_parallel_size=2, **options)
    sampling = SamplingParams(temperature=0, max_tokens=int(sys.argv[4]), ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    core = llm.llm_engine.engine_core.engine_core
    cache = core.scheduler.kv_cache_config
    held = sum(tensor.size for tensor in cache.kv_cache_tensors)
    print("RESULT", json.dumps({
        "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        "bytes_per_token": held / cache.num_blocks / 16,
    }))

if __name__ == "__main__":
    main()
"""


def run(folder: Path, prompts: list[list[int]], scratch: Path, **options: Any) -> dict[str, Any]:
    program = scratch / "serve.py"
    program.write_text(PROGRAM)
    # The scheduler in the program's own process, so that it can be asked; workers in two others.
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, program, folder, json.dumps(options), json.dumps(prompts), str(STEPS)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def test_latents_are_whole_on_every_rank(tmp_path: Path):
    """Factors of a kept norm are not; ``attnedit kv --tp`` counts what vLLM allocates."""
    model = tiny_edited("qwen3", tiny_edit("mla", gate="headwise", qk_norm="per_head"))
    prompts = random_prompts([3, 40, 90])
    result = run(tiny_edited_checkpoint(model, tmp_path / "model"), prompts, tmp_path)
    assert result["tokens"] == [reference(model, p, STEPS).tokens for p in prompts]
    factors = 2  # of four heads
    assert result["bytes_per_token"] == 4 * 4 * (64 + 16 + factors)
    assert result["bytes_per_token"] == kv_bytes_per_token(model.config, tp=2, kv_dtype="fp32")


def test_experts_are_not_spread_over_cpus(tmp_path: Path):
    """vLLM's kernel knows no expert map there and would crash: refused before."""
    model = tiny_edited("qwen3_moe", tiny_edit("mla"))
    folder = tiny_edited_checkpoint(model, tmp_path / "model")
    refusal = "--enable-expert-parallel: True: leave it out"
    with pytest.raises(AttnEditError, match=refusal), engine(folder, enable_expert_parallel=True):
        pass
