"""Latent layers on CUDA against the reference model: this project's operators and vLLM's tuned MLA
kernels, under both model runners.

python -m pytest -m gpu tests/gpu/test_latent_backend.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM

from tests.gpu.against_reference import check, gap
from tests.integration.engine import BLOCK_SIZE, engine, generate, metric, random_prompts
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

LENGTHS = (1, 7, 15, 16, 17, 100, 201, 333)
STEPS = 48
OURS = {"additional_config": {"attnedit_latent_backend": "attnedit"}}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3,
         "prompt_lookup_max": 3, "prompt_lookup_min": 1}  # fmt: skip
# bfloat16 weights and activations against a float32 reference.
BFLOAT16 = {"dtype": "bfloat16", "block_size": 64}
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def odd(gate: str | None = "headwise", **more: Any) -> Any:
    """Widths that no tuned kernel takes, and three heads."""
    edit = tiny_edit("mla", gate=gate, kv_lora_rank=96, qk_rope_head_dim=32, qk_nope_head_dim=48,
                     v_head_dim=64, **more)  # fmt: skip
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 64}
    return tiny_edited("qwen3", edit, hidden_size=256, **heads)


def tuned(gate: str | None = "headwise") -> Any:
    """The widths of DeepSeek's MLA, which tuned kernels are made for."""
    edit = tiny_edit("mla", gate=gate, kv_lora_rank=512, qk_rope_head_dim=64,
                     qk_nope_head_dim=128, v_head_dim=128)  # fmt: skip
    return tiny_edited("qwen3", edit, hidden_size=256, head_dim=128)


def backend_names(worker: Any) -> list[str]:
    """Runs in the engine's process."""
    context = worker.vllm_config.compilation_config.static_forward_context
    return sorted({layer.get_attn_backend().__name__ for layer in context.values()})


def backends(llm: LLM) -> set[str]:
    """The names of the classes that serve the model's attention layers."""
    return set(llm.collective_rpc(backend_names)[0])


@pytest.mark.parametrize("runner", ["0", "1"])
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("gate", ["headwise", "elementwise", None])
def test_ours_equals_the_reference(
    gate: str | None, runner: str, eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """float32, so that the tolerance can be tight; chunks with context, decodes and mixed steps,
    with and without compilation and CUDA graphs."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1" if eager else "0")
    model = odd(gate)
    prompts = random_prompts(LENGTHS)
    with engine(tiny_edited_checkpoint(model, tmp_path), enforce_eager=eager) as llm:
        assert backends(llm) == {"LatentBackend"}
        outputs = generate(llm, prompts, STEPS)
    check(model, prompts, outputs)


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-3), ("bfloat16", 1)])
def test_per_head_norm(
    dtype: str, tolerance: float, eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Factors in float32 beside latents of either dtype."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1" if eager else "0")
    model = odd(qk_norm="per_head")
    prompts = random_prompts(LENGTHS)
    folder = tiny_edited_checkpoint(model, tmp_path)
    with engine(folder, enforce_eager=eager, dtype=dtype) as llm:
        assert backends(llm) == {"LatentBackend"}
        outputs = generate(llm, prompts, STEPS)
    check(model, prompts, outputs, tolerance)


@pytest.mark.skipif(not HOPPER, reason="the tuned kernels were measured on Hopper")
@pytest.mark.parametrize("runner", ["0", "1"])
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("gate", ["headwise", "elementwise"])
def test_vllms_mla_is_as_near_to_the_reference_as_ours(
    gate: str, runner: str, eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """bfloat16, which is all the tuned kernels take. Chunks of 640 tokens: more than go the way of
    decodes, so that prompts meet their cached context."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1" if eager else "0")
    model = tuned(gate)
    folder = tiny_edited_checkpoint(model, tmp_path)
    prompts = random_prompts((*LENGTHS, 1500))
    settings = BFLOAT16 | {"max_num_batched_tokens": 640, "max_model_len": 2048}
    gaps = {}
    for name, options in (("LatentFA3Backend", {}), ("LatentBackend", OURS)):
        with engine(folder, enforce_eager=eager, **settings, **options) as llm:
            assert backends(llm) == {name}
            outputs = generate(llm, prompts, STEPS)
        gaps[name] = [gap(model, p, o) for p, o in zip(prompts, outputs, strict=True)]
    print(f"worst log-probability gaps to the float32 reference: {gaps}")
    fa3, ours = (sum(gaps[name]) for name in ("LatentFA3Backend", "LatentBackend"))
    assert fa3 <= 1.5 * ours and ours <= 1.5 * fa3
    assert max(map(max, gaps.values())) < 1


