"""``attnedit inspect``: what it shows of a checkpoint, and what it refuses."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.command import Attnedit, attnedit
from tests.unit.quantised import quantised_checkpoint
from tests.unit.tiny import FAMILY_NAMES, tiny_edit, tiny_model, tiny_teacher
from tests.unit.tiny_edited import tiny_edited, tiny_edited_checkpoint
from vllm_attnedit.cli.inspect import describe_run
from vllm_attnedit.config import FULL, LATENT, SLIDING, AttentionEdit
from vllm_attnedit.inspection import layer_runs

__all__ = ["attnedit"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_edited_checkpoint(tiny_edited("qwen3"), tmp_path / "edited")


def report_of(attnedit: Attnedit, folder: Path, code: int = 0) -> dict[str, Any]:
    done = attnedit("inspect", folder, "--json")
    assert done.code == code, done.err
    report: dict[str, Any] = json.loads(done.out)
    return report


@pytest.mark.parametrize("target", ["gateswa", "mla"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_sizes_and_difference(family: str, target: str, attnedit: Attnedit, tmp_path: Path) -> None:
    model = tiny_edited(family, tiny_edit(target))
    report = report_of(attnedit, tiny_edited_checkpoint(model, tmp_path / "e"))
    attention = sum(p.numel() for n, p in model.named_parameters() if ".self_attn." in n)
    total = sum(p.numel() for p in model.parameters())
    assert report["parameters"] == {
        "attention": attention,
        "rest": total - attention,
        "total": total,
    }
    assert report["bytes"]["total"] == 4 * total
    assert report["dtypes"] == {"float32": total}
    assert report["problems"] == []
    assert report["base_model_type"] == family
    # What was added and removed leads from the teacher's size to this one's.
    added, removed = (sum(t["parameters"] for t in report[k]) for k in ("added", "removed"))
    assert total - added + removed == sum(p.numel() for p in tiny_model(family).parameters())
    if target == "gateswa":
        assert report["added"] == [
            {"tensor": "self_attn.g_proj.weight", "count": 4, "parameters": 4 * 4 * 128}
        ]
        assert report["removed"] == []
    else:
        names = {t["tensor"] for t in report["removed"]}
        assert {"self_attn.k_proj.weight", "self_attn.v_proj.weight"} <= names
        assert ("self_attn.q_norm.weight" in names) == family.startswith("qwen3")


def test_table(attnedit: Attnedit, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["provenance"] = {"teacher": "tiny [red]", "tokens_seen": 12}
    (checkpoint / "config.json").write_text(json.dumps(config))
    done = attnedit("inspect", checkpoint)
    assert done.code == 0
    for text in (
        "edited qwen3",
        "  0-2 sliding_attention W8 headwise gate\n  3 full_attention headwise gate\n",
        "self_attn.g_proj.weight in 4 layers, 2,048 parameters",
        "teacher: tiny [red]",
        "tokens_seen: 12",
        "tokenizer.json",
    ):
        assert text in done.out
    assert "problem" not in done.out


def test_bfloat16_shards(attnedit: Attnedit, tmp_path: Path) -> None:
    model = tiny_edited("qwen3_moe").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    report = report_of(attnedit, tmp_path)
    total = sum(p.numel() for p in model.parameters())
    assert report["bytes"]["total"] == 2 * total
    assert report["dtypes"] == {"bfloat16": total}
    assert report["problems"] == []
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert {f["name"]: f["bytes"] for f in report["files"]} == sizes
    assert len([name for name in sizes if name.endswith(".safetensors")]) > 2


def test_no_tensor_is_loaded(attnedit: Attnedit, checkpoint: Path) -> None:
    """A tensor of 4 GiB, a hole in the file, is told of at no cost."""
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    begin = len(content) - 8 - size
    end = begin + 4 * 2**30
    header["huge"] = {"dtype": "F32", "shape": [2**30], "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded + content[8 + size :])
        out.truncate(8 + len(encoded) + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = report_of(attnedit, checkpoint, code=1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert report["problems"] == ["huge is unexpected"]
    assert report["bytes"]["rest"] > 4 * 2**30


def test_wrong_tensors_are_named(attnedit: Attnedit, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.g_proj.weight"]
    tensors["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(3, 5)
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)
    save_file(tensors, file)
    report = report_of(attnedit, checkpoint, code=1)
    assert report["problems"] == [
        "model.layers.1.self_attn.g_proj.weight is missing",
        "model.layers.0.self_attn.o_proj.weight is [3, 5], config.json asks for [128, 128]",
        "model.layers.0.self_attn.sinks is unexpected",
    ]
    done = attnedit("inspect", checkpoint)
    assert done.code == 1
    assert "problem: model.layers.1.self_attn.g_proj.weight is missing" in done.out


def test_refuses_what_is_no_edited_checkpoint(
    attnedit: Attnedit, tmp_path: Path, checkpoint: Path
) -> None:
    teacher = tiny_teacher("llama", tmp_path / "teacher")
    message = attnedit.refused("inspect", teacher)
    assert "model_type llama" in message
    assert "'attnedit edit' makes one" in message
    for path in (checkpoint / "config.json", tmp_path / "none"):
        assert "give the folder of an edited checkpoint" in attnedit.refused("inspect", path)
    (checkpoint / "config.json").unlink()
    assert "holds a config.json" in attnedit.refused("inspect", checkpoint)


def test_config_of_the_future(attnedit: Attnedit, checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["attention_edit"] |= {"version": 7, "sinks": 4}
    path.write_text(json.dumps(config))
    message = attnedit.refused("inspect", checkpoint)
    assert "attention_edit.version: 7: upgrade vllm-attnedit" in message


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_truncated_weights(kept: int, attnedit: Attnedit, checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "model.safetensors" in attnedit.refused("inspect", checkpoint)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_quantised_layers_are_spelt_their_own_way(
    method: str, attnedit: Attnedit, tmp_path: Path
) -> None:
    folder = quantised_checkpoint(tiny_edited("qwen3"), method, tmp_path / "quantised")
    assert report_of(attnedit, folder)["problems"] == []
    tensors = load_file(folder / "model.safetensors")
    gone = "model.layers.1.mlp.down_proj"
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    assert report_of(attnedit, folder, code=1)["problems"] == [f"{gone}.weight is missing"]


def test_missing_weights(attnedit: Attnedit, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").rename(tmp_path / "elsewhere")
    assert "give a folder with safetensors" in attnedit.refused("inspect", checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    assert "pickle" in attnedit.refused("inspect", checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "b.safetensors"}}'
    )
    assert "b.safetensors" in attnedit.refused("inspect", checkpoint)


def test_runs_of_equal_layers() -> None:
    dims: dict[str, Any] = {
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    types = (SLIDING, SLIDING, FULL, LATENT, LATENT, LATENT)
    runs = layer_runs(
        AttentionEdit(layer_types=types, sliding_window=128, q_lora_rank=1024, **dims)
    )
    assert [describe_run(run) for run in runs] == [
        "0-1 sliding_attention W128 no gate",
        "2 full_attention no gate",
        "3-5 latent_attention latent 512 + RoPE key 64, heads 128 + 64 (value 128) "
        "query rank 1024 no gate",
    ]
