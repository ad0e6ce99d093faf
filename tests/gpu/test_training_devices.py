"""Stage 2 on one GPU and sharded over two: the same steps, bit for bit, eager and compiled.

python -m pytest -m gpu tests/gpu/test_training_devices.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.quickstart.processes import free_port
from tests.unit.training.small import make_pair, write_text
from tests.unit.training.test_cli import write_config
from training.parts import PartsReader
from training.progress import read_metrics
from training.resuming import find_checkpoints

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def train(processes: int, *arguments: str) -> None:
    start = ["-m", "training"]
    if processes > 1:
        start = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node"]
        start += [str(processes), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        start += ["-m", "training"]
    done = subprocess.run(
        [sys.executable, *start, *arguments], cwd=ROOT, env=os.environ, text=True,
        capture_output=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("compiled", ["false", "true"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])  # biases, norms
def test_two_gpus_repeat_one(tmp_path, family, compiled):
    """Of two micro-batches the order does not matter, so nothing is left to differ."""
    pair, text = make_pair(tmp_path, family), write_text(tmp_path / "text.txt")
    config = write_config(tmp_path / "c.yaml", tmp_path / "unused", *pair, text)
    common = ["stage2", str(config), "--run.device", "auto", "--run.precision", "bf16"]
    common += ["--run.compile", compiled, "--optim.micro_batch", "2"]
    common += ["--checkpoint.every_steps", "1", "--checkpoint.keep", "9"]
    common += ["--checkpoint.weights", "fp32", "--checkpoint.optimizer", "fp32"]
    folders = [tmp_path / "one", tmp_path / "two"]
    train(1, *common, "--output", str(folders[0]))
    sharded = ["--run.sharding", "fsdp2", "--run.shard_frozen", "false"]
    train(2, *common, *sharded, "--output", str(folders[1]))
    # After one step AdamW's moments are the gradients: they tell where a difference begins.
    first = [PartsReader(find_checkpoints(folder / "checkpoints")[0]) for folder in folders]
    names = [name for name in first[0] if not name.startswith("generator/")]
    differ = [n for n in names if not torch.equal(*(reader.load(n) for reader in first))]
    assert differ == []
    one, two = ([row["loss"] for row in read_metrics(folder)] for folder in folders)
    assert two == one
    assert len(one) == 6
