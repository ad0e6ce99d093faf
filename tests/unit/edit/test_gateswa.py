"""GateSWA edits: at the start they are the teacher, restricted to its windows."""

from __future__ import annotations

import pytest
import torch

from tests.unit.edit.models import load, logits, tokens, windowed_logits
from tests.unit.tiny import FAMILY_NAMES, tiny_teacher
from vllm_attnedit.edit import EditPlan, edit_checkpoint
from vllm_attnedit.edit.store import SafetensorsStore

GATES = ("headwise", "elementwise", "none")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_inherit_is_the_teacher_with_window_masks(teacher_of, tmp_path, family, gate):
    full = (1, 3)
    plan = EditPlan(target="gateswa", window=6, full_layers=full, gate=gate)
    edit_checkpoint(teacher_of(family), tmp_path / "out", plan)
    teacher, student, ids = load(teacher_of(family)), load(tmp_path / "out"), tokens(40)

    expected = windowed_logits(teacher, ids, 6, full)
    assert (logits(student, ids) - expected).abs().max() <= 1e-4
    # The masks do something, so that the line above can fail.
    assert (logits(teacher, ids) - expected).abs().max() > 0.1


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_window_no_shorter_than_the_text_changes_nothing(teacher_of, tmp_path, family, gate):
    edit_checkpoint(
        teacher_of(family), tmp_path / "out", EditPlan(target="gateswa", window=24, gate=gate)
    )
    ids = tokens(24)
    expected = logits(load(teacher_of(family)), ids)
    assert (logits(load(tmp_path / "out"), ids) - expected).abs().max() <= 1e-4


def test_biased_output_projections_and_tied_embeddings(tmp_path):
    """A Llama with biases everywhere: the gate scales o_proj's weight and leaves its bias alone."""
    teacher = tiny_teacher(
        "llama", tmp_path / "t", attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    )
    edit_checkpoint(teacher, tmp_path / "out", EditPlan(target="gateswa", window=5))
    ids = tokens(30)
    expected = windowed_logits(load(teacher), ids, 5, full_layers=(3,))
    assert (logits(load(tmp_path / "out"), ids) - expected).abs().max() <= 1e-4
    store = SafetensorsStore(tmp_path / "out")
    assert "lm_head.weight" not in store.tensors


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_everything_but_attention_is_copied_bit_by_bit_and_o_proj_doubled(tmp_path, dtype):
    teacher = tiny_teacher("qwen3", tmp_path / "t", dtype=getattr(torch, dtype))
    edit_checkpoint(teacher, tmp_path / "out", EditPlan(target="gateswa"))
    before, after = SafetensorsStore(teacher), SafetensorsStore(tmp_path / "out")
    for name in before.tensors:
        old, new = before.load(name), after.load(name)
        assert new.dtype == old.dtype
        assert torch.equal(new, 2 * old if "o_proj" in name else old), name
    added = set(after.tensors) - set(before.tensors)
    assert added == {f"model.layers.{i}.self_attn.g_proj.weight" for i in range(4)}
    assert not any(after.load(name).any() for name in added)


def test_without_a_gate_o_proj_stays(teacher_of, tmp_path):
    edit_checkpoint(teacher_of(), tmp_path / "out", EditPlan(target="gateswa", gate="none"))
    before, after = SafetensorsStore(teacher_of()), SafetensorsStore(tmp_path / "out")
    assert set(before.tensors) == set(after.tensors)
    assert all(torch.equal(before.load(name), after.load(name)) for name in before.tensors)


def test_random_draws_all_but_o_proj(tmp_path):
    teacher = tiny_teacher("qwen2", tmp_path / "t", initializer_range=0.05)
    plan = EditPlan(target="gateswa", init="random", gate="elementwise", seed=3)
    edit_checkpoint(teacher, tmp_path / "out", plan)
    before, after = SafetensorsStore(teacher), SafetensorsStore(tmp_path / "out")
    prefix = "model.layers.2.self_attn."
    assert torch.equal(after.load(f"{prefix}o_proj.weight"), before.load(f"{prefix}o_proj.weight"))
    for name in ("q_proj", "k_proj", "v_proj", "g_proj"):
        drawn = after.load(f"{prefix}{name}.weight")
        assert abs(drawn.std() / 0.05 - 1) < 0.05
        assert abs(drawn.mean()) < 0.005
    assert not after.load(f"{prefix}k_proj.bias").any()


@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_random_norms_are_ones_and_the_seed_decides(teacher_of, tmp_path, target):
    stores = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        plan = EditPlan(target=target, init="random", seed=seed)
        edit_checkpoint(teacher_of(), tmp_path / name, plan)
        stores.append(SafetensorsStore(tmp_path / name))
    first, same, other = stores
    norm = "q_norm" if target == "gateswa" else "kv_a_layernorm"
    assert (first.load(f"model.layers.0.self_attn.{norm}.weight") == 1).all()
    for name in first.tensors:
        assert torch.equal(first.load(name), same.load(name)), name
    query = "model.layers.{}.self_attn.q_proj.weight"
    assert not torch.equal(first.load(query.format(0)), other.load(query.format(0)))
    assert not torch.equal(first.load(query.format(0)), first.load(query.format(1)))
