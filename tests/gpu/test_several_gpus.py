"""A model split over all GPUs, and one with a copy on each, against the same model on one GPU.

python -m pytest -m gpu tests/gpu/test_several_gpus.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, RequestOutput

from tests.gpu.against_reference import check, gap
from tests.integration.engine import engine, generate, random_prompts, reference
from tests.integration.test_data_parallel import ask, copies, generated
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.accounting import kv_bytes_per_token

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(GPUS < 2, reason="needs two GPUs"),
]

WINDOW = 32
LENGTHS = (1, 7, WINDOW, WINDOW + 1, 100, 333)
STEPS = 48


def full_size(target: str) -> Any:
    """Heads as wide as a large model's, which every kernel takes; four a GPU, two of them of KV."""
    heads = {"num_attention_heads": 4 * GPUS, "num_key_value_heads": 2 * GPUS, "head_dim": 128}
    if target == "gateswa":
        edit = tiny_edit(target, gate="headwise", window=WINDOW)
    else:
        edit = tiny_edit(target, gate="headwise", kv_lora_rank=512, qk_rope_head_dim=64,
                         qk_nope_head_dim=128, v_head_dim=128)  # fmt: skip
    return tiny_edited("qwen3", edit, hidden_size=256, **heads)


def attention(worker: Any) -> tuple[list[str], float]:
    """Runs in each GPU's process: its backends, and its bytes of KV cache a block."""
    context = worker.vllm_config.compilation_config.static_forward_context
    names = sorted({layer.get_attn_backend().__name__ for layer in context.values()})
    held = {}
    for layer in context.values():
        cache = layer.kv_cache
        for tensor in [cache] if hasattr(cache, "untyped_storage") else cache:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return names, sum(held.values()) / worker.vllm_config.cache_config.num_gpu_blocks


def served(
    folder: Path, gpus: int, **settings: Any
) -> tuple[list[RequestOutput], list[tuple[list[str], float]]]:
    """Outputs, and what every GPU says of its attention."""
    with engine(folder, tensor_parallel_size=gpus, **settings) as llm:
        outputs = generate(llm, random_prompts(LENGTHS), STEPS)
        return outputs, _of_every_gpu(llm)


def _of_every_gpu(llm: LLM) -> list[tuple[list[str], float]]:
    return [(list(names), held) for names, held in llm.collective_rpc(attention)]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_split_gives_the_tokens_of_one(
    target: str, eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """float32: only the order of the sums over GPUs differs. With and without CUDA graphs."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1" if eager else "0")
    model = full_size(target)
    folder = tiny_edited_checkpoint(model, tmp_path / "model")
    one, (alone,) = served(folder, 1, enforce_eager=eager)
    several, each = served(folder, GPUS, enforce_eager=eager)
    assert tokens(several) == tokens(one)
    check(model, random_prompts(LENGTHS), several)
    assert len(each) == GPUS
    assert all(names == alone[0] for names, _ in each)
    if target == "gateswa":
        assert all(held == alone[1] / GPUS for _, held in each)
        return
    # One group of layers: a block holds its tokens' latents of all of them, on every GPU.
    for _, held in (alone, *each):
        assert held == 16 * kv_bytes_per_token(model.config, kv_dtype="fp32", tp=GPUS)


@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_split_in_bfloat16_is_as_near_to_the_reference_as_one(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The kernels that a large model gets; two candidates closer than the rounding may swap."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    model = full_size(target)
    folder = tiny_edited_checkpoint(model, tmp_path / "model")
    settings = {"dtype": "bfloat16", "enforce_eager": False}
    settings |= {"block_size": 64} if target == "mla" else {}
    gaps, names = {}, {}
    for gpus in (1, GPUS):
        outputs, each = served(folder, gpus, **settings)
        names[gpus] = {name for found, _ in each for name in found}
        gaps[gpus] = [
            gap(model, p, o) for p, o in zip(random_prompts(LENGTHS), outputs, strict=True)
        ]
    print(f"backends {names[1]}; worst log-probability gaps to the float32 reference: {gaps}")
    assert names[1] == names[GPUS]
    assert sum(gaps[GPUS]) <= 1.5 * sum(gaps[1])
    assert max(gaps[GPUS]) < 1


@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_copies_give_the_tokens_of_one(target: str, tmp_path: Path):
    """float32, a copy on each GPU, two requests for each."""
    model = full_size(target)
    folder = tiny_edited_checkpoint(model, tmp_path / "model")
    prompts = random_prompts([9 + 13 * i for i in range(2 * GPUS)])
    memory = {"gpu_memory_utilization": 0.05, "arguments": ("--kv-cache-memory-bytes", "1G")}
    with copies(folder, tmp_path / "log", GPUS, **memory) as url:
        answers = ask(url, prompts, STEPS)
        engines = generated(url)
    assert len(engines) == GPUS and all(engines.values())
    assert answers == [reference(model, prompt, STEPS).tokens for prompt in prompts]
