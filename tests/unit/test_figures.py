"""Committed figures show what the accounting says today."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from vllm_attnedit.accounting import kv_bytes_per_request

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kv_memory", FIGURES / "kv_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numbers_equal_the_accounting(script: ModuleType) -> None:
    data = json.loads((FIGURES / "kv_memory.json").read_text())
    assert data["lengths"] == [2**power for power in range(10, 18)]
    assert list(data["bytes"]) == ["full attention", "MLA", "GateSWA, window 128"]
    models = script.models()
    for label, values in data["bytes"].items():
        held = [kv_bytes_per_request(models[label], length) for length in data["lengths"]]
        assert values == held
    # Qwen3-8B's published arithmetic, at 8K.
    assert [values[3] for values in data["bytes"].values()] == [
        147_456 * 8192,
        41_472 * 8192,
        24_576 * 8192 + 30 * 128 * 4096,
    ]


def test_the_picture_was_drawn_from_these_numbers(script: ModuleType, tmp_path: Path) -> None:
    data = json.loads((FIGURES / "kv_memory.json").read_text())
    committed, fresh = FIGURES / "kv_memory.png", tmp_path / "fresh.png"
    script.draw(data, fresh)
    with Image.open(committed) as old, Image.open(fresh) as new:
        assert old.info["Description"] == new.info["Description"] == script.digest(data)
        assert old.size == new.size
