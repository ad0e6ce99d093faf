"""What a run leaves: a model that loads everywhere, or an edit that its teacher takes."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.training.small import make_pair, small_config
from training.commands import export_newest
from training.export import export
from training.models import unpack_student
from training.parts import PartsReader
from training.resuming import find_checkpoints
from training.runs import train
from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.edit import apply_edit, save_edit
from vllm_attnedit.edit.store import SafetensorsStore
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.tensors import expected_tensors

IDS = torch.arange(5, 45)[None]


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("family", "target", "trainable"),
    [
        ("llama", "gateswa", "attention"),
        ("qwen3", "mla", "attention"),
        ("qwen3_moe", "gateswa", "all"),
    ],
)
def test_the_model_holds_what_was_trained_and_the_rest_of_the_teacher(
    tmp_path, text, family, target, trainable
):
    teacher, student = make_pair(tmp_path, family, target, max_shard_size="200KB")
    config = small_config(
        tmp_path / "run", teacher, student, text, stage2={"trainable": trainable, "lr_rest": 1e-3}
    )
    train(config, "stage2")
    model = tmp_path / "run" / "model"
    edited = AttnEditConfig.from_pretrained(model)
    before, after = SafetensorsStore(student), SafetensorsStore(model)
    assert {name: info.shape for name, info in after.tensors.items()} == expected_tensors(edited)
    assert len({info.shard for info in after.tensors.values()}) > 1  # as the student's files
    for name in before.tensors:
        changed = not torch.equal(before.load(name), after.load(name))
        assert changed == (trainable == "all" or ".self_attn." in name), name
        assert after.tensors[name].dtype == before.tensors[name].dtype
    # By the library's own loading, the weights are those in the checkpoint.
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trained = PartsReader(find_checkpoints(tmp_path / "run" / "checkpoints")[-1], "weights-")
    for name, parameter in loaded.named_parameters():
        if name in trained:
            assert torch.equal(parameter, trained.load(name)), name
    assert AutoTokenizer.from_pretrained(model).get_vocab()


def test_an_edit_alone_gives_back_the_model(tmp_path, pair, text):
    both = {"export": "both"}
    train(small_config(tmp_path / "run", *pair, text, checkpoint=both), "stage1")
    edit = tmp_path / "run" / "edit.safetensors"
    apply_edit(pair[0], edit, tmp_path / "applied")
    assert torch.equal(logits(tmp_path / "applied"), logits(tmp_path / "run" / "model"))
    # And a run can begin with it.
    config = small_config(tmp_path / "next", pair[0], edit, text, checkpoint={"export": "edit"})
    assert train(config, "stage2").finished
    assert (tmp_path / "next" / "edit.safetensors").is_file()
    assert not (tmp_path / "next" / "model").exists()


def test_an_edit_that_changed_is_unpacked_anew(tmp_path, pair, text):
    train(small_config(tmp_path / "run", *pair, text, checkpoint={"export": "both"}), "stage1")
    edit = shutil.copy(tmp_path / "run" / "edit.safetensors", tmp_path / "edit.safetensors")
    folder = unpack_student(str(pair[0]), str(edit), tmp_path / "there")
    first = logits(folder)
    unpacked_at = (tmp_path / "there" / "student" / "config.json").stat().st_mtime_ns
    assert unpack_student(str(pair[0]), str(edit), tmp_path / "there") == folder
    assert (tmp_path / "there" / "student" / "config.json").stat().st_mtime_ns == unpacked_at
    save_edit(pair[1], tmp_path / "untrained.safetensors")
    shutil.copy(tmp_path / "untrained.safetensors", edit)
    assert unpack_student(str(pair[0]), str(edit), tmp_path / "there") == folder
    assert torch.equal(logits(folder), logits(pair[1]))
    assert not torch.equal(logits(folder), first)
    # A folder that something else made is left alone.
    (tmp_path / "other" / "student").mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(AttnEditError, match=r"output: .*student.*another"):
            unpack_student(str(pair[0]), str(edit), tmp_path / "other")


def test_a_run_may_leave_its_checkpoint_alone(tmp_path, pair, text):
    config = small_config(tmp_path / "run", *pair, text, checkpoint={"export": "none"})
    assert train(config, "stage1").finished
    assert find_checkpoints(tmp_path / "run" / "checkpoints")
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(AttnEditError, match=r"checkpoint\.export"):
        export_newest(config)


def test_a_newer_export_takes_the_place_of_an_older_one(tmp_path, pair, text):
    config = small_config(tmp_path / "run", *pair, text)
    train(config, "stage1")
    model = tmp_path / "run" / "model"
    last = logits(model)
    earlier, latest = find_checkpoints(tmp_path / "run" / "checkpoints")
    export(config, earlier)
    assert not torch.equal(logits(model), last)
    export(config, latest)
    assert torch.equal(logits(model), last)
    assert {path.name for path in model.parent.iterdir() if path.name.startswith(".")} == set()


def test_stages_add_up(tmp_path, pair, text):
    train(small_config(tmp_path / "one", *pair, text), "stage1")
    train(small_config(tmp_path / "two", pair[0], tmp_path / "one" / "model", text), "stage2")
    provenance = AttnEditConfig.from_pretrained(tmp_path / "two" / "model").provenance
    assert provenance["tokens_seen"] == 2 * 6 * 4 * 64
    assert [stage["stage"] for stage in provenance["stages"]] == ["stage1", "stage2"]
    assert provenance["init"] == "inherit"


def test_an_edit_that_a_run_starts_from_is_not_overwritten(tmp_path, pair, text):
    teacher, student = pair
    edit = tmp_path / "run" / "edit.safetensors"
    edit.parent.mkdir()
    save_edit(student, edit)
    config = small_config(tmp_path / "run", teacher, edit, text, checkpoint={"export": "edit"})
    with pytest.raises(AttnEditError, match=r"output: .*take the place of the student"):
        train(config, "stage1")


@pytest.mark.parametrize("field", ["teacher", "student"])
def test_a_result_takes_nobodys_place(tmp_path, pair, text, field):
    """Refused before anything is trained."""
    sources = dict(zip(("teacher", "student"), pair))
    sources[field] = shutil.copytree(sources[field], tmp_path / "run" / "model")
    config = small_config(tmp_path / "run", *sources.values(), text)
    with pytest.raises(AttnEditError, match=rf"output: .*take the place of the {field}"):
        train(config, "stage1")
    config = small_config(tmp_path / "run", *pair, text)
    with pytest.raises(AttnEditError, match=r"model: name a new or an empty folder"):
        train(config, "stage1")
    assert not (tmp_path / "run" / "checkpoints").exists()
