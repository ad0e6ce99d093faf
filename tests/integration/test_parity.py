"""The served model equals the reference: every family, target and gate, and every way the engine
cuts, shares, drops and recomputes a request."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.engine import (
    assert_equal,
    engine,
    generate,
    greedy,
    metric,
    random_prompts,
    reference,
)
from tests.unit.tiny import FAMILY_NAMES, tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.config import FULL, SLIDING, AttentionEdit

pytestmark = pytest.mark.integration

WINDOW = 16
# Shorter than, at the edges of, and several times longer than the window; a mixed batch of eight.
LENGTHS = (1, 7, WINDOW - 1, WINDOW, WINDOW + 1, 40, 67, 101)


def edit_of(target: str, gate: str | None) -> AttentionEdit:
    if target == "mla-q-lora":
        return tiny_edit("mla", gate=gate, q_lora_rank=48)
    if target == "mla-normed":
        return tiny_edit("mla", gate=gate, qk_norm="per_head")
    return tiny_edit(target, gate=gate, **({"window": WINDOW} if target == "gateswa" else {}))


CASES: list[tuple[str, str, str | None]] = [
    (family, target, gate)
    for family in FAMILY_NAMES
    for target in ("gateswa", "mla")
    for gate in ("headwise", "elementwise")
]
CASES += [("llama", "gateswa", None), ("qwen3", "mla", None), ("qwen2", "mla-q-lora", "headwise")]
CASES += [("qwen3", "mla-normed", "headwise"), ("qwen3_moe", "mla-normed", None)]


@pytest.mark.parametrize(("family", "target", "gate"), CASES)
def test_mixed_batch_equals_the_reference(
    family: str, target: str, gate: str | None, tmp_path: Path
):
    model = tiny_edited(family, edit_of(target, gate))
    prompts = random_prompts(LENGTHS)
    with engine(tiny_edited_checkpoint(model, tmp_path)) as llm:
        outputs = generate(llm, prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_equal(output, reference(model, prompt))


@pytest.fixture(scope="module", params=["gateswa", "mla"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """One model a target for the tests of scheduling."""
    model = tiny_edited("qwen3", edit_of(request.param, "headwise"))
    return model, tiny_edited_checkpoint(model, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("chunk", [WINDOW - 1, WINDOW, WINDOW + 1])
def test_chunk_edges_at_the_window(checkpoint, chunk: int):
    model, folder = checkpoint
    (prompt,) = random_prompts([5 * WINDOW + 3])
    with engine(folder, max_num_batched_tokens=chunk) as llm:
        (output,) = generate(llm, [prompt])
    assert_equal(output, reference(model, prompt))


def test_prefix_cache_hit(checkpoint):
    model, folder = checkpoint
    (shared, a, b) = random_prompts([80, 9, 21])
    with engine(folder) as llm:
        generate(llm, [shared + a])
        outputs = generate(llm, [shared + a, shared + b])
    for prompt, output in zip([shared + a, shared + b], outputs, strict=True):
        assert output.num_cached_tokens is not None
        assert output.num_cached_tokens >= 64
        assert_equal(output, reference(model, prompt))


def test_preemption(checkpoint):
    model, folder = checkpoint
    prompts = random_prompts([20] * 8)
    latent = model.config.sliding_window is None
    # Room for all eight prompts, not for all their continuations.
    blocks = 30 if latent else 70
    with engine(folder, num_gpu_blocks_override=blocks, max_model_len=128) as llm:
        outputs = generate(llm, prompts)
        assert metric(llm, "vllm:num_preemptions") > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_equal(output, reference(model, prompt))


def test_abort(checkpoint):
    model, folder = checkpoint
    doomed, prompt = random_prompts([90, 50])
    with engine(folder) as llm:
        llm.llm_engine.add_request("doomed", {"prompt_token_ids": doomed}, greedy())
        for _ in range(5):
            llm.llm_engine.step()
        llm.llm_engine.abort_request(["doomed"])
        (output,) = generate(llm, [prompt])
    assert_equal(output, reference(model, prompt))


def test_a_window_of_one_and_a_model_of_windows_only(tmp_path: Path):
    edit = AttentionEdit(layer_types=(SLIDING,) * 4, sliding_window=1, gate="headwise")
    model = tiny_edited("llama", edit)
    prompts = random_prompts([1, 5, 40])
    with engine(tiny_edited_checkpoint(model, tmp_path)) as llm:
        outputs = generate(llm, prompts, steps=16)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_equal(output, reference(model, prompt, steps=16))


def test_layer_counts_that_do_not_divide(tmp_path: Path):
    """Seven layers, five of them windows: vLLM's cache groups need padding."""
    types = (SLIDING, SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL)
    edit = AttentionEdit(layer_types=types, sliding_window=WINDOW, gate="elementwise")
    model = tiny_edited("llama", edit, num_hidden_layers=7)
    prompts = random_prompts([3, 50])
    with engine(tiny_edited_checkpoint(model, tmp_path)) as llm:
        outputs = generate(llm, prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_equal(output, reference(model, prompt))
