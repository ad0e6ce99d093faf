"""The whole benchmark with servers that compute nothing: what fails, is refused or interrupted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.serving import levels
from benchmarks.serving.options import Options
from benchmarks.serving.records import read_records
from benchmarks.serving.report import write_report
from benchmarks.serving.server import check_arguments
from examples.quickstart.processes import free_port
from tests.unit.serving.conftest import SYSTEMS, benchmark_of, levels_of
from vllm_attnedit.errors import AttnEditError

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[3]


def test_out_of_memory_at_a_level_ends_that_level_only(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """Two requests warm up, so that the sixth is in the second level."""
    config["server"]["arguments"] = ["--fail-after", "6"]
    config["workloads"][0] |= {"levels": [1, 5, 2]}
    benchmark = benchmark_of(config | {"repeat_control": False}, tmp_path, systems=["ours"])
    benchmark.run()
    first, second, third = levels_of(benchmark)
    assert (first["status"], third["status"]) == ("ok", "ok")
    assert second["status"] == "out of memory"
    assert "figures" not in second
    assert "CUDA out of memory" in second["reason"]
    write_report(benchmark)
    text = (benchmark.out / "report.md").read_text()
    assert "**Partial**: 3 levels are missing" in text
    assert "Levels without figures" in text


def test_a_server_killed_mid_level_gives_no_figure(config: dict[str, Any], tmp_path: Path) -> None:
    config["server"]["arguments"] = ["--fail-after", "5", "--fail-with", "Terminated"]
    config["workloads"][0] |= {"levels": [4]}
    benchmark = benchmark_of(config | {"repeat_control": False}, tmp_path, systems=["ours"])
    benchmark.run()
    (level,) = levels_of(benchmark)
    assert level["status"] == "failed"
    assert "figures" not in level
    assert "Terminated" in level["reason"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-c", "raise ValueError('no such model')"], "ValueError: no such model"),
        (["-m", "benchmarks.serving.fake_server", "--hang"], "INFO starting"),
    ],
)
def test_a_server_that_does_not_come_up(
    config: dict[str, Any], tmp_path: Path, arguments: list[str], reason: str
) -> None:
    """Its last error is kept for every level that was to come, and its port is free again."""
    port = free_port()
    config["server"] |= {"program": [sys.executable, *arguments], "start_s": 2, "port": port}
    benchmark = benchmark_of(config, tmp_path)
    benchmark.run()
    levels = levels_of(benchmark)
    assert [level["status"] for level in levels] == ["failed"] * 3
    assert all(reason in level["reason"] for level in levels)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


def test_a_program_that_is_not_there_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    config["server"]["program"] = [str(tmp_path / "vllm")]
    with pytest.raises(AttnEditError, match=r"server\.program: .*/vllm: name a program"):
        benchmark_of(config, tmp_path).run()


def test_a_burst_that_does_not_finish_gives_no_figure(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["measure"]["limit_s"] = 8
    config["workloads"][0] |= {"output_tokens": 1900}
    benchmark = benchmark_of(config | {"repeat_control": False}, tmp_path, systems=["ours"])
    benchmark.run()
    (level,) = levels_of(benchmark)
    assert (level["status"], level["reason"]) == ("failed", "not finished within 8 s")


def test_a_burst_of_which_requests_are_missing_gives_no_figure(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some_records(paths: list[Path]) -> Any:
        records, costs = read_records(paths)
        return records[1:], costs

    monkeypatch.setattr(levels, "read_records", some_records)
    benchmark = benchmark_of(config | {"repeat_control": False}, tmp_path, systems=["ours"])
    benchmark.run()
    (level,) = levels_of(benchmark)
    assert level["status"] == "failed"
    assert level["reason"] == "the load generator sent 3 of 4 requests"
    assert "figures" not in level


def test_a_burst_with_a_failed_request_gives_no_figure(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others had the server to themselves."""

    def one_failed(paths: list[Path]) -> Any:
        records, costs = read_records(paths)
        records[0].error = "HTTP 500"
        return records, costs

    monkeypatch.setattr(levels, "read_records", one_failed)
    benchmark = benchmark_of(config | {"repeat_control": False}, tmp_path, systems=["ours"])
    benchmark.run()
    (level,) = levels_of(benchmark)
    assert (level["status"], level["reason"]) == ("failed", "1 of 4 requests: HTTP 500")
    assert "figures" not in level


def test_a_port_that_is_taken_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config["server"]["port"] = taken.getsockname()[1]
        with pytest.raises(AttnEditError, match=r"server\.port"):
            benchmark_of(config, tmp_path).run()


def test_a_malformed_trace_is_refused_before_a_server_starts(
    config: dict[str, Any], tmp_path: Path
) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 5, "output_length": 1}\n{}\n')
    config["workloads"] = [{"name": "t", "kind": "trace", "levels": [1], "path": str(trace)}]
    with pytest.raises(AttnEditError, match="line 2"):
        benchmark_of(config, tmp_path).run()
    assert not (tmp_path / "out/logs").exists()


def test_a_model_that_is_not_there_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    config["model"]["teacher"] = str(tmp_path / "nowhere")
    with pytest.raises(AttnEditError, match="checkpoint folder"):
        benchmark_of(config, tmp_path).run()
    with pytest.raises(AttnEditError, match="qwen3-8b"):
        benchmark_of(config | {"model": "gpt"}, tmp_path / "model").run()


def test_ctrl_c_leaves_a_partial_report_and_no_process(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["workloads"][0] |= {"levels": [1, 4], "output_tokens": 40}
    config["systems"][0] = {**SYSTEMS[0], "arguments": ["--ttft", "0.1", "--tpot", "0.5"]}
    config["systems"] = [config["systems"][1], config["systems"][0]]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    marker = f"ATTNEDIT_TEST={tmp_path}"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "serving", str(path), "--out", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "ATTNEDIT_TEST": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out/servers/teacher.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2.5)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Partial" in (tmp_path / "out/report.md").read_text()
    assert not [pid for pid in _processes() if marker.encode() in _environment(pid)]


def _processes() -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit() and name != str(os.getpid())]


def _environment(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def test_a_setting_of_one_side_only_is_refused(config: dict[str, Any]) -> None:
    config["systems"][1] = {**SYSTEMS[1], "arguments": ["--gpu-memory-utilization=0.95"]}
    options = Options.model_validate(config)
    with pytest.raises(AttnEditError, match="holds for all systems"):
        check_arguments(options.systems[1], options.server)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "serving", str(tmp_path / "none.yaml")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("benchmarks: ")
    assert len(done.stderr.splitlines()) == 1
