"""The CUDA backend in the real engine against the reference model, under both model runners.

python -m pytest -m gpu tests/gpu/test_gateswa_backend.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.against_reference import check, gap
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


@pytest.mark.parametrize("runner", ["0", "1"])
@pytest.mark.parametrize("eager", [True, False])
def test_log_probabilities_equal_the_reference(
    model, runner: str, eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """float32, so that the tolerance can be tight; chunks, decodes and mixed steps, with and
    without compilation and CUDA graphs."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1" if eager else "0")
    prompts = random_prompts(LENGTHS)
    with engine(tiny_edited_checkpoint(model, tmp_path), enforce_eager=eager) as llm:
        outputs = generate(llm, prompts, STEPS)
    check(model, prompts, outputs, tolerance=5e-3)


PACKED = {"additional_config": {"attnedit_window_pages": "packed"}}
SEPARATE = {"additional_config": {"attnedit_window_pages": "separate"}}
STOCK = {"additional_config": {"attnedit_window_backend": "stock"}}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3,
         "prompt_lookup_max": 3, "prompt_lookup_min": 1}  # fmt: skip


@pytest.mark.parametrize("runner", ["0", "1"])
@pytest.mark.parametrize("pages", [SEPARATE, PACKED])
def test_under_pressure(
    model, pages: dict, runner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    prompts = random_prompts(LENGTHS)
    pressure = {"num_gpu_blocks_override": 32 if pages is PACKED else 72, "max_model_len": 400}
    with engine(tiny_edited_checkpoint(model, tmp_path), **pressure, **pages) as llm:
        outputs = generate(llm, prompts, STEPS)
        assert metric(llm, "vllm:num_preemptions") > 0
    check(model, prompts, outputs, tolerance=5e-3)


def test_drafts_change_nothing(model, tmp_path: Path):
    """Repeating prompts, so that n-gram lookup proposes and some drafts are taken."""
    prompts = [prompt * 3 for prompt in random_prompts((5, 9, WINDOW, 60))]
    folder = tiny_edited_checkpoint(model, tmp_path)
    with engine(folder, speculative_config=NGRAM) as llm:
        outputs = generate(llm, prompts, STEPS)
        assert metric(llm, "vllm:spec_decode_num_draft_tokens") > 0
    check(model, prompts, outputs, tolerance=5e-3)
    with engine(folder) as llm:
        plain = generate(llm, prompts, STEPS)
    for with_drafts, without in zip(outputs, plain, strict=True):
        assert with_drafts.outputs[0].token_ids == without.outputs[0].token_ids


@pytest.mark.parametrize("pages", [SEPARATE, PACKED])
def test_fp8_pages_are_as_good_as_those_of_stock(model, pages: dict, tmp_path: Path):
    """The same rounding of keys and values; nothing but the kernels differs."""
    prompts = random_prompts(LENGTHS)
    folder = tiny_edited_checkpoint(model, tmp_path)
    gaps = {}
    for name, options in (("ours", pages), ("stock", STOCK)):
        with engine(folder, kv_cache_dtype="fp8", dtype="bfloat16", **options) as llm:
            outputs = generate(llm, prompts, STEPS)
        gaps[name] = sum(gap(model, p, o) for p, o in zip(prompts, outputs, strict=True))
    print(f"summed log-probability gaps to the float32 reference: {gaps}")
    assert gaps["ours"] <= 1.3 * gaps["stock"]


@pytest.mark.parametrize(("pages", "boundary"), [(SEPARATE, BLOCK_SIZE), (PACKED, 3 * BLOCK_SIZE)])
def test_prefix_hit(model, pages: dict, boundary: int, tmp_path: Path):
    """Packed, three window layers to a full one, hits end at multiples of three blocks."""
    shared, a, b = random_prompts([160, 9, 21])
    with engine(tiny_edited_checkpoint(model, tmp_path), **pages) as llm:
        generate(llm, [shared + a], STEPS)
        outputs = generate(llm, [shared + a], STEPS)
        assert outputs[0].num_cached_tokens >= 160 // boundary * boundary
        check(model, [shared + a], outputs, tolerance=5e-3)
        outputs = [generate(llm, [shared + x], STEPS)[0] for x in (b, b)]
    check(model, [shared + b] * 2, outputs, tolerance=5e-3)
