"""Rung d: GateSWA through vllm-ascend's real backend classes equals the reference model."""

from __future__ import annotations

import pytest

from tests.ascend.backend.serving import Server, engine_config, one_rank, worst_error
from tests.integration.engine import random_prompts
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.backends.gateswa_ascend import GateSWAAscendImpl
from vllm_attnedit.kv_cache.spec import GateSWASpec

DECODES = 300
TOLERANCE = 1e-3


def small_model(window: int):
    """Two window layers, one full, one window: heads of 128, as the operator wants them."""
    edit = tiny_edit("gateswa", window=window, gate="elementwise")
    return tiny_edited("qwen3", edit, head_dim=128, num_attention_heads=2, num_key_value_heads=1)


def serve(model, folder, decodes: int, **options) -> Server:
    """Three prompts, one of them in chunks beside the others' decodes, then decodes."""
    config = engine_config(tiny_edited_checkpoint(model, folder), **options)
    with one_rank(config):
        server = Server(model, config)
        for prompt in random_prompts([200, 37, 290]):
            server.add(prompt)
        server.step({0: 200, 1: 37})
        for _ in range(3):
            server.step({0: 1, 1: 1, 2: 100})
        for _ in range(decodes):
            server.step({0: 1, 1: 1, 2: 1})
    return server


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["ours", "stock allocation"])
@pytest.mark.parametrize("window", [1, 16, 128, 129])
def test_equals_the_reference(tmp_path, window, async_scheduling):
    model = small_model(window)
    server = serve(model, tmp_path, DECODES, async_scheduling=async_scheduling)
    ours = [isinstance(spec, GateSWASpec) for spec in server.specs]
    assert sum(ours) == (0 if async_scheduling else 3)
    for run in server.running:
        assert len(run.logits) > DECODES
        assert worst_error(model, run) < TOLERANCE


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["ours", "stock allocation"])
def test_one_key_too_many_is_seen(tmp_path, monkeypatch, async_scheduling):
    """vllm-ascend's own band, reintroduced: the test above must not let it pass."""
    construct = GateSWAAscendImpl.__init__

    def as_stock(self, *arguments, **options):
        construct(self, *arguments, **options)
        self.sliding_window += 1

    monkeypatch.setattr(GateSWAAscendImpl, "__init__", as_stock)
    model = small_model(16)
    server = serve(model, tmp_path, 2, async_scheduling=async_scheduling)
    assert all(worst_error(model, run) > 100 * TOLERANCE for run in server.running)
