"""The whole benchmark with servers that compute nothing: its order and its report."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.levels import prompts_read
from benchmarks.serving.options import Options
from benchmarks.serving.report import write_report
from benchmarks.serving.run import Benchmark, _short, passes
from benchmarks.serving.scraping import Sample
from benchmarks.serving.server import command_of, environment_of
from tests.unit.serving.conftest import benchmark_of, levels_of
from vllm_attnedit.errors import AttnEditError

pytestmark = pytest.mark.alone


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
    assert all(drift < 0.25 for drift in report["drift"]["worst"].values())
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


def test_a_prompt_counts_once_its_interval_has_begun() -> None:
    samples = [Sample(float(time), prompted=50.0 * (time >= 3)) for time in range(6)]
    assert prompts_read(samples, 2.0)
    assert not prompts_read(samples, 3.0)  # it was read before
    assert not prompts_read(samples[:3], 0.0)
    assert not prompts_read(samples, 9.0)


def test_a_level_without_a_first_token_is_still_a_line() -> None:
    figures: dict[str, Any] = {"output_tokens_per_s": {"value": 1200.0}, "ttft_s": {"p50": None}}
    assert _short({"status": "ok", "figures": figures}).endswith("median TTFT unknown")
    figures["ttft_s"]["p50"] = 0.25
    assert _short({"status": "ok", "figures": figures}).endswith("median TTFT 0.250 s")


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
    again.provenance |= {"commit": "another one"}
    (again.out / "levels/ours/burst-4.json").unlink()
    again.run()
    write_report(again)
    report = json.loads((again.out / "report.json").read_text())
    assert report["provenance"] == first.provenance
    assert [origin["commit"] for origin in report["also_measured_by"]] == ["another one"]
    assert "**Measured in parts**" in (again.out / "report.md").read_text()
    with pytest.raises(AttnEditError, match="another benchmark"):
        benchmark_of(config | {"window": 64}, tmp_path)
    with pytest.raises(AttnEditError, match="--system"):
        benchmark_of(config, tmp_path, systems=["theirs"])
    assert done["status"] == "ok"


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
