"""Runs in processes of their own that are killed, asked to stop, or given a bad start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.training.small import make_pair, write_text
from tests.unit.training.test_cli import write_config
from training.progress import read_metrics
from training.resuming import find_checkpoints

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
STEPS = 24


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    return *make_pair(folder), write_text(folder / "text.txt")


def start(config: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "training", *overrides[:1], str(config), *overrides[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def options(folder: Path) -> list[str]:
    return [
        "--optim.tokens",
        str(STEPS * 4 * 64),
        "--checkpoint.every_steps",
        "3",
        "--output",
        str(folder),
    ]


def wait_for_steps(run: subprocess.Popen, folder: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    while len(read_metrics(folder)) < count:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_killed_run_repeats_every_bit(tmp_path, material, stage):
    config = write_config(tmp_path / "c.yaml", tmp_path / "unused", *material)
    whole = start(config, stage, *options(tmp_path / "whole"))
    # Twice, at moments that no save is tied to.
    for count in (5, 13):
        cut = start(config, stage, *options(tmp_path / "cut"))
        wait_for_steps(cut, tmp_path / "cut", count)
        cut.send_signal(signal.SIGKILL)
        cut.communicate()
        assert cut.returncode == -signal.SIGKILL
        assert len(read_metrics(tmp_path / "cut")) < STEPS
    last = start(config, stage, *options(tmp_path / "cut"))
    for run in (last, whole):
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")
    weights = [
        (tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("cut", "whole")
    ]
    assert weights[0] == weights[1]


def test_sigterm_saves_and_leaves_with_zero(tmp_path, material):
    config = write_config(tmp_path / "c.yaml", tmp_path / "run", *material)
    arguments = [*options(tmp_path / "run"), "--checkpoint.every_steps", "1000"]
    run = start(config, "stage2", *arguments)
    wait_for_steps(run, tmp_path / "run", 4)
    run.send_signal(signal.SIGTERM)
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    (saved,) = find_checkpoints(tmp_path / "run" / "checkpoints")
    done = read_metrics(tmp_path / "run")[-1]["step"]
    assert saved.name == f"step-{done:08d}"
    assert f"stopped after step {done}" in output
    assert not (tmp_path / "run" / "model").exists()
    again = start(config, "stage2", *arguments)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert f"{done} of {STEPS} steps are done" in output
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_bad_input_leaves_with_two_and_one_line(tmp_path, material):
    config = write_config(tmp_path / "c.yaml", tmp_path / "run", *material)
    run = start(config, "stage1", "--optim.clipp", "1")
    output, errors = run.communicate(timeout=60)
    assert run.returncode == 2
    assert output == ""
    assert errors.splitlines() == [
        "error: unknown key: optim.clipp: no such option; the nearest is optim.clip"
    ]
