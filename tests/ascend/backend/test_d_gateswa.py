"""Rung d: GateSWA through vllm-ascend's real backend classes equals the reference model."""

from __future__ import annotations

import pytest
import torch

from tests.ascend.backend.layers import prepare_layers, take_ascend_layers
from tests.ascend.backend.serving import Server, engine_config, one_rank, worst_error
from tests.integration.engine import random_prompts
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.backends.gateswa_ascend import GateSWAAscendImpl, lay_out
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
        prepare_layers(config)
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


@pytest.mark.parametrize("window", [16, 129, 300])
def test_a_chunk_may_overwrite_what_it_reads(tmp_path, window):
    """Chunks that end with blocks: the new tail goes where the old one is read in the same step."""
    model = small_model(window)
    folder = tiny_edited_checkpoint(model, tmp_path)
    config = engine_config(folder, async_scheduling=False, enable_prefix_caching=False)
    with one_rank(config):
        server = Server(model, config)
        prepare_layers(config)
        run = server.add(random_prompts([900])[0])
        for _ in range(4):
            server.step({0: 256})
        server.step({0: 1})
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


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["ours", "stock allocation"])
@pytest.mark.parametrize("window", [16, 200])
def test_a_hit_of_the_prefix_cache_equals_the_reference(tmp_path, window, async_scheduling):
    """The next turn of a conversation, through vllm-ascend's own coordinator of block managers."""
    model = small_model(window)
    folder = tiny_edited_checkpoint(model, tmp_path)
    config = engine_config(folder, async_scheduling=async_scheduling)
    first, more = random_prompts([400, 70])
    with one_rank(config):
        server = Server(model, config)
        run = server.add(first)
        server.step({0: 256})
        server.step({0: 256})
        for _ in range(5):
            server.step({0: 1})
        server.finish(run)
        again = server.add([*run.request.all_token_ids, *more])
        server.step({1: 256})
        for _ in range(5):
            server.step({1: 1})
    assert again.hit >= 256 and again.hit % 128 == 0
    assert worst_error(model, run) < TOLERANCE
    assert worst_error(model, again) < TOLERANCE


def test_padding_of_a_step_sees_itself():
    """Graphs pad a step with a request that has more tokens than it is long."""
    table = torch.tensor([[4, 7], [0, 0]], dtype=torch.int32)
    chunk = lay_out([3, 8], [133, 1], table, sliding_window=4, block_size=128)
    assert chunk.seq_lens == [6, 11]
    assert chunk.tail_rows.tolist() == [4 * 128 + 127, 7 * 128, 7 * 128 + 1]
    assert chunk.order is not None
    assert chunk.order.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["ours", "stock allocation"])
def test_with_all_of_vllm_ascends_layers(tmp_path, monkeypatch, async_scheduling):
    """Projections, norms, rotation and MLP as vllm-ascend replaces them, around our attention."""
    take_ascend_layers(monkeypatch)
    model = small_model(16)
    server = serve(model, tmp_path, 20, async_scheduling=async_scheduling)
    assert type(server.model.model.layers[0].self_attn.q_norm).__name__ == "AscendRMSNorm"
    for run in server.running:
        assert worst_error(model, run) < TOLERANCE
