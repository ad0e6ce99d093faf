"""A stand-in for the process that runs vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_attnedit.verification import served


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the script that runs vLLM."""
    script = tmp_path / "worker.py"
    monkeypatch.setattr(served, "_WORKER", script)
    return script
