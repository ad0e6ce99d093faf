"""The whole benchmark with servers that compute nothing: its order, its faults, its report."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.serving import levels
from benchmarks.serving.options import Options, load_options
from benchmarks.serving.records import read_records
from benchmarks.serving.report import collect, write_report
from benchmarks.serving.run import Benchmark, passes
from benchmarks.serving.server import check_arguments, command_of, environment_of
from examples.quickstart.processes import free_port
from vllm_attnedit.errors import AttnEditError

ROOT = Path(__file__).parents[3]
SYSTEMS = [
    {"name": "teacher", "edit": "full", "arguments": ["--ttft", "0.1", "--tpot", "0.02"]},
    {"name": "ours", "edit": "gateswa", "arguments": ["--ttft", "0.05", "--tpot", "0.01"]},
]


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


def test_a_comparison_from_end_to_end(config: dict[str, Any], tmp_path: Path) -> None:
    """Control first and last; ratios are those of the delays; every part of the report is there."""
    config["workloads"].append(
        {"name": "chat", "levels": [2], "prompt_tokens": 50, "output_tokens": 21}
    )
    benchmark = benchmark_of(config, tmp_path)
    benchmark.run()
    line = json.loads(write_report(benchmark))
    assert line["complete"]
    assert line["levels"] == {"ok": 6}
    report = json.loads((benchmark.out / "report.json").read_text())
    assert [(one["system"], one["pass"]) for one in report["levels"][::2]] == [
        ("teacher", 1), ("ours", 1), ("teacher", 2),
    ]  # fmt: skip
    ours = {level["workload"]: level for level in report["levels"] if level["system"] == "ours"}
    for workload in ("burst", "chat"):
        ratios = ours[workload]["ratios"]
        assert ratios["ttft_s"]["value"] == pytest.approx(0.5, abs=0.1)
        assert ratios["tpot_s"]["value"] == pytest.approx(0.5, abs=0.05)
        assert ratios["output_tokens_per_s"]["value"] == pytest.approx(2.0, rel=0.25)
    assert ours["burst"]["server"]["peak_running"] == 4
    chat = ours["chat"]["ratios"]["output_tokens_per_s"]
    assert chat["low"] < chat["value"] < chat["high"]
    assert report["drift"]["worst"] < 0.25
    assert {"machine", "versions", "commit", "command", "date"} <= set(report["provenance"])
    row = next(r for r in report["rows"] if r["metric"] == "output_tokens_per_s")
    assert row["case"] == "serving fake teacher burst C4 50/21 burst"
    assert {"value", "unit", "control", "ratio"} <= set(row)
    text = (benchmark.out / "report.md").read_text()
    for part in ("output tok/s", "Control, before and after", "KV memory", "Commands", "p99"):
        assert part in text
    for figure in ("throughput", "ttft", "kv", "running", "pareto"):
        assert (benchmark.out / f"chat-{figure}.png").stat().st_size > 5000
    assert "<script" in (benchmark.out / "report.html").read_text()


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


def test_a_burst_that_does_not_finish_gives_no_figure(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config["measure"]["limit_s"] = 8
    config["workloads"][0] |= {"output_tokens": 1900}
    benchmark = benchmark_of(config | {"repeat_control": False}, tmp_path, systems=["ours"])
    benchmark.run()
    (level,) = levels_of(benchmark)
    assert (level["status"], level["reason"]) == ("failed", "not finished within 8 s")


def test_a_level_lasts_until_its_users_were_answered(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """Steady after some two seconds and measured for one more, but an answer takes six."""
    config["measure"]["goal_s"] = 1
    config["workloads"] = [
        {"name": "long", "levels": [3], "prompt_tokens": 50, "output_tokens": 600}
    ]
    benchmark = benchmark_of(config | {"repeat_control": False}, tmp_path, systems=["ours"])
    benchmark.run()
    (level,) = levels_of(benchmark)
    assert level["status"] == "ok", level["reason"]
    assert level["figures"]["requests"] >= 3
    assert level["figures"]["tpot_s"]["p50"] == pytest.approx(0.01, rel=0.3)


def test_two_client_processes(config: dict[str, Any], tmp_path: Path) -> None:
    """Users are shared out, one user needs one process, and all records come back."""
    config["measure"]["client_processes"] = 2
    short = {"prompt_tokens": 50, "output_tokens": 21}
    config["workloads"] = [
        {"name": "burst", "load": "burst", "levels": [1], **short},
        {"name": "chat", "levels": [4], **short},
    ]
    benchmark = benchmark_of(config | {"repeat_control": False}, tmp_path, systems=["ours"])
    benchmark.run()
    one, chat = levels_of(benchmark)
    assert [level["status"] for level in (one, chat)] == ["ok"] * 2
    assert [level["client"]["processes"] for level in (one, chat)] == [1, 2]
    assert one["figures"]["requests"] == 1
    rate = chat["figures"]["output_tokens_per_s"]["value"]
    assert rate == pytest.approx(4 * 21 / 0.25, rel=0.4)


def test_two_benchmarks_at_once_do_not_mix(config: dict[str, Any], tmp_path: Path) -> None:
    """Each has several client processes, which find their own master and no other's."""
    config["measure"]["client_processes"] = 2
    config["workloads"][0]["levels"] = [6]
    benchmarks = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        options = config | {"repeat_control": False}
        benchmarks.append(benchmark_of(options, tmp_path / name, systems=["ours"]))
    with ThreadPoolExecutor() as pool:
        list(pool.map(Benchmark.run, benchmarks))
    for benchmark in benchmarks:
        (level,) = levels_of(benchmark)
        assert level["status"] == "ok", level["reason"]
        assert level["figures"]["requests"] == 6
        assert level["client"]["processes"] == 2


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


