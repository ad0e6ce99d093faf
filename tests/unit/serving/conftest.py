"""Fake servers with known delays, and the load generator run against them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from benchmarks.serving.records import ClientCost, Record, read_records
from examples.quickstart.processes import free_port

os.environ["NO_PROXY"] = "127.0.0.1"
LOCUSTFILE = Path(__file__).parents[3] / "benchmarks/serving/locustfile.py"


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
