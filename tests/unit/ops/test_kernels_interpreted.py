"""Triton kernels against their oracles, small, in Triton's interpreter."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.ops import measure
from tests.unit.ops.batches import BOUNDS, GATES, LAYOUTS, WindowCase
from tests.unit.ops.measure import ExpandedCase, GateCase, LatentCase, WriteCase

# Shapes vary more than data: many small examples; the same ones in every run.
sampled = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

windows = st.sampled_from([1, 2, 15, 16, 17, 40, 70])
dtypes = st.sampled_from(["fp16", "fp32"])
gates = st.sampled_from(GATES)
blocks = st.sampled_from([16, 32, 48, 64])
seeds = st.integers(0, 2**31)


@st.composite
def steps(draw: st.DrawFn, longest_step: int, longest: int = 90) -> tuple[tuple[int, int], ...]:
    """(tokens, tokens of this step) of one to four requests, empty ones among them."""
    drawn = []
    for _ in range(draw(st.integers(1, 4))):
        step = draw(st.integers(0, longest_step))
        drawn.append((step + draw(st.integers(0, longest - longest_step)) * bool(step), step))
    return tuple(drawn) if any(step for _, step in drawn) else ((7, 1), *drawn)


def window_cases(longest_step: int, configs: st.SearchStrategy[dict]) -> st.SearchStrategy:
    return st.builds(
        WindowCase,
        head_dim=st.sampled_from([16, 64, 96]),
        group=st.sampled_from([1, 2, 3, 4, 7, 16]),
        kv_heads=st.integers(1, 2),
        block=blocks,
        window=windows,
        dtype=dtypes,
        gate=gates,
        layout=st.sampled_from(LAYOUTS),
        requests=steps(longest_step),
        fp8=st.booleans(),
        seed=seeds,
        config=configs,
    )


decode_configs: st.SearchStrategy[dict] = st.one_of(
    st.just({}),
    st.builds(
        dict,
        rows=st.just(16),
        tile=st.just(16),
        splits=st.sampled_from([1, 2, 4]),
        aligned=st.booleans(),
    ),
)


@given(case=window_cases(longest_step=4, configs=decode_configs))
@sampled
def test_gateswa_decode(interpreted, case):
    # Aligned tiles lie in one page, which blocks of 48 tokens hold too: 16 divides them.
    assert interpreted(measure.decode_error, case) < BOUNDS[case.dtype]


@given(
    case=window_cases(
        longest_step=30,
        configs=st.sampled_from(
            [{}, {"rows": 16, "tile": 16, "warps": 4, "stages": 1}],
        ),
    )
)
@sampled
def test_gateswa_prefill(interpreted, case):
    assert interpreted(measure.prefill_error, case) < BOUNDS[case.dtype]


@given(
    case=st.builds(
        LatentCase,
        rank=st.sampled_from([16, 64, 96]),
        rope=st.sampled_from([16, 32]),
        heads=st.sampled_from([1, 3, 4, 20]),
        block=blocks,
        dtype=dtypes,
        gated=st.booleans(),
        normed=st.booleans(),
        requests=steps(3),
        fp8=st.booleans(),
        seed=seeds,
        config=st.one_of(
            st.just({}),
            st.builds(
                dict,
                rows=st.just(16),
                tile=st.just(16),
                splits=st.sampled_from([1, 4]),
                aligned=st.booleans(),
            ),
        ),
    )
)
@sampled
def test_mla_decode(interpreted, case):
    assert interpreted(measure.latent_decode_error, case) < BOUNDS[case.dtype]


@given(
    case=st.builds(
        ExpandedCase,
        nope=st.sampled_from([16, 48, 64]),
        rope=st.sampled_from([16, 32]),
        value=st.sampled_from([16, 48, 64]),
        heads=st.integers(1, 3),
        dtype=dtypes,
        gate=gates,
        causal=st.booleans(),
        normed=st.booleans(),
        requests=steps(40),
        seed=seeds,
        config=st.sampled_from([{}, {"rows": 16, "tile": 16, "warps": 4, "stages": 1}]),
    )
)
@sampled
def test_mla_prefill(interpreted, case):
    assert interpreted(measure.latent_prefill_error, case) < BOUNDS[case.dtype]


# No FP8 here: the interpreter truncates where the hardware rounds.
@given(
    case=st.builds(
        WriteCase,
        heads=st.sampled_from([1, 4, 9]),
        kv_heads=st.sampled_from([1, 2, 9]),
        head_dim=st.sampled_from([64, 96]),
        rotary=st.sampled_from([0, 16, 48, 64]),
        is_neox=st.booleans(),
        norm=st.booleans(),
        block=blocks,
        dtype=dtypes,
        layout=st.sampled_from(LAYOUTS),
        tokens=st.integers(1, 12),
        in_place=st.booleans(),
        store_k=st.booleans(),
        with_q=st.booleans(),
        seed=seeds,
    )
)
@sampled
def test_kv_write(interpreted, case):
    assert interpreted(measure.write_error, case) < BOUNDS[case.dtype]


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
def test_sigmoid_gate(interpreted, elementwise, in_place, contiguous):
    for tokens, heads, width in ((1, 1, 16), (5, 3, 96), (3, 32, 128)):
        case = GateCase(tokens, heads, width, elementwise, contiguous=contiguous, in_place=in_place)
        assert interpreted(measure.gate_error, case) < BOUNDS["fp32"]
