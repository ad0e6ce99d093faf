"""Compiled and recomputed layers compute what plain ones do, hooks and all."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from tests.unit.training import test_distill, test_layerwise
from tests.unit.training.small import make_pair


@pytest.fixture(autouse=True)
def _fast_compiler(monkeypatch):
    """Tracing and the joint graph are what can go wrong here; generating C++ takes a minute."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


def test_stage2_compiled(tmp_path, pair, text):
    plain, stream = test_distill.make_stage(tmp_path / "a", *pair, text)
    batches = stream.step(0)
    loss = plain.run(batches).loss.item()
    options = {"run": {"compile": True, "gradient_checkpointing": True}}
    fast, _ = test_distill.make_stage(tmp_path / "b", *pair, text, **options)
    assert fast.run(batches).loss.item() == pytest.approx(loss, rel=1e-5)
    test_distill.assert_same(test_distill.gradients(fast), test_distill.gradients(plain))


def test_stage1_compiled(tmp_path, pair, text):
    plain, stream = test_layerwise.make_stage(tmp_path / "a", *pair, text)
    batches = stream.step(0)
    expected = plain.run(batches).layers
    fast, _ = test_layerwise.make_stage(tmp_path / "b", *pair, text, run={"compile": True})
    torch.testing.assert_close(fast.run(batches).layers, expected, rtol=1e-4, atol=1e-6)
    for layer in range(4):
        test_distill.assert_same(
            test_layerwise.gradients_of(fast, layer), test_layerwise.gradients_of(plain, layer)
        )


def test_layers_share_compiled_code(tmp_path, text):
    """Compilation takes as long for forty layers as for four."""
    graphs = []
    for layers in (4, 7):
        torch._dynamo.reset()
        counters.clear()
        pair = make_pair(tmp_path / str(layers), num_hidden_layers=layers)
        options = {"run": {"compile": True}}
        stage, stream = test_distill.make_stage(tmp_path / f"run{layers}", *pair, text, **options)
        stage.run(stream.step(0)[:1])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]
