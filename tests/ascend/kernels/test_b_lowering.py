"""Rung b: kernels lowered for a 910B: buffers fit, accesses stay contiguous, numbers are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ascend.kernels.cases import (
    MAX_SCALAR_ACCESSES,
    PAGE,
    POINTERS,
    WIDTH,
    KernelCase,
    gate_case,
    gate_rows_case,
    latent_case,
    window_case,
    write_case,
)
from tests.ascend.kernels.execution import compile_for_cpu, launcher
from tests.ascend.kernels.lowering import CUBE_CORES, MAX_NAME, VECTOR_CORES, to_hivm, to_linalg
from vllm_attnedit.ops.gateswa_decode import gateswa_decode
from vllm_attnedit.ops.kv_write import kv_write
from vllm_attnedit.ops.mla_decode import mla_decode
from vllm_attnedit.ops.sigmoid_gate.reference import gated
from vllm_attnedit.ops.tiles import LOG2E

TOLERANCE = 2e-3
GATES = (0, 1, 2)


def lower(case: KernelCase) -> str:
    return to_linalg(case.kernel, case.constants, POINTERS)


def run(case: KernelCase, folder: Path, cores: int, **arguments: Any) -> None:
    library = compile_for_cpu(lower(case), folder)
    launcher(case.kernel, library, case.constants)(cores, **arguments)


def random(*shape: int) -> torch.Tensor:
    """Small enough that one unit in the last place of bfloat16 stays below the tolerance."""
    return (torch.randn(shape) * 0.3).clamp(-0.9, 0.9).to(torch.bfloat16)


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan, dtype=torch.bfloat16)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.float(), expected.float(), atol=TOLERANCE, rtol=4e-3)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Shapes of Qwen3-8B on one rank and of one on four.
@pytest.mark.parametrize(
    "case",
    [
        *(gate_rows_case(headwise=headwise) for headwise in (True, False)),
        *(gate_case(heads, headwise=headwise) for heads in (8, 32) for headwise in (True, False)),
        *(window_case(8, 4, gate=gate, tile=tile) for gate in GATES for tile in (64, 128)),
        *(window_case(2, group, gate=2, tile=128) for group in (1, 5, 16)),
        *(latent_case(heads, gate=gate) for heads in (8, 32) for gate in (0, 1)),
        *(latent_case(32, gate=0, tile=tile) for tile in (16, 64)),
        write_case(32, 8, store_k=False),
        write_case(8, 2, store_k=True),
    ],
    ids=str,
)
def test_fits_on_the_chip(case, tmp_path):
    linalg = lower(case)
    assert len(case.kernel.fn.__name__) <= MAX_NAME
    hivm = to_hivm(linalg, tmp_path)
    assert not hivm.log
    assert "hivm" in hivm.text
    assert hivm.scalar_accesses <= MAX_SCALAR_ACCESSES


@pytest.mark.parametrize(
    "case",
    [gate_case(256, headwise=False, block=32768), latent_case(32, gate=0, rows=32, tile=32)],
    ids=["gate", "latent"],
)
def test_a_tile_too_large_is_found(case, tmp_path):
    assert "ub overflow" in to_hivm(lower(case), tmp_path).log


@pytest.mark.parametrize("headwise", [True, False])
def test_gate(tmp_path, headwise):
    tokens, heads = 5, 32
    attn, gate = random(tokens, heads, WIDTH), random(tokens, heads * (1 if headwise else WIDTH))
    out = poisoned(tokens, heads, WIDTH)
    run(
        gate_case(heads, headwise=headwise),
        tmp_path,
        VECTOR_CORES,
        attn_ptr=attn,
        gate_ptr=gate,
        out_ptr=out,
        num_tasks=tokens * 2,
        stride_attn_token=heads * WIDTH,
        stride_gate=gate.shape[1],
        stride_out_token=heads * WIDTH,
    )
    assert_close(out, gated(attn, gate))


@pytest.mark.parametrize("headwise", [True, False])
def test_gate_by_rows(tmp_path, headwise):
    """Head-wise logits too are copied, not fetched one by one."""
    tokens, heads = 9, 20
    case = gate_rows_case(headwise=headwise)
    linalg = lower(case)
    assert "ExtractedLoadOrStore" not in linalg
    attn, gate = random(tokens, heads, WIDTH), random(tokens, heads * (1 if headwise else WIDTH))
    out = poisoned(tokens, heads, WIDTH)
    run(case, tmp_path, 3, attn_ptr=attn, gate_ptr=gate, out_ptr=out, num_rows=tokens * heads)
    assert_close(out, gated(attn, gate))


@pytest.mark.parametrize("gate_kind", GATES)
@pytest.mark.parametrize("window", [1, 100, 128, 257])
def test_window_decode(tmp_path, gate_kind, window):
    kv_heads, group = 2, 4
    heads, lengths, blocks = kv_heads * group, [300, 77, 128], 12
    keys, values = (random(blocks, PAGE, kv_heads, WIDTH) for _ in range(2))
    query = random(len(lengths), heads, WIDTH) * 3
    table = torch.randperm(blocks)[:9].view(3, 3).int()
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    starts = torch.arange(4, dtype=torch.int32)
    gate = {0: None, 1: random(3, heads), 2: random(3, heads * WIDTH)}[gate_kind]
    out = poisoned(3, heads, WIDTH)
    run(
        window_case(kv_heads, group, gate=gate_kind, tile=64),
        tmp_path,
        CUBE_CORES,
        q_ptr=query,
        key_ptr=keys,
        value_ptr=values,
        block_table_ptr=table,
        seq_lens_ptr=seq_lens,
        query_start_ptr=starts,
        gate_ptr=query if gate is None else gate,
        out_ptr=out,
        partial_ptr=torch.empty(0),
        partial_lse_ptr=torch.empty(0),
        scale=WIDTH**-0.5 * LOG2E,
        window=window,
        num_tasks=3 * kv_heads,
        num_tokens=3,
        stride_q_token=heads * WIDTH,
        stride_q_head=WIDTH,
        stride_table=3,
        stride_gate=0 if gate is None else gate.shape[1],
        stride_out_token=heads * WIDTH,
        stride_out_head=WIDTH,
    )
    expected = gateswa_decode(
        query,
        keys,
        values,
        table,
        seq_lens,
        starts,
        sliding_window=window,
        scale=WIDTH**-0.5,
        gate=gate,
    )
    assert_close(out, expected)


@pytest.mark.parametrize("gated_heads", [False, True])
def test_latent_decode(tmp_path, gated_heads):
    heads, rank, rope, lengths, blocks = 20, 512, 64, [300, 77, 128], 12
    cache = random(blocks, PAGE, rank + rope)
    query, query_rope = random(3, heads, rank), random(3, heads, rope)
    table = torch.randperm(blocks)[:9].view(3, 3).int()
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    starts = torch.arange(4, dtype=torch.int32)
    gate = random(3, heads) if gated_heads else None
    out, scale = poisoned(3, heads, rank), 192**-0.5
    case = latent_case(heads, gate=int(gated_heads))
    run(
        case,
        tmp_path,
        CUBE_CORES,
        q_latent_ptr=query,
        q_rope_ptr=query_rope,
        cache_ptr=cache,
        block_table_ptr=table,
        seq_lens_ptr=seq_lens,
        query_start_ptr=starts,
        gate_ptr=query if gate is None else gate,
        out_ptr=out,
        partial_ptr=torch.empty(0),
        partial_lse_ptr=torch.empty(0),
        scale=scale * LOG2E,
        num_tasks=3 * case.constants["QUERY_TILES"],
        num_tokens=3,
        stride_latent_token=heads * rank,
        stride_latent_head=rank,
        stride_rope_token=heads * rope,
        stride_rope_head=rope,
        stride_table=3,
        stride_gate=heads if gated_heads else 0,
        stride_out_token=heads * rank,
        stride_out_head=rank,
    )
    expected = mla_decode(
        query, query_rope, cache, table, seq_lens, starts, scale=scale, max_seq_len=300, gate=gate
    )
    assert_close(out, expected)


@pytest.mark.parametrize("store_k", [False, True])
def test_kv_write(tmp_path, store_k):
    tokens, heads, kv_heads, blocks = 6, 8, 2, 3
    query, key, value = (random(tokens, n, WIDTH) for n in (heads, kv_heads, kv_heads))
    pages = [random(blocks, PAGE, kv_heads, WIDTH) for _ in range(2)]
    expected_pages = [page.clone() for page in pages]
    slots = torch.tensor([130, 300, 5, 131, 383, -1], dtype=torch.int32)
    positions = torch.randint(0, 50, (tokens,))
    angles = torch.outer(torch.arange(50.0), 1e4 ** -(torch.arange(0, WIDTH, 2) / WIDTH))
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1).to(torch.bfloat16)
    q_weight, k_weight = (1 + random(WIDTH) for _ in range(2))
    q_out, k_out = poisoned(tokens, heads, WIDTH), poisoned(tokens, kv_heads, WIDTH)
    case = write_case(heads, kv_heads, store_k=store_k)
    run(
        case,
        tmp_path,
        VECTOR_CORES,
        q_ptr=query,
        k_ptr=key,
        v_ptr=value,
        key_ptr=pages[0],
        value_ptr=pages[1],
        slot_ptr=slots,
        position_ptr=positions,
        cos_sin_ptr=cos_sin,
        q_weight_ptr=q_weight,
        k_weight_ptr=k_weight,
        q_out_ptr=q_out,
        k_out_ptr=k_out,
        eps=1e-6,
        num_slots=tokens,
        num_tasks=tokens * 3,
        stride_q_token=heads * WIDTH,
        stride_q_head=WIDTH,
        stride_k_token=kv_heads * WIDTH,
        stride_k_head=WIDTH,
        stride_v_token=kv_heads * WIDTH,
        stride_v_head=WIDTH,
        stride_q_out_token=heads * WIDTH,
        stride_q_out_head=WIDTH,
        stride_k_out_token=kv_heads * WIDTH,
        stride_k_out_head=WIDTH,
        stride_cos_sin=WIDTH,
    )
    wanted_q = torch.empty_like(q_out)
    wanted_k = torch.empty_like(k_out) if store_k else None
    kv_write(
        query,
        key,
        value,
        expected_pages[0],
        expected_pages[1],
        slots.long(),
        positions=positions,
        cos_sin_cache=cos_sin,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=1e-6,
        q_out=wanted_q,
        k_out=wanted_k,
    )
    torch.testing.assert_close(q_out, wanted_q, atol=TOLERANCE, rtol=8e-3)
    if wanted_k is not None:
        torch.testing.assert_close(k_out, wanted_k, atol=TOLERANCE, rtol=8e-3)
    for found, wanted in zip(pages, expected_pages):
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=8e-3)
