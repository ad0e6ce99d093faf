"""Rung a: kernels against their oracles in Triton for Ascend's interpreter.

The unit tests do the same in the other Triton's. FP8 is left out: Triton for Ascend has none.
"""

from __future__ import annotations

import pytest
import triton
from hypothesis import HealthCheck, given, settings

from tests.unit.ops import measure
from tests.unit.ops import test_kernels_interpreted as shared
from tests.unit.ops.batches import BOUNDS
from tests.unit.ops.conftest import interpreted
from tests.unit.ops.measure import GateCase, LatentCase, WriteCase
from tests.unit.ops.test_ascend_gate import gate_rows_error

__all__ = ["interpreted"]

sampled = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


def test_this_is_the_other_triton():
    assert "ascend" in triton.backends.backends


@given(case=shared.window_cases(4, shared.decode_configs).filter(lambda case: not case.fp8))
@sampled
def test_gateswa_decode(interpreted, case):
    assert interpreted(measure.decode_error, case) < BOUNDS[case.dtype]


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("config", [{}, {"rows": 16, "tile": 16, "splits": 4, "aligned": True}])
@pytest.mark.parametrize("gated", [False, True])
def test_mla_decode(interpreted, dtype, config, gated):
    for heads, block in ((3, 16), (20, 64)):
        case = LatentCase(
            rank=64,
            rope=32,
            heads=heads,
            block=block,
            dtype=dtype,
            gated=gated,
            requests=((70, 1), (0, 0), (17, 3)),
            config=config,
        )
        assert interpreted(measure.latent_decode_error, case) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("rotary", [0, 48, 64])
@pytest.mark.parametrize("store_k", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_kv_write(interpreted, dtype, rotary, store_k, norm):
    case = WriteCase(
        heads=9, kv_heads=2, head_dim=64, rotary=rotary, norm=norm, dtype=dtype, store_k=store_k
    )
    assert interpreted(measure.write_error, case) < BOUNDS[dtype]


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
def test_sigmoid_gate(interpreted, elementwise, contiguous):
    case = GateCase(3, 32, 128, elementwise, contiguous=contiguous, in_place=False)
    assert interpreted(measure.gate_error, case) < BOUNDS["fp32"]


@pytest.mark.parametrize("headwise", [True, False])
def test_gate_rows(interpreted, headwise):
    for tokens, heads, width in ((1, 1, 16), (7, 5, 64), (40, 32, 128)):
        assert interpreted(gate_rows_error, tokens, heads, width, headwise) < 1e-6
