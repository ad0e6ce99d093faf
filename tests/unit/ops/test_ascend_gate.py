"""The gate's kernel for NPUs in Triton's interpreter, and when an NPU takes it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from vllm_attnedit.ops import dispatch


def gate_rows_error(tokens: int, heads: int, width: int, headwise: bool) -> float:
    """The kernel's largest difference from the oracle; runs where Triton interprets."""
    from vllm_attnedit.ops.sigmoid_gate import ascend
    from vllm_attnedit.ops.sigmoid_gate.reference import gated

    generator = torch.Generator().manual_seed(tokens + heads)
    attn = torch.randn(tokens, heads, width, generator=generator)
    gate = torch.randn(tokens, heads * (1 if headwise else width), generator=generator)
    out = torch.full_like(attn, torch.nan)
    npu = SimpleNamespace(npu=SimpleNamespace(current_device=lambda: 0))
    with patch.object(ascend, "vector_cores", lambda _: 3), patch.object(ascend, "torch", npu):
        ascend.sigmoid_gate(attn, gate, out)
    return float((out - gated(attn, gate)).abs().max())


@pytest.mark.parametrize("headwise", [True, False])
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 16), (7, 5, 64), (40, 32, 128)])
def test_gate_rows(interpreted, tokens, heads, width, headwise):
    assert interpreted(gate_rows_error, tokens, heads, width, headwise) < 1e-6


def test_a_width_that_is_no_power_of_two_takes_the_oracle(interpreted):
    assert interpreted(gate_rows_error, 3, 2, 96, True) == 0.0


@pytest.mark.parametrize(
    ("installed", "operator", "chosen"),
    [
        (("triton", "triton.backends.ascend"), "sigmoid_gate", "ascend"),
        (("triton", "triton.backends.ascend"), "gateswa_decode", "reference"),
        (("triton",), "sigmoid_gate", "reference"),
        ((), "sigmoid_gate", "reference"),
    ],
)
def test_an_npu_takes_triton_where_it_is(monkeypatch, installed, operator, chosen):
    real = dispatch.find_spec

    def find_spec(name: str):
        if name.startswith("triton"):
            return object() if name in installed else None
        return real(name)

    monkeypatch.setattr(dispatch, "find_spec", find_spec)
    monkeypatch.setattr(dispatch, "import_module", lambda name: SimpleNamespace(__name__=name))
    dispatch._runs_on_ascend.cache_clear()
    device: Any = SimpleNamespace(type="npu")
    assert dispatch.implementation(operator, device).__name__.endswith(f"{operator}.{chosen}")
    dispatch._runs_on_ascend.cache_clear()
