"""An experiment by its command: cut by the budget and by SIGTERM, on two devices, elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.unit.tiny import tiny_teacher
from tests.unit.training.small import small_config, write_text
from training.progress import read_metrics

# By budgets and deadlines, which other work on the machine would move.
pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
STEP = 4 * 64
"""Tokens."""
ENDLESS = 1_000_000 * STEP


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    return tiny_teacher("llama", folder / "teacher"), write_text(folder / "text.txt")


def write(folder: Path, material, runs: list[dict[str, Any]], **more: Any) -> Path:
    teacher, text = material
    options = asdict(small_config(folder, teacher, teacher, text))
    for name in ("student", "output"):
        options.pop(name)
    options["checkpoint"] |= {"every_steps": 1000}
    options["evaluate"] |= {"label": "tiny", "perplexity": {"words": str(text)}, "lengths": [64]}
    options["evaluate"] |= {"agreement_length": 64, "max_windows": 4}
    options["choose"] |= {"text": str(text), "window": 8, "sequence_length": 64, "sequences": 1}
    path = folder / "experiment.json"
    path.write_text(json.dumps({"options": options, "runs": runs, **more}))
    return path


def start(experiment: Path, *options: str) -> subprocess.Popen:
    out = str(experiment.parent / "out")
    command = [sys.executable, "-m", "benchmarks", "training", str(experiment), "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.Popen(
        [*command, *options], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, dict[str, Any]]:
    """What a call printed, and its last line."""
    output, errors = process.communicate(timeout=500)
    assert process.returncode == status, errors + output
    return output, json.loads(output.splitlines()[-1])


def wait_for_steps(process: subprocess.Popen, folder: Path, count: int) -> None:
    deadline = time.monotonic() + 200
    while len(read_metrics(folder)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_outlives_budget_and_machine(tmp_path, material):
    run = {
        "name": "long",
        "student": {"target": "gateswa", "window": 8, "full_layers": "chosen"},
        "stage2": {"tokens": ENDLESS, "lr": 1e-3},
    }
    seconds = {"start": 5, "save": 15, "pack": 15, "report": 15, "edit": 15, "choose": 15}
    experiment = write(
        tmp_path, material, [run], pack={"keep": "all"}, seconds=seconds | {"tokenize": 15}
    )
    out, stage = tmp_path / "out", tmp_path / "out" / "work" / "runs" / "long" / "stage2"
    began = time.monotonic()
    output, summary = finish(start(experiment, "--budget", "100"))
    assert time.monotonic() - began < 105
    assert "long@stage2: stopped" in output
    assert "long@stage2: its state is packed" in output
    assert "measure@teacher@text" in summary["left"]
    assert summary["failed"] == []
    result = json.loads((out / "results" / "long.json").read_text())["stages"]["stage2"]
    first = read_metrics(stage)
    assert result["step"] == first[-1]["step"] > 10
    assert result["state"] == "stopped"
    assert "| stopped |" in (out / "report.md").read_text()
    # The machine is gone, and with it everything that was not carried away.
    shutil.rmtree(out / "work")
    again = start(experiment, "--only", "long")
    wait_for_steps(again, stage, 3)
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=120)
    assert again.returncode == 128 + signal.SIGTERM
    assert read_metrics(stage)[0]["step"] == first[-1]["step"] + 1
    later = json.loads((out / "results" / "long.json").read_text())["stages"]["stage2"]
    assert later["step"] == read_metrics(stage)[-1]["step"] > result["step"]
    assert later["parts"] == 2
    assert later["curve"][0] == result["curve"][0]


def test_sigterm_failure_and_two_devices(tmp_path, material):
    student = {"target": "gateswa", "window": 8, "full_layers": "3"}
    steps = 25
    runs = [
        {
            "name": "cut",
            "student": student,
            "stage1": {"tokens": steps * STEP, "lr": 1e-3},
            "stage2": {"tokens": steps * STEP, "lr": 1e-3},
            "evaluate": ["text"],
        },
        {
            "name": "diverges",
            "student": student,
            "stage2": {"tokens": 6 * STEP, "lr": 1e30, "options": {"optim.clip": 0}},
        },
        {
            "name": "latent",
            "student": {"target": "mla", "init": "random"},
            "stage1": {"tokens": 2 * STEP, "lr": 1e-3},
            "evaluate": [],
        },
        {"name": "next", "after": "latent", "stage2": {"tokens": 2 * STEP, "lr": 1e-3}},
    ]
    experiment = write(tmp_path, material, runs)
    out = tmp_path / "out"
    folder = out / "work" / "runs" / "cut"
    cut = start(experiment, "--only", "cut")
    wait_for_steps(cut, folder / "stage2", 4)
    cut.send_signal(signal.SIGTERM)
    cut.communicate(timeout=120)
    assert cut.returncode == 128 + signal.SIGTERM
    done = read_metrics(folder / "stage2")[-1]["step"]
    assert done < steps
    assert f"step-{done:08d}" in {path.name for path in (folder / "stage2/checkpoints").iterdir()}
    assert (out / "report.md").is_file()

    output, summary = finish(start(experiment, "--devices", "0,1"), status=1)
    assert summary["failed"] == ["diverges@stage2"]
    assert {name.split("@")[0] for name in summary["left"]} == {"diverges", "measure"}
    assert "[0]" in output
    assert "[1]" in output
    for task in ("next@stage2", "measure@cut@text", "measure@next@text", "measure@teacher@text"):
        assert output.count(f"{task}: done") == 1
    assert "| failed |" in (out / "report.md").read_text()
    document = json.loads((out / "report.json").read_text())
    (failure,) = document["failed"]
    assert failure["text"].startswith("error: loss: not finite at step")
    assert {row["variant"] for row in document["rows"] if "variant" in row} == {
        "teacher", "cut", "next",
    }  # fmt: skip
    assert all(row["control"] == "teacher" for row in document["rows"] if "variant" in row)
    assert (out / "packed" / "next" / "stage2" / "manifest.json").is_file()
    assert not (out / "packed" / "diverges").exists()

    # The same stage without the interruption, by hand, from the file that the command wrote.
    job = out / "work" / "jobs" / "cut@stage2.yaml"
    whole = [sys.executable, "-m", "training", "stage2", str(job), "--output", f"{tmp_path}/whole"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    subprocess.run(whole, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert read_metrics(tmp_path / "whole") == read_metrics(folder / "stage2")
