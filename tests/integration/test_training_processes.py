"""Two processes (gloo) take the same steps as one: sharded, averaged, or with layers shared out."""

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

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
FSDP2 = ("--run.sharding", "fsdp2")
TRAINED_ONLY = ("--run.shard_frozen", "false")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    return *make_pair(folder), write_text(folder / "text.txt")


def launch(processes: int, *arguments: str) -> None:
    command = [sys.executable]
    if processes > 1:
        # `accelerate launch`. With --cpu it would ask for MPI; --multi_gpu means several processes,
        # which find out for themselves that there is no GPU and speak gloo.
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        command += ["--num_processes", str(processes), "--main_process_port", str(free_port())]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "training", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def torchrun(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Two processes that may fail."""
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "-m", "training", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, timeout=120, check=False
    )


def curve(folder: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(folder)]


@pytest.mark.parametrize(
    ("stage", "extra"),
    [
        ("stage1", FSDP2),
        ("stage1", ["--stage1.split", "layers"]),
        ("stage2", []),
        ("stage2", [*FSDP2, "--stage2.cosine_weight", "0.1"]),
        ("stage2", [*FSDP2, "--stage2.trainable", "all", "--stage2.lr_rest", "1e-3"]),
        ("stage2", [*FSDP2, *TRAINED_ONLY]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "averaged",
)
def test_two_processes_equal_one(tmp_path, material, stage, extra):
    config = write_config(tmp_path / "c.yaml", tmp_path / "unused", *material)
    common = [stage, str(config), "--optim.micro_batch", "1"]
    of_several = (*FSDP2, *TRAINED_ONLY, "--stage1.split", "layers")
    alone = [option for option in extra if option not in of_several]
    launch(1, *common, *alone, "--output", str(tmp_path / "one"))
    launch(2, *common, *extra, "--output", str(tmp_path / "two"))
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == len(two) == 6
    assert two == pytest.approx(one, abs=1e-4)
    assert curve(tmp_path / "two", "grad_norm") == pytest.approx(
        curve(tmp_path / "one", "grad_norm"), rel=1e-3
    )
    weights = [
        PartsReader(find_checkpoints(tmp_path / name / "checkpoints")[-1])
        for name in ("one", "two")
    ]
    names = {name for name in weights[0] if not name.startswith("generator/")}
    assert names == {name for name in weights[1] if not name.startswith("generator/")}
    for name in names:
        torch.testing.assert_close(
            weights[1].load(name), weights[0].load(name), atol=1e-3, rtol=1e-2
        )
    assert (tmp_path / "two" / "model" / "config.json").is_file()


def test_a_sharded_run_resumes_alone_and_back(tmp_path, material):
    """Checkpoints do not depend on the number of processes."""
    config = write_config(tmp_path / "c.yaml", tmp_path / "unused", *material)
    common = ["stage2", str(config), "--optim.micro_batch", "1", "--output", str(tmp_path / "run")]
    stop = ["--run.minutes", "1e-9"]  # after one step
    launch(2, *common, *FSDP2, *stop)
    launch(1, *common, *stop)
    launch(2, *common, *FSDP2, *TRAINED_ONLY)
    launch(1, *common[:-1], str(tmp_path / "whole"))
    assert curve(tmp_path / "run") == pytest.approx(curve(tmp_path / "whole"), abs=1e-4)


def test_a_cache_that_one_process_lacks(tmp_path, material):
    """A sharded teacher runs on all processes or on none."""
    config = write_config(tmp_path / "c.yaml", tmp_path / "unused", *material)
    common = ["stage2", str(config), "--optim.micro_batch", "1", *FSDP2]
    common += ["--stage2.top_k", "16", "--stage2.cache", str(tmp_path / "cache")]
    launch(2, *common, "--output", str(tmp_path / "first"))
    # Sequence 1 is the second process's.
    (tmp_path / "cache" / "000000" / "000000001.safetensors").unlink()
    launch(2, *common, "--output", str(tmp_path / "second"))
    assert curve(tmp_path / "second") == curve(tmp_path / "first")


def test_a_full_disk_ends_every_process(tmp_path, material):
    """One that could not write must not leave the others waiting for its part of the weights."""
    config = write_config(tmp_path / "c.yaml", tmp_path / "unused", *material)
    full = ("bash", "-c", 'ulimit -f 256; exec "$@"', "bash")
    output = ("--output", str(tmp_path / "run"))
    done = torchrun("stage2", str(config), *FSDP2, "--optim.micro_batch", "1", *output, prefix=full)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "free space and start again" in said
    assert "another process failed" in said
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


def test_all_processes_blame_the_same(tmp_path, material):
    """Each holds a part of every weight, and a NaN may lie in one part alone."""
    config = write_config(tmp_path / "c.yaml", tmp_path / "unused", *material)
    spoilt = ("--stage2.lr", "1e30", "--optim.warmup", "0", "--optim.micro_batch", "1")
    done = torchrun("stage2", str(config), *FSDP2, *spoilt, "--output", str(tmp_path / "run"))
    lines = [line for line in done.stderr.splitlines() if "not finite at step" in line]
    assert done.returncode != 0
    assert len(lines) == 2, done.stderr
    assert len(set(lines)) == 1
    assert "layer" in lines[0]


@pytest.mark.parametrize(
    ("family", "more"), [("qwen3", ()), ("qwen2", TRAINED_ONLY)], ids=["norms", "biases"]
)
def test_bf16_sharded_repeats_every_bit(tmp_path, material, family, more):
    """What is gathered in bf16 is what autocast would have cast, and of two micro-batches the order
    does not matter; but a trained embedding adds up its gradient in bf16."""
    pair = make_pair(tmp_path, family)
    config = write_config(tmp_path / "c.yaml", tmp_path / "unused", *pair, material[2])
    common = ["stage2", str(config), "--optim.micro_batch", "2", "--run.precision", "bf16"]
    everything = ["--stage2.trainable", "all", "--stage2.lr_rest", "1e-3"]
    launch(1, *common, "--output", str(tmp_path / "one"))
    launch(2, *common, *FSDP2, *more, "--output", str(tmp_path / "two"))
    assert curve(tmp_path / "two") == curve(tmp_path / "one")
    assert curve(tmp_path / "two", "grad_norm") == curve(tmp_path / "one", "grad_norm")
    launch(1, *common, *everything, "--output", str(tmp_path / "one-all"))
    launch(2, *common, *everything, *FSDP2, *more, "--output", str(tmp_path / "two-all"))
    assert curve(tmp_path / "two-all") == pytest.approx(curve(tmp_path / "one-all"), rel=0.03)
    first = [read_metrics(tmp_path / name)[0]["loss"] for name in ("one-all", "two-all")]
    assert first[0] == first[1]
