"""Edits alone: saved from a checkpoint, applied to its teacher, refused by any other."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.unit.edit.models import load, logits, tokens
from tests.unit.tiny import tiny_teacher
from vllm_attnedit.edit import EditPlan, apply_edit, edit_checkpoint, save_edit
from vllm_attnedit.edit.store import SafetensorsStore
from vllm_attnedit.errors import AttnEditError


def change(folder, name: str, by: float = 0.25, file: str = "model.safetensors") -> None:
    tensors = load_file(folder / file)
    tensors[name] = tensors[name] + by
    save_file(tensors, folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_an_edit_and_its_teacher_give_the_checkpoint_back(teacher_of, tmp_path, target, dtype):
    teacher = teacher_of("qwen3_moe")
    whole = tmp_path / "whole"
    edit_checkpoint(teacher, whole, EditPlan(target=target, dtype=dtype))
    nbytes = save_edit(whole, tmp_path / "edit.safetensors")
    apply_edit(teacher, tmp_path / "edit.safetensors", tmp_path / "again")

    assert sorted(p.name for p in whole.iterdir()) == sorted(
        p.name for p in (tmp_path / "again").iterdir()
    )
    before, after = SafetensorsStore(whole), SafetensorsStore(tmp_path / "again")
    assert dict(before.tensors) == dict(after.tensors)
    assert all(torch.equal(before.load(n), after.load(n)) for n in before.tensors)
    assert json.loads((whole / "config.json").read_text()) == json.loads(
        (tmp_path / "again" / "config.json").read_text()
    )
    with safe_open(tmp_path / "edit.safetensors", "pt") as file:
        assert all(".self_attn." in name for name in file.keys())  # noqa: SIM118 - no mapping
    assert nbytes < sum(f.stat().st_size for f in whole.glob("*.safetensors")) / 2


def test_a_trained_edit_is_applied_as_trained(teacher_of, tmp_path):
    teacher = tiny_teacher("llama", tmp_path / "teacher")
    whole = tmp_path / "whole"
    edit_checkpoint(teacher, whole, EditPlan(target="gateswa", window=4))
    change(whole, "model.layers.1.self_attn.g_proj.weight")
    save_edit(whole, tmp_path / "edit")
    apply_edit(teacher, tmp_path / "edit", tmp_path / "again")
    ids = tokens(20)
    assert torch.equal(logits(load(whole), ids), logits(load(tmp_path / "again"), ids))


def test_a_model_trained_beside_attention_is_no_edit(tmp_path):
    teacher = tiny_teacher("qwen2", tmp_path / "teacher")
    edit_checkpoint(teacher, tmp_path / "whole", EditPlan(target="gateswa"))
    change(tmp_path / "whole", "model.layers.2.mlp.up_proj.weight")
    with pytest.raises(AttnEditError, match="keep the whole checkpoint"):
        save_edit(tmp_path / "whole", tmp_path / "edit")
    assert not (tmp_path / "edit").exists()


def test_other_teachers_are_refused(teacher_of, tmp_path):
    whole, edit = tmp_path / "whole", tmp_path / "edit"
    edit_checkpoint(teacher_of("qwen3"), whole, EditPlan(target="gateswa"))
    save_edit(whole, edit)
    fix = r"apply this edit to its own teacher, tiny-qwen3$"
    other = tiny_teacher("qwen3", tmp_path / "seed", seed=1)
    with pytest.raises(AttnEditError, match=f"TEACHER: seed: other weights: {fix}"):
        apply_edit(other, edit, tmp_path / "out")
    narrow = tiny_teacher("qwen3", tmp_path / "narrow", intermediate_size=128)
    with pytest.raises(AttnEditError, match=f"TEACHER: narrow: other dimensions: {fix}"):
        apply_edit(narrow, edit, tmp_path / "out")
    with pytest.raises(AttnEditError, match=f"other dimensions: {fix}"):
        apply_edit(teacher_of("llama"), edit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_edits(teacher_of, tmp_path):
    edit = sorted(teacher_of("llama").glob("*.safetensors"))[0]
    with pytest.raises(AttnEditError, match=r"--from-edit: .*not a saved edit"):
        apply_edit(teacher_of("llama"), edit, tmp_path / "out")
    with pytest.raises(AttnEditError, match=r"--from-edit: .*no such file"):
        apply_edit(teacher_of("llama"), tmp_path / "none", tmp_path / "out")
    with pytest.raises(AttnEditError, match="give an edited checkpoint"):
        save_edit(teacher_of("llama"), tmp_path / "edit")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "{"}, "header is damaged"),
        ({"teacher_fingerprint": None}, "header lacks teacher_fingerprint"),
    ],
)
def test_a_damaged_header_is_one_line(teacher_of, tmp_path, change, message):
    edit_checkpoint(teacher_of("llama"), tmp_path / "whole", EditPlan(target="gateswa", window=4))
    save_edit(tmp_path / "whole", tmp_path / "edit")
    with safe_open(tmp_path / "edit", framework="pt") as file:
        header = {**file.metadata(), **change}
    header = {name: value for name, value in header.items() if value is not None}
    save_file(load_file(tmp_path / "edit"), tmp_path / "edit", metadata=header)
    with pytest.raises(AttnEditError, match=rf"--from-edit: .*{message}"):
        apply_edit(teacher_of("llama"), tmp_path / "edit", tmp_path / "out")


def test_the_same_weights_in_another_container_are_the_same_teacher(teacher_of, tmp_path):
    """Sharding and the folder's name are no part of a teacher's identity."""
    single = tiny_teacher("qwen3", tmp_path / "single")
    edit_checkpoint(teacher_of("qwen3"), tmp_path / "whole", EditPlan(target="gateswa"))
    save_edit(tmp_path / "whole", tmp_path / "edit")
    apply_edit(single, tmp_path / "edit", tmp_path / "out")
    shutil.rmtree(single)
    assert (tmp_path / "out" / "model.safetensors").is_file()
