"""Two processes give the tokens of one: tensor parallel and pipeline parallel, on CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.engine import random_prompts, reference
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

STEPS = 24
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    folder, options, prompts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8,
              max_num_batched_tokens=64, block_size=16, **options)
    sampling = SamplingParams(temperature=0, max_tokens=int(sys.argv[4]), ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    print("RESULT", json.dumps([list(o.outputs[0].token_ids) for o in outputs]))

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("option", ["tensor_parallel_size", "pipeline_parallel_size"])
@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_two_ranks_equal_the_reference(target: str, option: str, tmp_path: Path):
    model = tiny_edited("qwen3", tiny_edit(target, gate="headwise"), num_hidden_layers=4)
    folder = tiny_edited_checkpoint(model, tmp_path / "model")
    program = tmp_path / "serve.py"
    program.write_text(PROGRAM)
    prompts = random_prompts([3, 9, 40, 90])
    # Several processes, as in production: not this test process's single one.
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, program, folder, json.dumps({option: 2}), json.dumps(prompts), str(STEPS)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    expected = [reference(model, prompt, STEPS).tokens for prompt in prompts]
    assert json.loads(result.removeprefix("RESULT ")) == expected
