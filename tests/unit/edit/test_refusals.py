"""Bad input of ``attnedit edit``: exit code 2, one line with field, value and fix, nothing left."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.tiny import tiny_teacher

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def teacher(teacher_of, tmp_path) -> Path:
    """A copy that a test may damage."""
    copy: Path = shutil.copytree(teacher_of("llama"), tmp_path / "in" / "teacher")
    return copy


@pytest.fixture
def shard(teacher) -> Path:
    return sorted(teacher.glob("model-*.safetensors"))[1]


@pytest.fixture
def refused(attnedit, tmp_path):
    """Runs an edit that must fail and leave the folder of its output as it was."""

    def run(source: object, *options: object, out: Path | None = None) -> str:
        target = tmp_path / "room" / "out" if out is None else out
        target.parent.mkdir(exist_ok=True)
        before = snapshot(target.parent)
        if "--target" not in options and "--from-edit" not in options:
            options = ("--target", "gateswa", *options)
        line: str = attnedit.refused("edit", source, target, *options)
        assert snapshot(target.parent) == before
        assert line.startswith("attnedit: ")
        return line.removeprefix("attnedit: ")

    return run


def snapshot(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_size for p in folder.rglob("*")}


def test_unsupported_family(refused, teacher):
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert refused(teacher) == (
        "model_type: gpt2: use a teacher of a supported family (llama, qwen2, qwen3, qwen3_moe)"
    )


def test_missing_shard(refused, teacher, shard):
    shard.unlink()
    line = refused(teacher)
    assert line.startswith(f"missing shard: {shard.name}: download this shard again")


@pytest.mark.parametrize("size", [0, 5, 300, -100])
def test_truncated_safetensors(refused, teacher, shard, size):
    whole = shard.stat().st_size
    os.truncate(shard, size if size >= 0 else whole + size)
    line = refused(teacher)
    assert line.startswith(f"{shard.name}: ")
    assert line.endswith("download the file again, it is truncated or damaged")


def test_a_tensor_that_its_shard_lacks(refused, teacher, shard):
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, shard)
    assert refused(teacher).startswith(f"{name}: missing: download the checkpoint again")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["mlp.down_proj", "self_attn.v_proj", "self_attn.o_proj"])
@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_weights_that_are_not_finite(refused, teacher, value, part, target):
    index = json.loads((teacher / "model.safetensors.index.json").read_text())["weight_map"]
    name = f"model.layers.1.{part}.weight"
    tensors = load_file(teacher / index[name])
    tensors[name][1, 2] = value
    save_file(tensors, teacher / index[name])
    line = refused(teacher, "--target", target)
    assert line == f"{name}: NaN or Inf weights: download the teacher again or repair this tensor"


def test_pickle_checkpoint(refused, tmp_path, teacher):
    for file in teacher.glob("model*"):
        file.unlink()
    (teacher / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    line = refused(teacher)
    assert line.startswith("pickle checkpoint: pytorch_model.bin: convert the checkpoint to safe")
    assert "any code" in line
    assert "any code" in refused(teacher / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("options", "start"),
    [
        (("--target", "linear"), "--target: linear: use gateswa or mla"),
        (("--window", "0"), "--window: 0: give an integer >= 1"),
        (("--window", "-3"), "--window: -3: give an integer >= 1"),
        (("--window", "many"), "Invalid value for '--window': many: give an integer"),
        (("--seed", "1.5"), "Invalid value for '--seed': 1.5: give an integer"),
        (("--full-layers", ""), "--full-layers: '': name at least one layer"),
        (("--full-layers", "1,4"), "--full-layers: 4: the teacher has 4 layers: use 0 to 3"),
        (("--full-layers", "1,1"), "--full-layers: 1: name each layer once"),
        (("--full-layers", "a"), "--full-layers: a: give layer indices separated by commas"),
        (("--gate", "both"), "--gate: both: use headwise, elementwise or none"),
        (("--init", "zero"), "--init: zero: use inherit or random"),
        (("--dtype", "float8"), "--dtype: float8: use bfloat16, float16 or float32"),
        (("--calibration", "x.txt"), "--calibration: x.txt: leave it out: only --target mla"),
        (("--calibration-tokens", "9"), "--calibration-tokens: 9: leave it out: only"),
        (("--kv-lora-rank", "8"), "--kv-lora-rank: 8: leave it out or use --target mla"),
        (("--target", "mla", "--kv-lora-rank", "0"), "--kv-lora-rank: 0: give an integer >= 1"),
        (("--target", "mla", "--kv-lora-rank", "999"), "--kv-lora-rank: 999: use at most 128"),
        (("--target", "mla", "--v-head-dim", "64"), "--v-head-dim: 64: use 32: o_proj is the t"),
        (("--target", "mla", "--qk-rope-head-dim", "5"), "--qk-rope-head-dim: 5: give an even"),
        (("--target", "mla", "--window", "8"), "--window: 8: leave it out or use --target gateswa"),
        (("--target", "mla", "--calibration", "no.txt"), "--calibration: no.txt: give a UTF-8"),
        (("--target", "mla", "--calibration-tokens", "0"), "--calibration-tokens: 0: give an int"),
        (("--target", "mla", "--calibration-device", "warp"), "--calibration-device: warp: use"),
        (("--target", "mla", "--calibration-device", "cuda:99"), "--calibration-device: cuda:99:"),
        (("--revision", "main"), "--revision: main: leave it out: the teacher is a local path"),
        (("--from-edit", "no.file"), "--from-edit: no.file: no such file"),
        (("--wat",), "No such option: --wat"),
    ],
)
def test_options(refused, teacher_of, options, start):
    assert refused(teacher_of("llama"), *options).startswith(start)


def test_target_is_needed(attnedit, teacher_of, tmp_path):
    line = attnedit.refused("edit", teacher_of("llama"), tmp_path / "out")
    assert line == "attnedit: --target: missing: use gateswa or mla"
    assert list(tmp_path.iterdir()) == []


def test_options_that_exclude_each_other(refused, attnedit, teacher_of, tmp_path):
    line = attnedit.refused(
        "edit", teacher_of("llama"), tmp_path / "x", "--target", "mla", "--save-edit"
    )
    assert line == "attnedit: --target: mla: leave it out, or --save-edit"
    line = attnedit.refused(
        "edit", teacher_of("llama"), tmp_path / "x", "--from-edit", "a", "--save-edit"
    )
    assert line == "attnedit: --from-edit: a: leave it out, or --save-edit"
    for option, value, beside in (
        ("--window", "9", ("--from-edit", "a")),
        ("--init", "inherit", ("--from-edit", "a")),
        ("--dtype", "float16", ("--compact-edit", "a")),
        ("--revision", "main", ("--save-edit",)),
    ):
        line = attnedit.refused("edit", teacher_of("llama"), tmp_path / "x", *beside, option, value)
        assert line == f"attnedit: {option}: {value}: leave it out, or {beside[0]}"
    line = refused(
        teacher_of("llama"), "--target", "mla", "--calibration", "none", "--calibration-tokens", 9
    )
    assert line == "--calibration-tokens: 9: leave it out: there is no text"


def test_short_calibration_text(refused, teacher_of, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    line = refused(teacher_of("llama"), "--target", "mla", "--calibration", tmp_path / "short.txt")
    assert line.startswith("--calibration: short.txt: give a longer text")


def test_o_proj_that_does_not_fit_the_heads(refused, tmp_path):
    teacher = tiny_teacher("qwen3", tmp_path / "in")
    tensors = load_file(teacher / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name][:, :96].contiguous()
    save_file(tensors, teacher / "model.safetensors")
    line = refused(teacher, "--target", "mla")
    assert line.startswith(f"{name}: [128, 96]: config.json asks for [128, 128]")


def test_output_that_is_not_empty(refused, teacher_of, tmp_path):
    out = tmp_path / "room" / "full"
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("keep")
    line = refused(teacher_of("llama"), out=out)
    assert line == f"OUT: {out}: name a new or an empty folder: this one is not empty"
    file = tmp_path / "room" / "file"
    file.write_text("keep")
    assert refused(teacher_of("llama"), out=file) == f"OUT: {file}: name a folder: this is a file"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder", "TEACHER: no/such/folder: no such file or folder; give an existing"),
        ("nothing", "TEACHER: nothing: no such file or folder"),
        ("bad id/x", "TEACHER: bad id/x: no such file or folder"),
    ],
)
def test_no_teacher(refused, source, message):
    assert refused(source).startswith(message)


def test_a_folder_without_a_model(refused, tmp_path, teacher):
    (tmp_path / "empty").mkdir()
    assert "no config.json there" in refused(tmp_path / "empty")
    for file in teacher.glob("model*"):
        file.unlink()
    assert "give a model with model.safetensors" in refused(teacher)
    (teacher / "config.json").write_text("{")
    assert "config.json" in refused(teacher)


def test_gguf_files_that_are_none(refused, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00 and nothing more")
    assert refused(file).endswith("download the file again, it is truncated or no GGUF file")
    other = tmp_path / "model.txt"
    other.write_text("text")
    assert refused(other).startswith(f"TEACHER: {other}: give a folder, a hub id or a .gguf file")


def test_disk_too_small_before_anything_is_written(refused, teacher_of, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10**9, 10**9, 10**6))
    line = refused(teacher_of("llama"))
    assert line.startswith("OUT: ")
    assert line.endswith("0.00 GB free: free space or choose another disk: 0.02 GB are needed")


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_disk_full_while_writing(refused, teacher_of, monkeypatch, call):
    calls = 0
    original = getattr(os, call)

    def fill_up(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(os, call, fill_up)
    line = refused(teacher_of("llama"))
    assert calls > 3
    assert line.endswith(
        "No space left on device: free space or choose another disk; nothing was left behind"
    )


def test_a_teacher_without_a_tokenizer(refused, tmp_path, teacher):
    for file in teacher.glob("tokenizer*"):
        file.unlink()
    line = refused(teacher, "--target", "mla")
    assert line.startswith("tokenizer: teacher: give a teacher with a tokenizer that transformers")
