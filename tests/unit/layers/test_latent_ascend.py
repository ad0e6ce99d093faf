"""Weights of latent layers in the row order that vllm-ascend's MLA layer rotates."""

from __future__ import annotations

import torch

from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited
from vllm_attnedit.layers.latent_ascend import interleave_rope_rows
from vllm_attnedit.ops.kv_write.reference import rotate


def test_scores_stay_what_they_are():
    """Halves turned in the checkpoint's order, pairs in the other: equal products, head by head."""
    model = tiny_edited("qwen2", tiny_edit("mla"))
    config = model.config
    before = {k: v for k, v in model.state_dict().items() if k.startswith("model.layers.0.")}
    after = dict(interleave_rope_rows(before.items(), config))
    prefix, rope = "model.layers.0.self_attn.", config.edit.qk_rope_head_dim
    x = torch.randn(5, config.hidden_size)
    angles = torch.randn(5, rope // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)

    def scores(weights, is_neox):
        def project(name, heads):
            name = f"{prefix}{name}"
            rows = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
            return rows.unflatten(-1, (heads, -1))

        query = project("q_proj", config.num_attention_heads)
        key = project("kv_a_proj_with_mqa", 1)
        query_rope = rotate(query[..., -rope:], cos_sin, is_neox)
        key_rope = rotate(key[..., -rope:], cos_sin, is_neox)
        return query[..., :-rope], key[..., :-rope], query_rope @ key_rope.transpose(1, 2)

    for wanted, found in zip(scores(before, True), scores(after, False), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.equal(before[f"{prefix}q_proj.weight"], after[f"{prefix}q_proj.weight"])
    kept = set(before) - {
        f"{prefix}{n}.{p}" for n in ("q_proj", "kv_a_proj_with_mqa") for p in ("weight", "bias")
    }
    assert all(torch.equal(before[name], after[name]) for name in kept)
