"""Small runs: a tiny teacher, a student edited from it, text, and configurations of a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.unit.tiny import tiny_teacher
from training.config import Config
from training.options import config_from_dict
from vllm_attnedit.edit import EditPlan, edit_checkpoint

WORDS = ["the", "thing", "and", "then", "an", "inner", "theory", "of", "rain", "over"]
WORDS += ["the", "land", "in", "anger", "there", "he", "ran"]


def write_text(path: Path, words: int = 6000, seed: int = 0) -> Path:
    """Paragraphs of a few words that the tiny tokenizer cuts into many tokens."""
    draw = np.random.default_rng(seed)
    lines = []
    while words > 0:
        count = int(draw.integers(5, 60))
        lines.append(" ".join(draw.choice(WORDS, count)))
        words -= count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


def write_chats(path: Path, count: int = 30, seed: int = 0) -> Path:
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        turns = []
        for _ in range(int(draw.integers(1, 4))):
            turns.append({"role": "user", "content": " ".join(draw.choice(WORDS, 6))})
            turns.append({"role": "assistant", "content": " ".join(draw.choice(WORDS, 9))})
        rows.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def ids_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens of the tiny tokenizer, ``(rows, length)``."""
    return torch.randint(5, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


def make_pair(
    folder: Path,
    family: str = "llama",
    target: str = "gateswa",
    init: str = "inherit",
    **teacher: Any,
) -> tuple[Path, Path]:
    """A teacher and a student edited from it, in folders."""
    made = tiny_teacher(family, folder / f"teacher-{family}", **teacher)
    plan = (
        EditPlan(target="gateswa", init=init, window=8, full_layers=(3,))
        if target == "gateswa"
        else EditPlan(target="mla", init=init)
    )
    student = folder / f"student-{family}-{target}-{init}"
    edit_checkpoint(made, student, plan)
    return made, student


def small_config(folder: Path, *material: Path, **sections: dict[str, Any]) -> Config:
    """A run of 6 steps of 4 sequences of 64 tokens in float32 on the CPU.

    ``material`` is teacher, student and text; ``sections`` change the options.
    """
    teacher, student, text = material
    values: dict[str, Any] = {
        "teacher": str(teacher),
        "student": str(student),
        "output": str(folder),
        "data": {
            "sources": [{"kind": "text", "path": str(text), "separator": "\n\n"}],
            "sequence_length": 64,
        },
        "run": {"device": "cpu", "precision": "fp32"},
        "optim": {"tokens": 6 * 4 * 64, "batch": 4, "micro_batch": 2, "warmup": 0.0},
        "stage1": {},
        "stage2": {"chunk_tokens": 48},
        "checkpoint": {"every_steps": 2, "every_minutes": None},
        "log": {"every": 2, "tensorboard": False, "curves": False},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    return config_from_dict(values)
