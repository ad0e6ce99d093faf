"""The kernels against their oracles in the real engine on a real model.

python -m pytest -m gpu tests/gpu/test_real_model.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm import RequestOutput

from examples.quickstart.teacher import fetch_teacher
from tests.integration.engine import engine, greedy
from vllm_attnedit.edit.convert import edit_checkpoint
from vllm_attnedit.edit.patterns import EditPlan
from vllm_attnedit.ops.dispatch import OVERRIDE_VARIABLE

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

STEPS = 64
PROMPTS = (
    "The capital of France is",
    "To bake bread you need flour, water, salt and yeast. First,",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived",
    "The difference between a list and a tuple in Python is that",
    "In 1969 the first people landed on the Moon. " * 30 + "The mission was called",
)


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("edited") / "gateswa"
    edit_checkpoint(fetch_teacher(), out, EditPlan(target="gateswa"))
    return out


def continuations(folder: Path, **options) -> list[RequestOutput]:
    with engine(folder, max_num_batched_tokens=128, **options) as llm:
        return llm.generate(list(PROMPTS), greedy(STEPS), use_tqdm=False)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_give_the_tokens_of_the_oracle(
    edited: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
):
    """Chunks of 128 and decodes; compiled and with CUDA graphs against eager oracles.

    In bfloat16 two candidates may be closer than its rounding: a pair of outputs may part there,
    and nowhere else. Logits between 16 and 32 are multiples of 1/8, and two are compared.
    """
    fast = continuations(edited, dtype=dtype, enforce_eager=False)
    monkeypatch.setenv(OVERRIDE_VARIABLE, "reference")
    oracle = continuations(edited, dtype=dtype)
    if dtype == "float32":
        assert tokens(fast) == tokens(oracle)
        return
    same = 0
    for ours, theirs in zip(fast, oracle, strict=True):
        a, b = ours.outputs[0], theirs.outputs[0]
        pairs = enumerate(zip(a.token_ids, b.token_ids, strict=True))
        parted = next((i for i, (x, y) in pairs if x != y), None)
        same += parted is None
        if parted is not None:
            x, y = a.token_ids[parted], b.token_ids[parted]
            gap = b.logprobs[parted][y].logprob - a.logprobs[parted][x].logprob
            assert abs(gap) <= 0.25, f"they part at {parted}, where it is no tie"
    print(f"{same} of {len(PROMPTS)} continuations equal in bfloat16")
    assert same >= len(PROMPTS) // 2
