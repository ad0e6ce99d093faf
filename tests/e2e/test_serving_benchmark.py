"""The serving benchmark with real servers, as small as it gets: dimensions of SmolLM2, made-up
weights and words, as on a GPU with those of a large model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.models import write_tokenizer
from benchmarks.serving.options import load_options
from benchmarks.serving.report import write_report
from benchmarks.serving.run import Benchmark
from tests.unit.tiny import tiny_edit
from tests.unit.tiny_edited import tiny_edited
from vllm_attnedit.accounting import kv_bytes_per_request
from vllm_attnedit.checkpoint import load_config

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CONFIG: dict[str, Any] = {
    "name": "small",
    "model": "smollm2-135m",
    "systems": [{"name": "gateswa", "edit": "gateswa"}],
    "server": {
        "max_model_len": 512,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "environment": {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"},
    },
    "workloads": [
        {"name": "burst", "load": "burst", "levels": [4], "prompt_tokens": 300,
         "output_tokens": 60},
        {"name": "talk", "api": "chat", "levels": [2], "prompt_tokens": 40, "output_tokens": 16},
    ],
    "measure": {"window_s": 1, "windows": 2, "within": 0.5, "goal_s": 2, "limit_s": 180,
                "scrape_s": 0.1, "client_late_s": 1.0},
}  # fmt: skip


def test_benchmark_of_a_real_server(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(CONFIG))
    benchmark = Benchmark(load_options(tmp_path / "small.yaml"), tmp_path / "out")
    benchmark.run()
    line = json.loads(write_report(benchmark))
    report = json.loads((benchmark.out / "report.json").read_text())
    reasons = [level["reason"] for level in report["levels"]]
    assert set(line["levels"]) <= {"ok", "not steady"}, reasons
    burst, talk = report["levels"]
    assert (burst["figures"]["requests"], burst["figures"]["failed"]) == (4, 0)
    assert (burst["figures"]["prompt_tokens"], burst["figures"]["output_tokens"]) == (300, 60)
    assert burst["server"]["peak_running"] == 4
    assert 0 < burst["server"]["peak_kv_usage"] < 1
    assert talk["figures"]["output_tokens"] == 16
    assert talk["figures"]["prompt_tokens"] == 40
    memory = report["memory"][0]
    folder = report["servers"]["gateswa"]["model"]
    assert memory["formula_bytes_per_request"] == kv_bytes_per_request(
        load_config(folder), 360, block_size=16
    )
    assert memory["reported_concurrency"] > 10


@pytest.mark.timeout(900)
def test_split_and_copied_on_processes(tmp_path: Path) -> None:
    """A model split over two processes and one with a copy on each; KV memory is the formula's."""
    sizes = {"vocab_size": 4096, "head_dim": 32}
    model = {}
    for name, edit in (("gateswa", tiny_edit()), ("mla-copies", tiny_edit("mla"))):
        folder = tmp_path / name
        tiny_edited("qwen3", edit, **sizes).save_pretrained(folder)
        write_tokenizer(folder, 4096)
        model[name] = str(folder)
    server: dict[str, Any] = dict(CONFIG["server"])
    server |= {"devices": 2, "dtype": "float32", "arguments": ["--block-size", "16"]}
    server["environment"] = server["environment"] | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    config = {
        **CONFIG,
        "model": model,
        "systems": [
            {"name": "gateswa", "edit": "gateswa"},
            {"name": "mla-copies", "edit": "mla", "tensor_parallel": 1},
        ],
        "server": server,
        "workloads": [{"name": "talk", "levels": [4], "prompt_tokens": 160, "output_tokens": 350}],
        "measure": {**CONFIG["measure"], "goal_s": 6, "limit_s": 240, "client_late_s": 30.0},
        "repeat_control": False,
    }
    (tmp_path / "several.yaml").write_text(yaml.safe_dump(config))
    benchmark = Benchmark(load_options(tmp_path / "several.yaml"), tmp_path / "out")
    benchmark.run()
    write_report(benchmark)
    report = json.loads((benchmark.out / "report.json").read_text())
    statuses = {level["status"] for level in report["levels"]}
    assert statuses <= {"ok", "not steady"}, report["levels"]
    split, copied = report["memory"]
    assert (split["spread"], copied["spread"]) == ("TP2", "DP2")
    assert split["peak_running"] == copied["peak_running"] == 4
    for row in (split, copied):
        # The fullest reading is of requests on their way to their full length.
        assert 0.25 < row["used_bytes_per_request"] / row["formula_bytes_per_request"] <= 1.001
    reported = copied["reported_bytes_per_request"] / copied["formula_bytes_of_reported"]
    assert reported == pytest.approx(1, abs=1e-3)
    elements = 512 * 4 * (64 + 16)  # all latents of four layers, on each device
    assert copied["formula_bytes_of_reported"] == 4 * elements


def test_two_clients_agree(tmp_path: Path) -> None:
    """locust and ``vllm bench serve``, on a server whose delays neither can change."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 32_000}))
    write_tokenizer(model, 32_000)
    config = {
        "name": "two",
        "model": {"fake": str(model)},
        "systems": [
            {"name": "fake", "edit": "full", "arguments": ["--ttft", "0.5", "--slots", "4"]}
        ],
        "server": {
            "max_model_len": 2048,
            "program": [sys.executable, "-m", "benchmarks.serving.fake_server"],
        },
        "workloads": [{"name": "burst", "load": "burst", "levels": [8], "output_tokens": 64}],
        "measure": {"crosscheck": "burst:8", "client_late_s": 0.5},
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    benchmark = Benchmark(load_options(tmp_path / "two.yaml"), tmp_path / "out")
    benchmark.run()
    check = json.loads((benchmark.out / "crosscheck.json").read_text())
    assert check.get("error") is None
    assert check["within_5_percent"], check["figures"]
    assert check["figures"]["median_tpot_s"]["vllm_bench"] == pytest.approx(0.02, abs=0.001)
