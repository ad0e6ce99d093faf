"""Fake servers with known delays, and the load generator and whole benchmarks run against them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.serving.options import load_options
from benchmarks.serving.records import ClientCost, Record, read_records
from benchmarks.serving.report import collect
from benchmarks.serving.run import Benchmark
from examples.quickstart.processes import free_port

os.environ["NO_PROXY"] = "127.0.0.1"
LOCUSTFILE = Path(__file__).parents[3] / "benchmarks/serving/locustfile.py"
SYSTEMS = [
    {"name": "teacher", "edit": "full", "arguments": ["--ttft", "0.1", "--tpot", "0.02"]},
    {"name": "ours", "edit": "gateswa", "arguments": ["--ttft", "0.05", "--tpot", "0.01"]},
]


@dataclass
class FakeServer:
    url: str
    process: subprocess.Popen[bytes]


StartFake = Callable[..., FakeServer]


@pytest.fixture
def fake() -> Iterator[StartFake]:
    """``fake("--ttft", "0.1", ...)`` starts one and waits for it."""
    servers: list[FakeServer] = []

    def start(*arguments: str) -> FakeServer:
        port = free_port()
        command = [sys.executable, "-m", "benchmarks.serving.fake_server", "--port", str(port)]
        server = FakeServer(f"http://127.0.0.1:{port}", subprocess.Popen([*command, *arguments]))
        servers.append(server)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                httpx.get(server.url + "/health")
                return server
            except httpx.TransportError:
                time.sleep(0.05)
        raise TimeoutError(server.url)

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait()


@dataclass
class Load:
    """What one run of the load generator left."""

    code: int
    output: str
    records: list[Record]
    costs: list[ClientCost]

    @property
    def whole(self) -> list[Record]:
        return [record for record in self.records if record.whole]


RunLoad = Callable[..., Load]


@pytest.fixture
def load(tmp_path: Path) -> RunLoad:
    """``load(url, "-u", "4", ...)``: locust without its web UI, to its end."""

    def run(url: str, *arguments: str) -> Load:
        folder = tmp_path / f"records{len(list(tmp_path.iterdir()))}"
        command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url]
        command += ["--headless", "--only-summary", "-r", "1000", "--records", str(folder)]
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        records, costs = read_records(sorted(folder.glob("*.jsonl")))
        return Load(done.returncode, done.stdout + done.stderr, records, costs)

    return run


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A benchmark of two fake servers, one twice as fast as the other."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 32_000}))
    return {
        "name": "fake",
        "model": {"teacher": str(model), "ours": str(model)},
        "systems": SYSTEMS,
        "server": {
            "max_model_len": 2048,
            "program": [sys.executable, "-m", "benchmarks.serving.fake_server"],
            "start_s": 30,
        },
        "workloads": [
            {"name": "burst", "load": "burst", "levels": [4], "prompt_tokens": 50,
             "output_tokens": 21},
        ],
        "measure": {"window_s": 0.5, "goal_s": 1.5, "limit_s": 15, "within": 0.5, "scrape_s": 0.1},
    }  # fmt: skip


def benchmark_of(config: dict[str, Any], folder: Path, **only: Any) -> Benchmark:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return Benchmark(load_options(path), folder / "out", **only)


def levels_of(benchmark: Benchmark) -> list[dict[str, Any]]:
    levels: list[dict[str, Any]] = collect(benchmark)["levels"]
    return levels
