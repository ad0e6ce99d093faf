"""Rung d: MLA through vllm-ascend's own MLA layer equals the reference model.

One layer: its inputs do not depend on the prompt's attention, which vllm-ascend computes in
bfloat16 whatever the dtype is. So decodes are exact, prompts are as exact as bfloat16.
"""

from __future__ import annotations

import pytest
import torch

from tests.ascend.backend.layers import prepare_layers, take_ascend_layers
from tests.ascend.backend.serving import (
    Server,
    engine_config,
    expected_logits,
    one_rank,
)
from tests.integration.engine import random_prompts
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.config import LATENT
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.layers import latent_ascend

DECODES = 300
EXACT, BFLOAT16 = 1e-3, 0.1
WIDTHS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


@pytest.fixture(autouse=True)
def vllm_ascends_layers(monkeypatch):
    """An MLA layer is one of vllm-ascend's own, and calls others of them."""
    take_ascend_layers(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "npu", lambda self: self, raising=False)


def small_model(heads: int = 4, **edit):
    return tiny_edited(
        "llama",
        tiny_edit("mla", layers=1, **(WIDTHS | edit)),
        num_hidden_layers=1,
        hidden_size=32 * heads,
        head_dim=128,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )


def serve(model, folder, decodes: int) -> Server:
    """Three prompts, one of them in chunks beside the others' decodes, then decodes."""
    config = engine_config(tiny_edited_checkpoint(model, folder))
    assert config.model_config.use_mla
    with one_rank(config):
        server = Server(model, config)
        prepare_layers(config)
        for prompt in random_prompts([200, 37, 290]):
            server.add(prompt)
        server.step({0: 200, 1: 37})
        for _ in range(3):
            server.step({0: 1, 1: 1, 2: 100})
        for _ in range(decodes):
            server.step({0: 1, 1: 1, 2: 1})
    return server


def errors(model, server: Server) -> tuple[float, float]:
    """The largest difference of a prompt's logits, and of a decode's."""
    prompt = decode = 0.0
    for run in server.running:
        difference = (torch.stack(run.logits) - expected_logits(model, run)).abs().amax(-1)
        end = run.request.num_prompt_tokens
        prompt = max(prompt, float(difference[:end].max()))
        decode = max(decode, float(difference[end:].max()))
    return prompt, decode


@pytest.mark.parametrize("gate", [None, "headwise", "elementwise"])
@pytest.mark.parametrize("q_lora_rank", [None, 32])
@pytest.mark.parametrize("heads", [4, 5])
def test_equals_the_reference(tmp_path, gate, q_lora_rank, heads):
    model = small_model(heads, gate=gate, q_lora_rank=q_lora_rank)
    server = serve(model, tmp_path, DECODES)
    prompt, decode = errors(model, server)
    assert prompt < BFLOAT16
    assert decode < EXACT


def test_rows_that_stay_as_they_are_are_seen(tmp_path, monkeypatch):
    """Without the reordering of the rows that turn, the test above must not pass."""
    monkeypatch.setattr(latent_ascend, "interleaved", lambda tensor, *_: tensor)
    model = small_model()
    _, decode = errors(model, serve(model, tmp_path, 2))
    assert decode > 100 * EXACT


@pytest.mark.parametrize(
    ("edit", "field"),
    [({"kv_lora_rank": 256}, "kv_lora_rank"), ({"qk_rope_head_dim": 32}, "qk_rope_head_dim")],
)
def test_limits_are_checked_at_load(tmp_path, edit, field):
    model = small_model(**edit)
    assert set(model.config.edit.layer_types) == {LATENT}
    config = engine_config(tiny_edited_checkpoint(model, tmp_path))
    with one_rank(config), pytest.raises(AttnEditError, match=field):
        Server(model, config)