def test_a_run_is_carried_on(config: dict[str, Any], tmp_path: Path) -> None:
    benchmark_of(config, tmp_path, budget_s=-1).run()
    first = benchmark_of(config, tmp_path, systems=["ours"])
    assert levels_of(first) == []
    first.run()
    (done,) = levels_of(first)
    path = first.out / "levels/ours/burst-4.json"
    before = path.stat().st_mtime
    again = benchmark_of(config, tmp_path)
    again.run()
    assert path.stat().st_mtime == before
    assert [level["system"] for level in levels_of(again)] == ["teacher", "ours", "teacher"]
    with pytest.raises(AttnEditError, match="another benchmark"):
        benchmark_of(config | {"window": 64}, tmp_path)
    with pytest.raises(AttnEditError, match="--system"):
        benchmark_of(config, tmp_path, systems=["theirs"])
    assert done["status"] == "ok"


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


def test_both_sides_are_served_alike(config: dict[str, Any], tmp_path: Path) -> None:
    """Command lines differ in the model and its window backend, and in nothing else."""
    del config["server"]["program"]
    config["systems"] = [
        {"name": "teacher", "edit": "full"},
        {"name": "ours", "edit": "gateswa", "window_backend": "stock"},
    ]
    options = Options.model_validate(config)
    teacher, ours = (
        command_of(system, options.server, Path("model"), "name", 8000)
        for system in options.systems
    )
    assert ours[: len(teacher)] == teacher
    assert ours[len(teacher) :] == [
        "--additional-config",
        '{"attnedit_window_backend": "stock"}',
    ]
    assert environment_of(options.server)["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert "--no-enable-prefix-caching" in teacher
    assert [one.name for one in passes(options)] == ["teacher", "ours", "teacher.again"]


def test_the_control_repeats_what_it_is_told_to(config: dict[str, Any], tmp_path: Path) -> None:
    config["workloads"].append({"name": "chat", "levels": [2, 4]})
    config["repeat_control"] = ["burst"]
    benchmark = benchmark_of(config, tmp_path)
    names = [[path.stem for *_, path in benchmark.levels(one)] for one in passes(benchmark.options)]
    assert names == [["burst-4", "chat-2", "chat-4"]] * 2 + [["burst-4"]]
    config["workloads"][1]["systems"] = ["ours"]
    for bad in (["chat"], ["nothing"], []):
        with pytest.raises(AttnEditError, match="repeat_control"):
            benchmark_of(config | {"repeat_control": bad}, tmp_path)


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
