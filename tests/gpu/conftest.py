"""Engines of GPU tests have a process of their own: memory and vLLM's global state go with it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Told to end, as by a suite that is out of time, tests end the servers that they started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    # A forked one is refused by the driver once a test before it in this process opened a GPU.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # Tests ask that process which backends it took, by a function of their own.
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    # Compiled graphs of another test or of older code are never taken.
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm-cache"))
    # vLLM's own Triton kernels, of experts above all, would round float32 to TF32.
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    # Others may use the machine's GPUs through NVLink multicast, whose misuse stops them all.
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
