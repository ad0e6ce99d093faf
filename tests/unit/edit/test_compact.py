"""Compact edits: int8 differences give a trained edit back, and nothing else does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.unit.edit.models import load, logits, tokens
from tests.unit.tiny import tiny_teacher
from vllm_attnedit.edit import EditPlan, apply_edit, compact_edit, edit_checkpoint, save_edit
from vllm_attnedit.edit.compact import quantize, restore
from vllm_attnedit.edit.store import SafetensorsStore
from vllm_attnedit.errors import AttnEditError

Q, GATE = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.g_proj.weight"


def train(folder, seed: int = 0) -> None:
    """Change the attention of layers 0 and 1, as training would."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if ".self_attn." in name and name.startswith(("model.layers.0.", "model.layers.1.")):
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = tensor + (0.01 * noise).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(params=["llama", "qwen3"])
def made(request, tmp_path):
    """Teacher, trained checkpoint, saved edit, compact edit."""
    teacher = tiny_teacher(request.param, tmp_path / "teacher")
    whole = tmp_path / "whole"
    edit_checkpoint(teacher, whole, EditPlan(target="gateswa", window=4, dtype="bfloat16"))
    train(whole)
    save_edit(whole, tmp_path / "edit")
    compact_edit(teacher, tmp_path / "edit", tmp_path / "compact")
    return teacher, whole, tmp_path / "edit", tmp_path / "compact"


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 9),
    size=st.sampled_from([0.0, 1e-30, 1e-3, 10.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_difference_is_off_by_half_a_level_at_most(rows, columns, size, seed):
    generator = torch.Generator().manual_seed(seed)
    difference = size * torch.randn(rows, columns, generator=generator)
    levels, scale = quantize(difference)
    again = restore(torch.zeros(rows, columns), levels, scale, torch.float32)
    assert levels.dtype == torch.int8 and scale.shape == (rows,)
    assert ((again - difference).abs() <= 0.501 * scale[:, None]).all()


def test_round_trip(made, tmp_path):
    teacher, whole, edit, compact = made
    apply_edit(teacher, compact, tmp_path / "again")
    before, after = SafetensorsStore(whole), SafetensorsStore(tmp_path / "again")
    assert dict(before.tensors) == dict(after.tensors)
    for name in before.tensors:
        mine, trained = after.load(name), before.load(name)
        if name == Q:
            # Changes have a deviation of 0.01, so a level is about 0.03 / 127.
            assert not torch.equal(mine, trained)
            assert (mine.float() - trained.float()).abs().max() < 1e-3
        if ".self_attn." not in name or name == GATE or ".layers.2." in name:
            assert torch.equal(mine, trained), name
    ids = tokens(20)
    mine, trained = logits(load(tmp_path / "again"), ids), logits(load(whole), ids)
    assert (mine - trained).norm() / trained.norm() < 1e-2
    with safe_open(compact, "pt") as file:
        names = list(file.keys())
        assert file.get_tensor(Q).dtype == torch.int8
    # What did not change is not there.
    assert not any(".layers.2." in name for name in names)
    assert compact.stat().st_size < 0.6 * edit.stat().st_size


def test_it_is_the_same_every_time(made, tmp_path):
    teacher, _, edit, compact = made
    compact_edit(teacher, edit, tmp_path / "second")
    assert compact.read_bytes() == (tmp_path / "second").read_bytes()


def test_other_teachers_are_refused(made, tmp_path):
    teacher, _, edit, compact = made
    fix = r"apply this edit to its own teacher, teacher$"
    tensors = load_file(teacher / "model.safetensors")
    for name, message in ((Q, "other attention weights"), ("model.norm.weight", "other weights")):
        other = tmp_path / f"other-{name}"
        other.mkdir()
        for file in teacher.iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        changed = tensors | {name: tensors[name] * 1.25}
        save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(AttnEditError, match=f"TEACHER: other-.*: {message}: {fix}"):
            apply_edit(other, compact, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(AttnEditError, match=f"other weights: {fix}"):
        compact_edit(other, edit, tmp_path / "none")


def test_damage_is_noticed(made, tmp_path):
    teacher, _, _, compact = made
    data = bytearray(compact.read_bytes())
    data[-5] ^= 1
    compact.write_bytes(data)
    with pytest.raises(AttnEditError, match=r"--from-edit: damaged: get the file again"):
        apply_edit(teacher, compact, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value"), [("stored_sha256", None), ("attention_dtype", "bfloat17")]
)
def test_a_damaged_header_is_noticed(made, tmp_path, name, value):
    teacher, _, _, compact = made
    with safe_open(compact, framework="pt") as file:
        header = {**file.metadata(), name: value}
    header = {key: text for key, text in header.items() if text is not None}
    save_file(load_file(compact), tmp_path / "damaged", metadata=header)
    with pytest.raises(AttnEditError, match=r"--from-edit: damaged header: get the file again"):
        apply_edit(teacher, tmp_path / "damaged", tmp_path / "out")


def test_what_cannot_be_compact(made, tmp_path):
    teacher, _, _, compact = made
    with pytest.raises(AttnEditError, match=r"--compact-edit: .*not a saved edit"):
        compact_edit(teacher, compact, tmp_path / "twice")
    edit_checkpoint(teacher, tmp_path / "mla", EditPlan(target="mla", init="random"))
    save_edit(tmp_path / "mla", tmp_path / "mla-edit")
    with pytest.raises(AttnEditError, match=r"latent_attention: keep the saved edit"):
        compact_edit(teacher, tmp_path / "mla-edit", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_command(made, tmp_path, attnedit):
    teacher, _, edit, compact = made
    done = attnedit("edit", teacher, tmp_path / "again", "--compact-edit", edit)
    assert done.code == 0, done.err
    assert (tmp_path / "again").read_bytes() == compact.read_bytes()
    assert "int8 differences" in done.out
    done = attnedit("edit", teacher, tmp_path / "model", "--from-edit", compact)
    assert done.code == 0, done.err
    assert (tmp_path / "model" / "config.json").is_file()
    both = ("--from-edit", edit, "--compact-edit", edit)
    assert "--compact-edit" in attnedit.refused("edit", teacher, tmp_path / "x", *both)
    both = ("--target", "gateswa", "--compact-edit", edit)
    assert "--target" in attnedit.refused("edit", teacher, tmp_path / "x", *both)