@pytest.mark.skipif(not HOPPER, reason="FlashMLA needs Hopper")
def test_fp8_pages(tmp_path: Path):
    """FlashMLA stands in for FA3; ours reads the same pages without rounding the query."""
    model = tuned()
    folder = tiny_edited_checkpoint(model, tmp_path)
    prompts = random_prompts(LENGTHS)
    gaps = {}
    for name, options in (("FlashMLABackend", {}), ("LatentBackend", OURS)):
        with engine(folder, kv_cache_dtype="fp8", **BFLOAT16, **options) as llm:
            assert backends(llm) == {name}
            outputs = generate(llm, prompts, STEPS)
        gaps[name] = sum(gap(model, p, o) for p, o in zip(prompts, outputs, strict=True))
    print(f"summed log-probability gaps to the float32 reference: {gaps}")
    assert gaps["LatentBackend"] <= 1.3 * gaps["FlashMLABackend"]


@pytest.mark.parametrize("runner", ["0", "1"])
def test_under_pressure(runner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    model = odd()
    prompts = random_prompts(LENGTHS)
    pressure = {"num_gpu_blocks_override": 40, "max_model_len": 400}
    with engine(tiny_edited_checkpoint(model, tmp_path), **pressure) as llm:
        outputs = generate(llm, prompts, STEPS)
        assert metric(llm, "vllm:num_preemptions") > 0
    check(model, prompts, outputs)


def test_drafts_change_nothing(tmp_path: Path):
    """Repeating prompts, so that n-gram lookup proposes and some drafts are taken."""
    model = odd()
    prompts = [prompt * 3 for prompt in random_prompts((5, 9, 32, 60))]
    folder = tiny_edited_checkpoint(model, tmp_path)
    with engine(folder, speculative_config=NGRAM) as llm:
        outputs = generate(llm, prompts, STEPS)
        assert metric(llm, "vllm:spec_decode_num_draft_tokens") > 0
    check(model, prompts, outputs)
    with engine(folder) as llm:
        plain = generate(llm, prompts, STEPS)
    for with_drafts, without in zip(outputs, plain, strict=True):
        assert with_drafts.outputs[0].token_ids == without.outputs[0].token_ids


@pytest.mark.skipif(not HOPPER, reason="the tuned kernels were measured on Hopper")
def test_drafts_on_vllms_mla(tmp_path: Path):
    model = tuned()
    prompts = [prompt * 3 for prompt in random_prompts((5, 9, 32, 60))]
    with engine(
        tiny_edited_checkpoint(model, tmp_path), speculative_config=NGRAM, **BFLOAT16
    ) as llm:
        assert backends(llm) == {"LatentFA3Backend"}
        outputs = generate(llm, prompts, STEPS)
        assert metric(llm, "vllm:spec_decode_num_draft_tokens") > 0
    check(model, prompts, outputs, tolerance=1)


def test_prefix_hit(tmp_path: Path):
    model = odd()
    shared, a, b = random_prompts([160, 9, 21])
    with engine(tiny_edited_checkpoint(model, tmp_path)) as llm:
        generate(llm, [shared + a], STEPS)
        outputs = generate(llm, [shared + a], STEPS)
        assert outputs[0].num_cached_tokens >= 160 // BLOCK_SIZE * BLOCK_SIZE
        check(model, [shared + a], outputs)
        outputs = [generate(llm, [shared + x], STEPS)[0] for x in (b, b)]
    check(model, [shared + b] * 2, outputs)
