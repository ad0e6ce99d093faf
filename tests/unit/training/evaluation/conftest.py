"""What evaluations start from: both models of the pair, and tasks in files."""

from __future__ import annotations

import json

import pytest
import torch

from tests.unit.training.evaluation.tasks import TASKS
from training.models import load_student, load_teacher


@pytest.fixture(scope="module")
def teacher(pair):
    return load_teacher(str(pair[0]), dtype=torch.float32)


@pytest.fixture(scope="module")
def student(pair):
    return load_student(str(pair[1]), dtype=torch.float32)


@pytest.fixture
def task_files(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rows in TASKS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(autouse=True)
def _own_dataset_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
