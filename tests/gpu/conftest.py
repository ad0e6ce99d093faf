"""Engines of GPU tests have a process of their own: memory and vLLM's global state go with it."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    # Tests ask that process which backends it took, by a function of their own.
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
