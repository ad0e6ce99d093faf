"""A teacher writes its own text with vLLM, and a student learns from it."""

from __future__ import annotations

import json

import pytest

from tests.unit.training.small import make_pair, small_config, write_text
from training.generate import write_texts
from training.runs import train

pytestmark = pytest.mark.integration


def test_text_that_the_teacher_writes_trains_its_student(tmp_path):
    teacher, student = make_pair(tmp_path)
    config = small_config(
        tmp_path / "run", teacher, student, write_text(tmp_path / "unused.txt", 10),
        data={"sources": [{"kind": "teacher", "path": str(tmp_path / "run" / "teacher.jsonl")}]},
        generate={
            "samples": 24, "max_tokens": 40, "batch": 10,
            "vllm": {"max_model_len": 128, "dtype": "float32", "enforce_eager": True},
        },
    )  # fmt: skip
    path = write_texts(config)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert len(texts) == 24
    assert len(set(texts)) > 20
    first = path.read_text()
    path.unlink()
    write_texts(config)
    assert path.read_text() == first  # every text has a seed of its own
    assert train(config, "stage2").finished
