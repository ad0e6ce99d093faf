"""What the specification promises to start-up sizing and admission."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from vllm_attnedit import AttnEditError
from vllm_attnedit.kv_cache.spec import GateSWASpec
from vllm_attnedit.layers import window as window_layer
from vllm_attnedit.layers.window import BACKEND_OPTION, kernel_reason, stock_reason

SHAPE: dict[str, Any] = {
    "block_size": 16,
    "num_kv_heads": 8,
    "head_size": 128,
    "dtype": torch.bfloat16,
}


def engine_config(length: int, chunk: int) -> SimpleNamespace:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        model_config=SimpleNamespace(max_model_len=length),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=chunk),
    )


def concurrency(window: KVCacheSpec | None, length: int, chunk: int, gib: int = 40) -> float:
    """vLLM's figure for 6 full and 30 window layers: memory over what one request may need."""
    config = engine_config(length, chunk)
    full = FullAttentionSpec(**SHAPE).max_memory_usage_bytes(config)
    other = full if window is None else window.max_memory_usage_bytes(config)
    return gib * 2**30 / (6 * full + 30 * other)


@pytest.mark.parametrize("chunk", [512, 8192, 16384])
def test_reported_concurrency(chunk: int):
    ours = concurrency(GateSWASpec(sliding_window=128, **SHAPE), 32_768, chunk)
    assert ours >= 45
    assert concurrency(None, 32_768, chunk) == pytest.approx(8.9, abs=0.1)
    if chunk == 8192:
        stock = concurrency(SlidingWindowSpec(sliding_window=128, **SHAPE), 32_768, chunk)
        assert stock == pytest.approx(23.5, abs=0.1)
        assert ours >= 2 * stock


@pytest.mark.parametrize("window", [1, 2, 16, 17, 128, 4096])
def test_blocks_follow_the_window_alone(window: int):
    spec = GateSWASpec(sliding_window=window, **SHAPE)
    for chunk in (16, 8192):
        blocks = spec.max_admission_blocks_per_request(chunk, 131_072)
        assert blocks == cdiv(window - 1, 16) + 2
    assert spec.max_admission_blocks_per_request(8192, 40) <= cdiv(40, 16) + 1


def settings(**changes) -> SimpleNamespace:
    config = SimpleNamespace(
        additional_config={},
        kv_transfer_config=None,
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, use_ubatching=False),
    )
    for path, value in changes.items():
        *parents, name = path.split("__")
        target = config
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, value)
    return config


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"additional_config": {BACKEND_OPTION: "stock"}}, "is stock"),
        ({"kv_transfer_config": object()}, "KV connector"),
        ({"scheduler_config__disable_hybrid_kv_cache_manager": True}, "hybrid KV-cache manager"),
        ({"parallel_config__use_ubatching": True}, "micro-batching"),
    ],
)
def test_when_stock_attention_serves(changes: dict, reason: str | None):
    found = stock_reason(settings(**changes))
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parallel_config__decode_context_parallel_size": 2},
            "--decode-context-parallel-size: 2: use 1",
        ),
        ({"additional_config": {BACKEND_OPTION: "fast"}}, f"{BACKEND_OPTION}: fast: use auto or"),
    ],
)
def test_bad_settings_are_refused_by_name(changes: dict, message: str):
    with pytest.raises(AttnEditError) as caught:
        stock_reason(settings(**changes))
    assert message in str(caught.value)


def cuda_settings(
    cache_dtype: str = "auto",
    head_dim: int = 128,
    block_size: int | None = 16,
    calculate_kv_scales: bool = False,
):
    return SimpleNamespace(
        cache_config=SimpleNamespace(
            cache_dtype=cache_dtype, block_size=block_size, calculate_kv_scales=calculate_kv_scales
        ),
        model_config=SimpleNamespace(get_head_size=lambda: head_dim),
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"cache_dtype": "fp8", "block_size": None}, None),
        ({"cache_dtype": "fp8_e5m2"}, "do not read a KV cache of fp8_e5m2"),
        ({"cache_dtype": "int8_per_token_head"}, "int8_per_token_head"),
        ({"head_dim": 512}, "do not take heads of 512"),
        ({"head_dim": 72}, "do not take heads of 72"),
        ({"cache_dtype": "fp8", "calculate_kv_scales": True}, "--calculate-kv-scales"),
    ],
)
def test_what_the_cuda_kernels_leave_to_stock(
    changes: dict, reason: str | None, monkeypatch: pytest.MonkeyPatch
):
    platform = SimpleNamespace(has_device_capability=lambda number: number <= 90)
    monkeypatch.setattr(window_layer, "current_platform", platform)
    found = kernel_reason(cuda_settings(**changes))
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


def test_fp8_needs_a_device_that_has_it(monkeypatch: pytest.MonkeyPatch):
    platform = SimpleNamespace(has_device_capability=lambda number: number <= 86)
    monkeypatch.setattr(window_layer, "current_platform", platform)
    assert "8.9" in str(kernel_reason(cuda_settings(cache_dtype="fp8")))
    assert kernel_reason(cuda_settings()) is None


def test_batch_invariance_is_left_to_stock(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert "depends on the batch" in str(kernel_reason(cuda_settings()))


def test_a_block_size_no_kernel_takes_is_refused():
    with pytest.raises(AttnEditError, match="--block-size: 24: use a multiple of 16"):
        kernel_reason(cuda_settings(block_size=24))
