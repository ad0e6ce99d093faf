"""Host memory of an edit: near one of the teacher's files plus one layer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.tiny import tiny_config, tiny_tokenizer
from vllm_attnedit.edit.layout import teacher_tensors
from vllm_attnedit.edit.writer import PlannedTensor, ShardWriter, shard_names, write_index

LAYERS = 8
# In a process of its own, whose high-water mark is reset once all code is loaded and has run.
MEASURE = """
import re, sys
from pathlib import Path
from vllm_attnedit.edit import Calibration, EditPlan, edit_checkpoint

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def edit(teacher, out):
    text = Calibration.builtin(256) if sys.argv[3] == "mla" else None
    edit_checkpoint(teacher, out, EditPlan(target=sys.argv[3]), calibration=text)

edit(sys.argv[1], sys.argv[4] + "/warm")
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
edit(sys.argv[2], sys.argv[4] + "/out")
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers, a file each, about 65 MB: 520 MB in all."""
    folder = tmp_path_factory.mktemp("large") / "teacher"
    folder.mkdir()
    config = tiny_config(
        "llama",
        num_hidden_layers=LAYERS,
        hidden_size=1024,
        intermediate_size=5120,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    shards: list[list[PlannedTensor]] = [[] for _ in range(LAYERS)]
    for name, shape in teacher_tensors(config).items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        shards[layer].append(PlannedTensor(name, shape, torch.float32))
    for file, tensors in zip(shard_names(LAYERS), shards, strict=True):
        writer = ShardWriter(folder / file, tensors)
        for tensor in tensors:
            writer.write(tensor.name, torch.randn(tensor.shape) * 0.03)
        writer.close()
    write_index(folder, shards)
    return folder


@pytest.mark.parametrize("target", ["gateswa", "mla"])
def test_peak_is_one_file_and_one_layer(large_teacher, teacher_of, tmp_path, target):
    sizes = [file.stat().st_size for file in large_teacher.glob("*.safetensors")]
    shard = layer = max(sizes)
    assert sum(sizes) > 7 * shard
    peak = int(
        subprocess.check_output(
            [sys.executable, "-c", MEASURE, teacher_of("llama"), large_teacher, target, tmp_path],
            text=True,
            stderr=subprocess.DEVNULL,
        )
    )
    assert 0 < peak < 1.5 * shard + layer, f"{peak / 1e6:.0f} MB for files of {shard / 1e6:.0f} MB"
