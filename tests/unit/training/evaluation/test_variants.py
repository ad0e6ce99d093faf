"""The models that are compared: baselines under other masks, and what each asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from tests.unit.training.small import ids_of, make_pair, small_config
from training.evaluation.variants import (
    SINKS,
    make_variants,
    sink_attention,
    unpack_edits,
)
from training.layer_choice import window_edit
from training.models import load_teacher, student_config
from training.runs import train
from vllm_attnedit.errors import AttnEditError


def test_sinks_see_the_window_and_the_first_tokens():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 8, generator=draw) for _ in range(3))
    module: Any = SimpleNamespace(
        config=SimpleNamespace(sinks=3), num_key_value_groups=1, is_causal=True, training=False
    )
    output, _ = sink_attention(module, q, k, v, None, scaling=0.3, sliding_window=5)
    for t in range(20):
        seen = [s for s in range(t + 1) if t - s < 5 or s < 3]
        weights = torch.softmax(q[0, :, t, None] @ k[0][:, seen].transpose(1, 2) * 0.3, -1)
        torch.testing.assert_close(
            output[0, t], (weights @ v[0][:, seen])[:, 0], atol=1e-6, rtol=1e-5
        )
    full, _ = sink_attention(module, q, k, v, None, scaling=0.3)
    unbounded, _ = sink_attention(module, q, k, v, None, scaling=0.3, sliding_window=20)
    torch.testing.assert_close(full, unbounded)


def test_baselines_are_the_teacher_under_other_masks(pair, teacher):
    AttentionInterface.register(SINKS, sink_attention)
    ids = ids_of(2, 40)
    wide = load_teacher(
        str(pair[0]), dtype=torch.float32, attention=SINKS, edit=window_edit(4, (3,), 40)
    )
    wide.config.sinks = 2
    torch.testing.assert_close(wide(ids).logits, teacher(ids).logits, atol=1e-4, rtol=1e-4)
    narrow = load_teacher(
        str(pair[0]), dtype=torch.float32, attention=SINKS, edit=window_edit(4, (3,), 8)
    )
    narrow.config.sinks = 0
    plain = load_teacher(str(pair[0]), dtype=torch.float32, edit=window_edit(4, (3,), 8))
    torch.testing.assert_close(narrow(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
    narrow.config.sinks = 4
    assert not torch.allclose(narrow(ids).logits, plain(ids).logits, atol=1e-2)


def test_an_inherited_edit_is_the_teacher_with_windows(pair, student):
    plain = load_teacher(str(pair[0]), dtype=torch.float32, edit=window_edit(4, (3,), 8))
    ids = ids_of(2, 40)
    torch.testing.assert_close(student(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)


def test_variants_need_their_checkpoints(tmp_path, pair, text, latent_pair):
    config = small_config(tmp_path / "run", *pair, text)
    with pytest.raises(AttnEditError, match="run/model"):
        make_variants(config, torch.device("cpu"), torch.float32)
    options = {"models": {"mla": str(latent_pair[1])}, "baselines": ["sinks"]}
    config = small_config(tmp_path / "run", *latent_pair, text, evaluate=options)
    with pytest.raises(AttnEditError, match=r"evaluate\.baselines"):
        make_variants(config, torch.device("cpu"), torch.float32)


def test_a_trained_student_goes_by_its_stage_and_edits_are_unpacked(tmp_path, pair, text):
    train(small_config(tmp_path / "one", *pair, text), "stage1")
    half = tmp_path / "one" / "model"
    alone = small_config(tmp_path / "two", pair[0], half, text, checkpoint={"export": "edit"})
    train(alone, "stage2")
    unpack_edits(alone)
    names = [v.name for v in make_variants(alone, torch.device("cpu"), torch.float32)]
    assert names == ["teacher", "stage1", "trained"]
    trained = student_config(alone.evaluate.models["trained"])
    assert trained.provenance["stage"] == "stage2"
    fresh = small_config(tmp_path / "one", *pair, text)
    unpack_edits(fresh)
    names = [v.name for v in make_variants(fresh, torch.device("cpu"), torch.float32)]
    assert names == ["teacher", "untrained", "trained"]


def test_families(tmp_path):
    """A teacher as an unedited model of this project says what transformers' own class says."""
    from transformers import AutoModelForCausalLM

    for family in ("qwen2", "qwen3", "qwen3_moe"):
        folder, _ = make_pair(tmp_path, family)
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        mine = load_teacher(str(folder), dtype=torch.float32)
        ids = ids_of(2, 30)
        torch.testing.assert_close(mine(ids).logits, own(ids).logits, atol=1e-4, rtol=1e-4)
