"""The comparison of one device with several, whole: four runs, two of them of two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.training.small import make_pair, write_text
from tests.unit.training.test_cli import write_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]


def test_one_and_two_processes(tmp_path: Path) -> None:
    """A checkpoint of either is carried on by the other, and all losses are the same, bit for bit:
    with a micro-batch for each process nothing is added in another order. In bfloat16 a last bit
    that differs grows to a thousandth of a nat within some dozen steps."""
    material = *make_pair(tmp_path), write_text(tmp_path / "text.txt")
    config = write_config(tmp_path / "small.yaml", tmp_path / "unused", *material)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks", "training-scaling", "--config", str(config)]
    command += ["--devices", "2", "--steps", "16", "--tail", "3", "--out", str(out)]
    command += ["--optim.batch", "2", "--optim.micro_batch", "1", "--stage2.lr", "1e-3"]
    command += ["--run.precision", "bf16"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary == {"complete": True, "rows": 5, "result": str(out / "result.json")}
    rows = json.loads((out / "result.json").read_text())["rows"]
    assert [row["unit"] for row in rows] == ["tok/s", "tok/s", "nat", "nat", "nat"]
    assert rows[1]["case"] == "training small stage2 B2 L64 bf16 x2"
    for row, steps in zip(rows[2:], (16, 3, 3), strict=True):
        assert row["steps"] == steps
        assert row["value"] == 0
        assert row["within"]
        assert row["first_loss"] > 0.01
    log = next((out / "logs").glob("one-to-several-*.log")).read_text()
    assert "2 x cpu" in log
    assert "step-00000013: 13 of 16 steps are done" in log
    again = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False
    )
    assert again.returncode == 0
    assert len(list((out / "logs").iterdir())) == 4  # nothing was run again
