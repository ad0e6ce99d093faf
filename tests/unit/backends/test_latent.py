"""Latent backends: prompts, chunks, decodes, drafts and their mixtures against the naive form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.backends import latent_case
from tests.unit.backends.latent_case import B, Case
from tests.unit.ops.conftest import interpreted  # noqa: F401  the worker that interprets Triton
from vllm_attnedit.backends.latent_steps import context_parts

# Prompts; a chunk beside decodes and a short extension; drafts of four; single tokens. Contexts
# are several parts long, and one part holds pieces of two requests.
STEPS = (
    ((0, 40), (0, 5), (0, 20), (0, 0)),
    ((40, 33), (5, 1), (20, 18), (0, 50)),
    ((73, 4), (6, 4), (38, 4), (50, 4)),
    ((77, 1), (10, 1), (42, 17), (54, 1)),
    ((78, 1), (11, 1), (59, 1), (55, 1)),
)
BOUNDS = {"fp32": 1e-5, "fp16": 3e-3, "bf16": 2e-2}


@pytest.mark.parametrize("backend", ["latent:LatentBackend", "latent_cpu:LatentCPUBackend"])
@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("context_tokens", [1, 24, 1000])
def test_steps_equal_the_naive_form(backend: str, heads: int, context_tokens: int):
    case = Case(STEPS, heads=heads, context_tokens=context_tokens, backend=backend)
    assert latent_case.run(case) < BOUNDS["fp32"]


@pytest.mark.parametrize("backend", ["latent:LatentBackend", "latent_cpu:LatentCPUBackend"])
@pytest.mark.parametrize("normed", [False, True])
def test_half_precision(backend: str, normed: bool):
    case = Case(STEPS, dtype="fp16", backend=backend, normed=normed)
    assert latent_case.run(case) < BOUNDS["fp16"]


@pytest.mark.parametrize("backend", ["latent:LatentBackend", "latent_cpu:LatentCPUBackend"])
def test_per_head_factors(backend: str):
    assert latent_case.run(Case(STEPS, backend=backend, normed=True)) < BOUNDS["fp32"]


@pytest.mark.parametrize("backend", ["latent:LatentBackend", "latent_cpu:LatentCPUBackend"])
def test_an_fp8_cache_is_read_with_its_scale(backend: str):
    # The chunk's own latents are not rounded, those read back are: near, not equal.
    error = latent_case.run(Case(STEPS, kv_cache_dtype="fp8", backend=backend))
    assert error < 0.05


@pytest.mark.parametrize(
    "case",
    [
        Case(STEPS, operators="triton"),
        Case(STEPS, operators="triton", rank=48, heads=5, dtype="fp16"),
        Case(STEPS, operators="triton", normed=True),
        Case(STEPS, operators="triton", dtype="fp16", normed=True),
        Case(STEPS, operators="triton", rank=512, heads=2, context_tokens=1000),
    ],
    ids=["fp32", "odd", "normed", "normed-fp16", "wide"],
)
def test_triton_operators_equal_the_naive_form(
    interpreted: Callable[..., Any],  # noqa: F811
    case: Case,
):
    assert interpreted(latent_case.run, case) < BOUNDS[case.dtype]


def test_contexts_are_cut_without_loss():
    parts = context_parts([5, 0, 12, 3], 8)
    assert parts == [[(0, 0, 5), (2, 0, 3)], [(2, 3, 11)], [(2, 11, 12), (3, 0, 3)]]
    assert context_parts([0, 0], 8) == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("way", ["fused", "products", "normed"])
@pytest.mark.parametrize("tile", [1, 5 * B * 80 * 4, 1 << 20])
def test_cpu_tiles_of_any_size(
    tile: int, way: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a page at a time, every sequence in several stretches, to all of a batch at once."""
    from vllm_attnedit.ops.mla_decode import cpu

    monkeypatch.setattr(cpu, "TILE_BYTES", tile)
    monkeypatch.setattr(cpu, "fused_is_faster", lambda _: way != "products")
    backend = "latent_cpu:LatentCPUBackend"
    case = Case(STEPS, backend=backend, dtype=dtype, normed=way == "normed")
    assert latent_case.run(case) < BOUNDS[dtype]


def test_cpu_groups_hold_every_key_once():
    from vllm_attnedit.ops.mla_decode.cpu_groups import groups

    query_lens, seq_lens = [1, 1, 0, 4, 1, 1], [70, 16, 40, 33, 17, 0]
    made = list(groups(query_lens, seq_lens, page=16, most=50))
    held = [s for group in made for s in group.stretches]
    assert sorted((s.request, s.start, s.stop) for s in held) == [
        (0, 0, 48), (0, 48, 70), (1, 0, 16), (3, 0, 33), (4, 0, 17),
    ]  # fmt: skip
    for group in made:
        lengths = [s.stop - s.start for s in group.stretches]
        assert lengths == sorted(lengths, reverse=True)
        assert len(lengths) * -(-lengths[0] // 16) * 16 <= 48
        assert {query_lens[s.request] for s in group.stretches} == {group.query_len}
