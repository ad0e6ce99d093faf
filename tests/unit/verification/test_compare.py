"""The judgement: agreement, near-ties, and each way to disagree."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.verification.answers import AGREEING, REFERENCE
from vllm_attnedit.verification import Answer, Reference, compare


def test_agreement() -> None:
    verdict = compare(REFERENCE, AGREEING, 1e-3)
    assert verdict.ok
    assert (verdict.prompt_tokens, verdict.steps, verdict.equal_steps) == (3, 3, 3)
    assert verdict.decode_error == verdict.read_error == 0
    assert not verdict.tie


def test_a_near_tie_is_a_tie_and_no_failure() -> None:
    parted = replace(
        AGREEING, tokens=[10, 21, 99], logprobs=[-0.5, -0.7, -3.0], read_greedy=[10, 21, 12]
    )
    verdict = compare(REFERENCE, parted, 1e-3)
    assert verdict.ok
    assert verdict.tie
    assert verdict.equal_steps == 1
    # Another tolerance, and it is a failure.
    strict = compare(REFERENCE, parted, 1e-4)
    assert not strict.ok
    assert not strict.tie
    assert strict.failures == (
        "greedy token 1 is 21 instead of 11",
        "most likely token 1 is 21 instead of 11 while reading",
    )


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({"tokens": [10, 11, 22]}, "greedy token 2 is 22 instead of 12"),
        ({"tokens": [10, 77, 12]}, "greedy token 1 is 77 instead of 11"),  # not even a candidate
        ({"logprobs": [-0.5, -0.702, -0.9]}, "log-probabilities differ by 0.002 while decoding"),
        ({"read_logprobs": [-0.5, -0.7, -0.91]}, "log-probabilities differ by 0.01 while reading"),
        ({"read_greedy": [10, 11, 22]}, "most likely token 2 is 22 instead of 12 while reading"),
        ({"logprobs": [-0.5, math.nan, -0.9]}, "log-probabilities differ by inf while decoding"),
        ({"read_logprobs": [math.nan] * 3}, "log-probabilities differ by inf while reading"),
        ({"logprobs": [-0.5, -math.inf, -0.9]}, "log-probabilities differ by inf while decoding"),
    ],
)
def test_each_disagreement_is_named(changes: dict[str, Any], failure: str) -> None:
    verdict = compare(REFERENCE, replace(AGREEING, **changes), 1e-3)
    assert verdict.failures == (failure,)
    assert not verdict.ok


def test_after_a_tie_reading_still_judges_every_step() -> None:
    parted = replace(
        AGREEING,
        tokens=[10, 21, 99],
        logprobs=[-0.5, -0.7, -3.0],
        read_logprobs=[-0.5, -0.7, -0.95],
    )
    verdict = compare(REFERENCE, parted, 1e-3)
    assert verdict.tie
    assert verdict.failures == ("log-probabilities differ by 0.05 while reading",)


def test_answers_of_another_length_are_no_answers() -> None:
    with pytest.raises(ValueError, match="read_greedy: 2 steps instead of 3"):
        compare(REFERENCE, replace(AGREEING, read_greedy=[10, 11]), 1e-3)


@given(
    steps=st.integers(1, 8), data=st.data(), tolerance=st.floats(1e-4, 0.5), error=st.floats(0, 1)
)
def test_the_tolerance_decides(
    steps: int, data: st.DataObject, tolerance: float, error: float
) -> None:
    logprobs = data.draw(st.lists(st.floats(-20, 0), min_size=steps, max_size=steps))
    at = data.draw(st.integers(0, steps - 1))
    tokens = list(range(steps))
    top = [{t: lp} for t, lp in zip(tokens, logprobs, strict=True)]
    moved = [lp - error if i == at else lp for i, lp in enumerate(logprobs)]
    reference = Reference([0], tokens, logprobs, top)
    verdict = compare(reference, Answer(tokens, moved, logprobs, tokens), tolerance)
    assert verdict.ok == (abs(logprobs[at] - moved[at]) <= tolerance)
    assert verdict.decode_error == pytest.approx(error, abs=1e-12)
