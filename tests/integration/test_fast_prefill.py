"""Prompts that skip the layers above the last full one, in the real engine: the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.engine import (
    assert_equal,
    engine,
    generate,
    metric,
    random_prompts,
    reference,
)
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.config import FULL, SLIDING
from vllm_attnedit.layers import fast_prefill
from vllm_attnedit.models.prompt_cut import PromptEnds

pytestmark = pytest.mark.integration

WINDOW = 16
ABOVE = 2
MARGIN = 64
KEEP = ABOVE * (WINDOW - 1) + MARGIN
"""The last tokens of a chunk that pass all layers."""


def option(**more: Any) -> dict[str, Any]:
    return {"additional_config": {"attnedit_fast_prefill": True, **more}}


@pytest.fixture(scope="module")
def model():
    types = (SLIDING, FULL, SLIDING, SLIDING)
    edit = tiny_edit("gateswa", window=WINDOW, gate="elementwise", layer_types=types)
    return tiny_edited("qwen3", edit)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_edited_checkpoint(model, tmp_path_factory.mktemp("fast_prefill"))


@pytest.fixture(autouse=True)
def small_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_prefill, "MARGIN", MARGIN)


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Of every step: the rows that were left, or ``None``."""
    seen: list[int | None] = []
    original = PromptEnds.of_this_step

    def watched(self: PromptEnds) -> Any:
        ends = original(self)
        seen.append(None if ends is None else len(ends.rows))
        return ends

    monkeypatch.setattr(PromptEnds, "of_this_step", watched)
    return seen


@pytest.mark.parametrize("tokens", [128, 256])
@pytest.mark.parametrize("pages", ["separate", "packed"])
def test_prompts_in_chunks(model, folder: Path, cuts, tokens: int, pages: str):
    """Long, short, and next to the number of tokens that pass; beside decodes, with a chunk's end
    wherever it falls."""
    prompts = random_prompts([400, 7, 120, KEEP, KEEP + 1, 300, 1, 129])
    options = option(attnedit_window_pages=pages)
    with engine(folder, max_num_batched_tokens=tokens, **options) as llm:
        outputs = generate(llm, prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_equal(output, reference(model, prompt))
    rows = [count for count in cuts if count is not None]
    assert len(rows) >= 3
    assert max(rows) < tokens


def test_prefix_hits_find_what_they_need(model, folder: Path, cuts):
    """Behind a prompt, behind its answer, and in the middle of what it shares with another. A token
    right behind a hit sees a window of keys and values that no later one sees."""
    (first, tail) = random_prompts([240, 120], seed=3)
    with engine(folder, max_num_batched_tokens=256, **option()) as llm:
        (answer,) = generate(llm, [first])
        said = list(answer.outputs[0].token_ids)
        prompts = [first, first[:225], first + said + tail, first[:176] + tail]
        outputs = [generate(llm, [prompt])[0] for prompt in prompts]
        again = [generate(llm, [prompt])[0] for prompt in prompts]
        hits = metric(llm, "vllm:prefix_cache_hits")
    for prompt, one, other in zip(prompts, outputs, again, strict=True):
        assert_equal(one, reference(model, prompt))
        assert_equal(other, reference(model, prompt))
    assert hits >= 6 * 176
    assert any(count is not None for count in cuts)


@pytest.mark.parametrize("pages", ["separate", "packed"])
def test_a_shared_document(model, folder: Path, cuts, pages: str):
    """Its end lies within the chunks of the first two requests, where not all layers have keys; the
    last two end so soon after it that they see them."""
    (document, *questions) = random_prompts([200, 130, 140, 150, 5, 9], seed=5)
    prompts = [document + question for question in questions]
    options = option(attnedit_window_pages=pages)
    with engine(folder, max_num_batched_tokens=512, **options) as llm:
        outputs = [generate(llm, [prompt])[0] for prompt in prompts]
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_equal(output, reference(model, prompt))
    assert sum(count is not None for count in cuts) >= 3


def test_preempted_requests_come_back(model, folder: Path, cuts):
    prompts = random_prompts([*[60] * 7, 180])
    pressure = {"num_gpu_blocks_override": 100, "max_model_len": 256}
    with engine(folder, max_num_batched_tokens=256, **pressure, **option()) as llm:
        outputs = generate(llm, prompts)
        assert metric(llm, "vllm:num_preemptions") > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_equal(output, reference(model, prompt))
    assert any(count is not None for count in cuts)
