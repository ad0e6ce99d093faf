"""Several devices: equal for every system, split or copied, and what each of them holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.models import write_model
from benchmarks.serving import options as options_module
from benchmarks.serving.options import Options, load_options
from benchmarks.serving.report import write_report
from benchmarks.serving.report.arithmetic import DEVICES, bound, weight_bytes
from benchmarks.serving.report.memory import sharding
from benchmarks.serving.reported import kv_report
from benchmarks.serving.run import Benchmark
from benchmarks.serving.server import check_arguments, command_of
from benchmarks.serving.spread import OPTIONS, Spread, count_devices, spread_of
from tests.unit.serving.test_arithmetic import config_of
from vllm_attnedit.accounting import kv_bytes_per_request
from vllm_attnedit.checkpoint import load_config
from vllm_attnedit.errors import AttnEditError

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "benchmarks/serving/configs"


def data_of(devices: Any, *systems: dict[str, Any], **server: Any) -> dict[str, Any]:
    return {
        "name": "several",
        "model": "qwen3-8b",
        "systems": [{"name": "teacher", "edit": "full"}, *systems],
        "server": {"max_model_len": 9216, "devices": devices, **server},
        "workloads": [
            {"name": "burst", "load": "burst", "levels": [6], "prompt_tokens": 50,
             "output_tokens": 21},
        ],
        "measure": {"scrape_s": 0.05, "limit_s": 30, "client_late_s": 1.0},
    }  # fmt: skip


def write(folder: Path, data: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def copies(tensor: int, **more: Any) -> dict[str, Any]:
    return {"name": "mla-copies", "edit": "mla", "tensor_parallel": tensor, **more}


@given(st.integers(1, 64), st.integers(1, 64))
def test_every_system_fills_the_devices_or_is_refused(devices: int, tensor: int) -> None:
    data = data_of(devices, copies(tensor))
    if devices % tensor:
        with pytest.raises(ValueError, match=r"systems\.mla-copies\.tensor_parallel"):
            Options.model_validate(data)
        return
    options = Options.model_validate(data)
    teacher, ours = (spread_of(system, options.server) for system in options.systems)
    assert teacher == Spread(devices, 1)
    assert ours == Spread(tensor, devices // tensor)
    assert ours.devices == devices


@pytest.mark.parametrize(
    ("devices", "tensor", "expected", "label"),
    [
        (1, 1, [], ""),
        (3, None, ["--tensor-parallel-size", "3"], "TP3"),
        (3, 1, ["--data-parallel-size", "3", "--api-server-count", "1"], "DP3"),
        (8, 2, ["--tensor-parallel-size", "2", "--data-parallel-size", "4", "--api-server-count",
                "1"], "TP2xDP4"),
    ],
)  # fmt: skip
def test_command_line(devices: int, tensor: int | None, expected: list[str], label: str) -> None:
    options = Options.model_validate(data_of(devices, {**copies(1), "tensor_parallel": tensor}))
    system = options.systems[1]
    command = command_of(system, options.server, Path("model"), "name", 8000)
    alone = options.server.model_copy(update={"devices": 1})
    single = system.model_copy(update={"tensor_parallel": None})
    assert command == [*command_of(single, alone, Path("model"), "name", 8000), *expected]
    assert spread_of(system, options.server).label == label


@pytest.mark.parametrize("argument", ["--tensor-parallel-size=4", "-dp", "--api-server-count"])
@pytest.mark.parametrize("place", ["server.arguments", "systems.mla-copies.arguments"])
def test_devices_by_the_back_door_are_refused(argument: str, place: str) -> None:
    arguments = {"arguments": [argument, "4"]}
    if place == "server.arguments":
        options = Options.model_validate(data_of(2, copies(1), **arguments))
    else:
        options = Options.model_validate(data_of(2, copies(1, **arguments)))
    with pytest.raises(AttnEditError, match=r"server\.devices") as refused:
        check_arguments(options.systems[1], options.server)
    assert refused.value.field == place


def test_vllm_has_these_options() -> None:
    """A renamed one would slip past the check."""
    from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = make_arg_parser(FlexibleArgumentParser())._option_string_actions
    assert set(OPTIONS) <= set(known)


def test_unequal_devices_are_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, data_of("all", copies(2)))
    command = [sys.executable, "-m", "benchmarks", "serving", str(path), "--devices", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "systems.mla-copies.tensor_parallel" in line


def test_all_devices_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, data_of("all"))
    monkeypatch.setattr(options_module, "count_devices", lambda: 5)
    assert load_options(path).server.devices == 5
    assert load_options(path, 3).server.devices == 3


def test_no_accelerator_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_there(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, stdout="a warning\n0\n")

    monkeypatch.setattr(subprocess, "run", none_there)
    with pytest.raises(AttnEditError, match="--devices"):
        count_devices()


def test_heads_that_cannot_be_split_are_refused_before_a_server_starts(tmp_path: Path) -> None:
    options = load_options(write(tmp_path, data_of(3)))
    with pytest.raises(AttnEditError, match=r"systems\.teacher\.tensor_parallel: 3"):
        Benchmark(options, tmp_path / "out").run()
    assert not (tmp_path / "out/logs").exists()


@pytest.mark.parametrize("name", ["gpu_tp.yaml", "gpu_tp_30b.yaml"])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_configurations_for_several_gpus(name: str, devices: int, tmp_path: Path) -> None:
    """No number of GPUs stands in them, and any that the heads allow will do."""
    options = load_options(CONFIGS / name, devices)
    spreads = {one.name: spread_of(one, options.server).label for one in options.systems}
    split, copied = f"TP{devices}", f"DP{devices}"
    assert spreads == {"teacher": split, "gateswa": split, "mla": split, "mla-copies": copied}
    assert [workload.levels for workload in options.workloads] == [(64, 192)]
    Benchmark(options, tmp_path)


def test_a_stored_benchmark_of_before_is_carried_on(tmp_path: Path) -> None:
    """Options that did not exist then have their defaults."""
    options = Options.model_validate(data_of(1))
    Benchmark(options, tmp_path)
    stored = json.loads((tmp_path / "options.json").read_text())
    del stored["server"]["devices"], stored["systems"][0]["tensor_parallel"]
    (tmp_path / "options.json").write_text(json.dumps(stored))
    Benchmark(options, tmp_path)
    with pytest.raises(AttnEditError, match="another benchmark"):
        Benchmark(Options.model_validate(data_of(2)), tmp_path)


@pytest.mark.alone
def test_split_and_copied_from_end_to_end(tmp_path: Path) -> None:
    """Two servers that compute nothing: KV memory three ways, per device and per copy."""
    model = {name: str(write_model("qwen3-8b", edit, tmp_path / name))
             for name, edit in (("teacher", "full"), ("mla-copies", "mla"))}  # fmt: skip
    program = [sys.executable, "-m", "benchmarks.serving.fake_server"]
    data = data_of(2, copies(1), program=program, arguments=["--blocks", "1152", "--kv-gib", "2"])
    data |= {"model": model, "repeat_control": False}
    benchmark = Benchmark(load_options(write(tmp_path, data)), tmp_path / "out")
    benchmark.run()
    assert json.loads(write_report(benchmark))["complete"]
    report = json.loads((benchmark.out / "report.json").read_text())
    teacher, ours = report["memory"]
    assert (teacher["spread"], ours["spread"]) == ("TP2", "DP2")
    # Six requests: of one engine with 1,152 blocks, or three on each of two such engines.
    assert teacher["peak_kv_usage"] == pytest.approx(6 / 1152)
    assert ours["peak_kv_usage"] == pytest.approx(3 / 1152)
    assert teacher["peak_running"] == ours["peak_running"] == 6
    block = (2 << 30) / 1152
    for row in (teacher, ours):
        assert row["used_bytes_per_request"] == pytest.approx(block, rel=1e-5)
        config = load_config(model[row["system"]])
        tensor = 2 if row is teacher else 1
        assert row["formula_bytes_per_request"] == kv_bytes_per_request(
            config, 71, tp=tensor, block_size=16
        )
        assert row["reported_bytes_per_request"] == 1 << 30  # two requests of 9,216 tokens
    assert (teacher["reported_concurrency"], ours["reported_concurrency"]) == (2, 4)
    cases = {row["case"] for row in report["rows"]}
    assert "serving several teacher TP2 burst C6 50/21 burst" in cases
    assert "serving several mla-copies DP2 KV by formula" in cases
    text = (benchmark.out / "report.md").read_text()
    assert "2 devices for every system" in text
    assert "| mla-copies | DP2 | 41,472 | 41,472 | 100% |" in text
    assert "| teacher | TP2 | 147,456 | 73,728 | 50% |" in text
    assert "--data-parallel-size 2 --api-server-count 1" in text


def test_latents_are_not_split(tmp_path: Path) -> None:
    """Bytes a token and GPU of Qwen3-8B at four: 36 KiB of heads, 40.5 KiB of latents either way.

    Four copies of all latents, or one copy of each: the total of a request is what differs.
    """
    systems = [
        {"name": "gateswa", "edit": "gateswa"},
        {"name": "mla", "edit": "mla"},
        copies(1),
    ]
    options = Options.model_validate(data_of(4, *systems))
    servers = {
        one.name: {"model": str(write_model("qwen3-8b", one.edit, tmp_path / one.name))}
        for one in options.systems
    }
    rows = {row["system"]: row for row in sharding(servers, options)}
    kib = {name: row["bytes_per_token"] / 1024 for name, row in rows.items()}
    assert kib == {"teacher": 36, "gateswa": 6, "mla": 40.5, "mla-copies": 40.5}
    assert [row["share"] for row in rows.values()] == [0.25, 0.25, 1, 1]
    assert rows["mla"]["ratio"] == pytest.approx(40.5 / 36)
    assert rows["mla-copies"]["ratio"] == pytest.approx(40.5 / 144)
    alone = options.server.model_copy(update={"devices": 1})
    assert sharding(servers, options.model_copy(update={"server": alone})) == []


GPU_LOG = """
(Worker_TP0 pid=7) INFO 11-20 10:00:01 [gpu_worker.py:480] Available KV cache memory: 57.5 GiB
(EngineCore pid=6) INFO 11-20 10:00:02 [kv_cache_utils.py:1744] GPU KV cache size: 837,333 tokens
(EngineCore pid=6) INFO 11-20 10:00:02 [kv_cache_utils.py:1745] Maximum concurrency for 9,216 \
tokens per request: 90.85x
"""
CPU_LOG = """
INFO [cpu_worker.py:222] Explicitly set (1.0/23.4) GiB for KV cache on node 0.
INFO [kv_cache_utils.py:1744] GPU KV cache size: 23,296 tokens
INFO [kv_cache_utils.py:1745] Maximum concurrency for 2,048 tokens per request: 11.38x
"""


def test_what_a_server_says_of_its_cache() -> None:
    one = kv_report(GPU_LOG)
    assert (one["reported_concurrency"], one["reported_length"]) == (90.85, 9216)
    assert one["reported_bytes"] == 57.5 * 2**30
    assert one["reported_bytes_per_request"] == pytest.approx(57.5 * 2**30 / 90.85, abs=1)
    two = kv_report(GPU_LOG + GPU_LOG.replace("57.5", "57.4"))
    assert two["reported_concurrency"] == pytest.approx(2 * 90.85)
    assert two["kv_tokens"] == 2 * 837_333
    assert two["reported_bytes"] == int(57.4 * 2**30)
    assert kv_report(CPU_LOG)["reported_bytes_per_request"] == int(2**30 / 11.38)
    assert set(kv_report("nothing").values()) == {None}


@pytest.mark.parametrize("name", ["qwen3-8b", "qwen3-30b-a3b"])
def test_bound_on_several_devices(name: str) -> None:
    """Copies of a dense model read all its weights, those of a mixture share the experts out."""
    config, device = config_of(name, "full"), DEVICES["H100"]
    sizes = {"requests": 64, "prompt": 8192, "output": 512, "running": 64}
    one = bound(config, device, **sizes)
    split = bound(config, device, **sizes, tensor=4)
    copied = bound(config, device, **sizes, data=4)
    assert split["prefill_s"] == copied["prefill_s"] == pytest.approx(one["prefill_s"] / 4)
    assert split["step_s"] == pytest.approx(one["step_s"] / 4)
    assert split["step_s"] < copied["step_s"] < one["step_s"]
    whole = weight_bytes(config, active=False, tensor=1, data=1)
    held = weight_bytes(config, active=False, tensor=1, data=4)
    assert (held == whole) == (name == "qwen3-8b")
