"""The trained edit that the demo serves: it belongs to the demo's teacher and is worth its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vllm_attnedit  # noqa: F401  registers the edited model
from examples.quickstart.__main__ import EDIT
from tests.e2e.conftest import attnedit

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]


def apply(teacher: Path, out: Path, *arguments: object) -> Path:
    done = attnedit("edit", teacher, out, *arguments)
    assert done.returncode == 0, done.stderr
    return out


@torch.no_grad()
def loss(folder: Path, text: str) -> float:
    """Mean loss in nats a token over the first 1,024 tokens of a text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][:, :1024]
    assert ids.shape[1] == 1024
    return float(model(ids, labels=ids).loss)


def test_training_took_back_most_of_what_windows_cost(teacher: Path, tmp_path: Path) -> None:
    trained = apply(teacher, tmp_path / "trained", "--from-edit", EDIT)
    about = json.loads((trained / "config.json").read_text())["attention_edit"]
    types, window = about["layer_types"], about["sliding_window"]
    full = ",".join(str(i) for i, kind in enumerate(types) if kind == "full_attention")
    gateswa = ["--target", "gateswa", "--full-layers", full, "--window"]
    start = apply(teacher, tmp_path / "start", *gateswa, window)
    whole = apply(teacher, tmp_path / "whole", *gateswa, 4096)
    # Windows of 4,096 hide nothing of 1,024 tokens: this is the teacher.
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    untrained, after, best = (loss(folder, text) for folder in (start, trained, whole))
    assert best < after < untrained
    assert after - best < 0.5 * (untrained - best)
