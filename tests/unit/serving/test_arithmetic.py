"""The bound, against sums done by hand for Qwen3-8B."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.models import TEACHERS, edit_for, write_model
from benchmarks.serving.report.arithmetic import (
    DEVICES,
    attention_operations,
    bound,
    device_of,
    parameters,
)
from benchmarks.serving.report.collect import arithmetic_rows
from benchmarks.serving.report.sections import arithmetic_section
from vllm_attnedit.config import AttnEditConfig


def config_of(name: str, target: str) -> Any:
    teacher = TEACHERS[name]
    if target == "full":
        return SimpleNamespace(**teacher)
    fields = {k: v for k, v in teacher.items() if k not in ("model_type", "architectures")}
    return AttnEditConfig(teacher["model_type"], edit_for(teacher, target), **fields)


def test_parameters_are_those_of_the_models() -> None:
    """8.2 and 30.5 billion with embeddings and head; 3.3 active."""
    qwen = config_of("qwen3-8b", "full")
    embeddings = 2 * qwen.vocab_size * qwen.hidden_size
    assert parameters(qwen, active=True) + embeddings == pytest.approx(8.19e9, rel=0.002)
    moe = config_of("qwen3-30b-a3b", "full")
    embeddings = 2 * moe.vocab_size * moe.hidden_size
    assert parameters(moe, active=False) + embeddings == pytest.approx(30.53e9, rel=0.002)
    assert parameters(moe, active=True) + embeddings == pytest.approx(3.35e9, rel=0.01)


def test_attention_of_a_prompt() -> None:
    full = attention_operations(config_of("qwen3-8b", "full"), 8192)
    assert full == 36 * 2 * 8192 * 4096 * 32 * 256
    edited = attention_operations(config_of("qwen3-8b", "gateswa"), 8192)
    assert edited == 6 * 2 * 8192 * 4096 * 32 * 256 + 30 * 2 * 8192 * 128 * 32 * 256


def test_bound_of_a_burst() -> None:
    """192 prompts of 8192 tokens: 22 s of multiply-adds without attention on an H200."""
    qwen, device = config_of("qwen3-8b", "full"), DEVICES["H200"]
    figures = bound(qwen, device, requests=192, prompt=8192, output=512, running=90)
    assert figures["prefill_s"] == pytest.approx(22.1 + 4.2, abs=1.0)
    weights = 2 * (parameters(qwen, active=True) + qwen.vocab_size * qwen.hidden_size)
    step = (weights + 90 * (8192 + 256) * 147_456) / 4.8e12
    assert figures["step_s"] == pytest.approx(step)
    assert figures["decode_s"] == pytest.approx(step * 192 * 512 / 90)
    assert figures["total_s"] == figures["prefill_s"] + figures["decode_s"]
    edited = bound(config_of("qwen3-8b", "gateswa"), device, requests=192, prompt=8192, output=512,
                   running=192)  # fmt: skip
    assert edited["total_s"] < figures["total_s"]


def test_devices_are_told_by_name() -> None:
    assert device_of("NVIDIA H200, 140 GiB, 16 CPU cores") == DEVICES["H200"]
    assert device_of("x86_64 without a GPU, 2 CPU cores") is None


def test_report_of_a_burst_on_a_known_device(tmp_path: Path) -> None:
    """The table of the report, from a level as the harness writes it."""
    folder = write_model("qwen3-8b", "full", tmp_path / "model")
    figures = {"requests": 192, "prompt_tokens": 8192, "output_tokens": 512, "seconds": 83.3,
               "tpot_s": {"p50": 0.06}}  # fmt: skip
    level = {"system": "teacher", "pass": 1, "workload": "w", "level": 192.0, "figures": figures,
             "server": {"mean_running": 90}}  # fmt: skip
    report: dict[str, Any] = {
        "provenance": {"machine": "NVIDIA H200, 140 GiB, 16 CPU cores"},
        "options": {"workloads": [{"name": "w", "load": "burst"}]},
        "servers": {"teacher": {"model": str(folder)}},
        "levels": [level, {**level, "workload": "w", "system": "gone"}],
    }
    (row,) = report["arithmetic"] = arithmetic_rows(report)
    assert row["total_s"] < row["measured_s"] == 83.3
    text = "\n".join(arithmetic_section(report))
    assert "| w at 192 | teacher |" in text
    report["provenance"]["machine"] = "a laptop"
    assert arithmetic_rows(report) == []
