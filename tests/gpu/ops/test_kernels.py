"""Kernels against their oracles on a GPU, in full.

Every head width meets every window and dtype; group, block size, layout, gate and quantisation
cycle beside them with periods that share no factor, so that their pairs come up as well.
``pytest -n 8`` compiles the variants side by side.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.unit.ops import measure
from tests.unit.ops.batches import BOUNDS, DTYPES, GATES, LAYOUTS, WindowCase, window_batch
from tests.unit.ops.measure import ExpandedCase, GateCase, LatentCase, WriteCase
from vllm_attnedit.ops.gateswa_decode import gateswa_decode
from vllm_attnedit.ops.gateswa_prefill import gateswa_prefill
from vllm_attnedit.ops.mla_decode import mla_decode

pytestmark = pytest.mark.gpu

HEAD_DIMS = (64, 96, 128, 192, 256)
GROUPS = (1, 2, 3, 4, 5, 7, 8, 12, 16)
BLOCKS = (16, 32, 64, 128)
WINDOWS = (1, 2, 15, 16, 17, 127, 128, 129, 512, 4096)


def cycle(values, index):
    return values[index % len(values)]


def decode_requests(window: int, seed: int):
    """Shorter than the window, equal, far past it; empty, one token, one to four queries."""
    lengths = (1, 2, max(1, window - 1), window, window + 1, 3 * window + 5, window + 700)
    steps = (1, 1, 2, 1, 3, 1, 4) if seed % 2 else (1,) * 7
    return ((0, 0), *((n, min(n, s)) for n, s in zip(lengths, steps)), (9, 0), (window + 33, 1))


def chunk_requests(window: int):
    """Prompts, chunks past a cached prefix, single tokens, empty ones."""
    return (
        (1, 1),
        (130, 130),
        (0, 0),
        (window + 77, 1),
        (window + 300, 77),
        (2 * window + 40, min(2 * window, 200)),
        (67, 5),
    )


def window_grid(requests):
    grid = itertools.product(HEAD_DIMS, WINDOWS, DTYPES)
    for index, (head_dim, window, dtype) in enumerate(grid):
        yield WindowCase(
            head_dim=head_dim,
            group=cycle(GROUPS, index),
            kv_heads=cycle((2, 1, 3, 8), index // 2),
            block=cycle(BLOCKS, index // 3),
            window=window,
            dtype=dtype,
            gate=cycle(GATES, index // 5),
            layout=cycle(LAYOUTS, index // 7),
            requests=requests(window, index) if requests is decode_requests else requests(window),
            fp8=dtype != "fp32" and index % 11 == 0,
            seed=index,
        )


@pytest.mark.parametrize("case", list(window_grid(decode_requests)), ids=str)
def test_gateswa_decode(case):
    assert measure.decode_error(case, "cuda") < BOUNDS[case.dtype]


@pytest.mark.parametrize("splits", [2, 4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", GATES)
def test_gateswa_decode_split_over_programs(splits, dtype, gate):
    case = WindowCase(
        head_dim=128,
        block=32,
        window=600,
        dtype=dtype,
        gate=gate,
        requests=((1, 1), (599, 1), (2000, 3), (0, 0), (601, 1)),
        config={"rows": 16, "tile": 32, "splits": splits, "aligned": splits == 4},
    )
    assert measure.decode_error(case, "cuda") < BOUNDS[dtype]


HOPPER_CASES = [
    WindowCase(
        head_dim=head_dim,
        group=group,
        kv_heads=cycle((2, 1, 8), index),
        block=cycle((16, 64, 32), index),
        window=window,
        dtype=cycle(("bf16", "fp16"), index),
        gate=cycle(GATES, index // 2),
        layout=cycle(LAYOUTS, index // 3),
        requests=decode_requests(window, 1 if group <= 4 else 0),
        fp8=index % 5 == 0,
        seed=index,
        config={
            "rows": 16,
            "tile": tile,
            "single": window + 3 <= tile,
            "warps": 8 if tile == 128 and index // 2 % 2 else 4,
        },
    )
    for index, (head_dim, group, window, tile) in enumerate(
        itertools.product((64, 96, 128), (1, 3, 4, 8), (1, 61, 125, 128, 700), (64, 128))
    )
]


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="the kernel is for Hopper GPUs",
)
@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_gateswa_decode_hopper(case):
    assert measure.decode_error(case, "cuda") < BOUNDS[case.dtype]


@pytest.mark.parametrize("batch", [1, 16, 200])
@pytest.mark.parametrize("window", [128, 1024, 4096])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_gateswa_decode_with_the_launch_of_each_batch_size(batch, window, dtype):
    """The table's own choices: splits, tiles and whatever is special to a device."""
    case = WindowCase(
        head_dim=128,
        kv_heads=8,
        window=window,
        dtype=dtype,
        gate="headwise",
        requests=tuple((1 + (window + 37) * i // max(1, batch - 1), 1) for i in range(batch)),
    )
    assert measure.decode_error(case, "cuda") < BOUNDS[dtype]


@pytest.mark.parametrize("case", list(window_grid(chunk_requests)), ids=str)
def test_gateswa_prefill(case):
    assert measure.prefill_error(case, "cuda") < BOUNDS[case.dtype]


LATENT_CASES = [
    LatentCase(
        rank=rank,
        rope=rope,
        heads=heads,
        block=cycle(BLOCKS, index),
        dtype=dtype,
        gated=bool(index % 2),
        normed=index % 4 == 2,
        requests=((1, 1), (64, 1), (65, 2), (0, 0), (3000, 1), (900, 4)),
        fp8=dtype != "fp32" and index % 5 == 0,
        seed=index,
        config=cycle(({}, {"rows": 16, "tile": 16, "splits": 8}), index // 3),
    )
    for index, (((rank, rope), heads), dtype) in enumerate(
        itertools.product(
            itertools.product(((512, 64), (384, 64), (128, 32), (80, 16)), (1, 7, 16, 32, 128)),
            DTYPES,
        )
    )
]


@pytest.mark.parametrize("case", LATENT_CASES, ids=str)
def test_mla_decode(case):
    assert measure.latent_decode_error(case, "cuda") < BOUNDS[case.dtype]


EXPANDED_CASES = [
    ExpandedCase(
        nope=nope,
        rope=rope,
        value=value,
        heads=cycle((1, 3, 8), index),
        dtype=dtype,
        gate=cycle(GATES, index // 2),
        causal=index % 4 != 3,
        normed=index % 5 == 2,
        requests=((1, 1), (300, 7), (0, 0), (333, 333), (700, 130)),
        seed=index,
    )
    for index, ((nope, rope, value), dtype) in enumerate(
        itertools.product(
            ((128, 64, 128), (64, 32, 64), (96, 16, 48), (192, 64, 128), (256, 64, 256)), DTYPES
        )
    )
]


@pytest.mark.parametrize("case", EXPANDED_CASES, ids=str)
def test_mla_prefill(case):
    assert measure.latent_prefill_error(case, "cuda") < BOUNDS[case.dtype]


WRITE_CASES = [
    WriteCase(
        heads=cycle((32, 9, 1), index),
        kv_heads=cycle((8, 2, 3), index // 2),
        head_dim=head_dim,
        rotary=head_dim if index % 3 else 32,
        is_neox=index % 4 != 0,
        norm=index % 5 != 0,
        block=block,
        dtype=dtype,
        layout=cycle(LAYOUTS, index),
        tokens=cycle((1, 77, 300), index),
        in_place=index % 2 == 0,
        store_k=index % 7 != 0,
        with_q=index % 6 != 0,
        fp8=index % 4 == 1,
        seed=index,
    )
    for index, (head_dim, block, dtype) in enumerate(itertools.product(HEAD_DIMS, BLOCKS, DTYPES))
]


@pytest.mark.parametrize("case", WRITE_CASES, ids=str)
def test_kv_write(case):
    # A step of FP8 is 6% to 12%: one entry that falls to the other side of a tie shows.
    bound = 1e-2 if case.fp8 else BOUNDS[case.dtype]
    assert measure.write_error(case, "cuda") < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
def test_sigmoid_gate(dtype, elementwise, contiguous):
    for tokens, heads, width in ((1, 1, 16), (300, 32, 128), (77, 3, 96)):
        case = GateCase(tokens, heads, width, elementwise, dtype, contiguous)
        assert measure.gate_error(case, "cuda") < BOUNDS[dtype]


def test_operators_are_captured_in_a_graph_and_follow_new_lengths():
    """No host reads and no sizes from the device: a replay sees what the tensors hold then."""
    case = WindowCase(head_dim=128, window=128, dtype="bf16", requests=((300, 1),) * 4)
    batch = window_batch(case, "cuda", chunk_in_cache=True)
    decode_out, prefill_out = torch.empty_like(batch.q), torch.empty_like(batch.q)
    latent_out = batch.q.new_empty((*batch.q.shape[:2], 64))
    latent_cache = torch.randn_like(batch.key_cache[:, :, 0, :80].contiguous())
    metadata = (batch.block_table, batch.seq_lens, batch.query_start_loc)

    def run():
        caches = (batch.key_cache, batch.value_cache)
        options: dict[str, Any] = {"sliding_window": 100, "scale": 0.1}
        gateswa_decode(batch.q, *caches, *metadata, out=decode_out, **options)
        gateswa_prefill(batch.q, batch.k, batch.v, *caches, *metadata, out=prefill_out, **options)
        mla_decode(
            batch.q[..., :64],
            batch.q[..., 64:80],
            latent_cache,
            *metadata,
            scale=0.1,
            max_seq_len=4096,
            out=latent_out,
        )

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    batch.seq_lens.sub_(7)
    outputs = (decode_out, prefill_out, latent_out)
    graph.replay()
    replayed = [x[:4].clone() for x in outputs]
    run()
    for got, expected in zip(replayed, outputs):
        assert torch.equal(got, expected[:4])
        assert got.isfinite().all()
