"""Window layers on this project's backend and allocation against stock, in the real engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager

from tests.integration.engine import (
    assert_equal,
    engine,
    generate,
    greedy,
    metric,
    random_prompts,
    reference,
)
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.config import FULL, SLIDING
from vllm_attnedit.kv_cache.manager import GateSWAManager

pytestmark = pytest.mark.integration

WINDOW = 16
PACKED = {"additional_config": {"attnedit_window_pages": "packed"}}
STOCK = {"additional_config": {"attnedit_window_backend": "stock"}}


@pytest.fixture(scope="module")
def model():
    return tiny_edited("qwen3", tiny_edit("gateswa", window=WINDOW, gate="elementwise"))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_edited_checkpoint(model, tmp_path_factory.mktemp("window"))


def managers(llm) -> list[type]:
    core = llm.llm_engine.engine_core.engine_core
    return [type(m) for m in core.scheduler.kv_cache_manager.coordinator.single_type_managers]


def test_stock_allocation_gives_the_same_under_preemption(model, folder: Path):
    prompts = random_prompts([*[20] * 7, 120])
    pressure = {"num_gpu_blocks_override": 75, "max_model_len": 200}
    with engine(folder, **pressure) as llm:
        assert managers(llm).count(GateSWAManager) == 3
        ours = generate(llm, prompts)
        assert metric(llm, "vllm:num_preemptions") > 0
    with engine(folder, **pressure, **STOCK) as llm:
        assert GateSWAManager not in managers(llm)
        assert managers(llm).count(SlidingWindowManager) == 3
        stock = generate(llm, prompts)
    for prompt, a, b in zip(prompts, ours, stock, strict=True):
        expected = reference(model, prompt)
        assert_equal(a, expected)
        assert_equal(b, expected)


def test_more_requests_run_at_once(folder: Path):
    """The same memory; prompts many chunks long."""
    running = {}
    for name, options in (("ours", {}), ("stock", STOCK)):
        with engine(
            folder, num_gpu_blocks_override=170, max_num_batched_tokens=256, **options
        ) as llm:
            inputs = random_prompts([400] * 8)
            for i, prompt in enumerate(inputs):
                llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, greedy(100))
            most = 0
            for _ in range(40):
                llm.llm_engine.step()
                if not metric(llm, "vllm:num_preemptions"):
                    most = max(most, int(metric(llm, "vllm:num_requests_running")))
            running[name] = most
            llm.llm_engine.abort_request([str(i) for i in range(8)])
    assert running["ours"] > running["stock"]


def test_hybrid_manager_off_falls_back(model, folder: Path):
    prompts = random_prompts([5, 100])
    with engine(folder, disable_hybrid_kv_cache_manager=True) as llm:
        assert GateSWAManager not in managers(llm)
        outputs = generate(llm, prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_equal(output, reference(model, prompt))


def test_packed_pages_give_the_same(model, folder: Path):
    """One window group, under preemption, with chunks, and on a hit of a shared prefix."""
    prompts = random_prompts([*[20] * 7, 120])
    with engine(folder, num_gpu_blocks_override=22, max_model_len=200, **PACKED) as llm:
        assert managers(llm).count(GateSWAManager) == 1 and len(managers(llm)) == 2
        outputs = generate(llm, prompts)
        assert metric(llm, "vllm:num_preemptions") > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_equal(output, reference(model, prompt))
    shared, a, b = random_prompts([130, 9, 21], seed=1)
    with engine(folder, **PACKED) as llm:
        for prompt, least in ((shared + a, 0), (shared + a, 96), (shared + b, 96)):
            [output] = generate(llm, [prompt])
            assert output.num_cached_tokens >= least and output.num_cached_tokens % 48 == 0
            assert_equal(output, reference(model, prompt))


def test_packing_falls_back_where_layers_do_not_divide(tmp_path: Path):
    types = (SLIDING, FULL, SLIDING, SLIDING, FULL)
    edit = tiny_edit("gateswa", window=WINDOW, layers=5, layer_types=types)
    uneven = tiny_edited("llama", edit, num_hidden_layers=5)
    prompts = random_prompts([5, 100])
    with engine(tiny_edited_checkpoint(uneven, tmp_path), **PACKED) as llm:
        assert managers(llm).count(GateSWAManager) >= 2
        outputs = generate(llm, prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_equal(output, reference(uneven, prompt))
