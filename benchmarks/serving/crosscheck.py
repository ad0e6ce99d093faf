"""The same burst by locust and by ``vllm bench serve``: two clients, one server, one answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.serving.levels import run_level
from benchmarks.serving.options import Options, Workload
from benchmarks.serving.server import Running

WITHIN = 0.05
"""How far the two may differ."""


def crosscheck(
    server: Running,
    workload: Workload,
    level: float,
    model: dict[str, Any],
    options: Options,
    folder: Path,
) -> dict[str, Any]:
    """Send ``level`` random prompts at once by either client, vLLM's first.

    Returns:
        Output rate and median TTFT by either, their differences, and whether all are within 5%.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = bench_command(server, workload, level, model)
    result_file = folder / "vllm_bench.json"
    result_file.unlink(missing_ok=True)
    command += ["--save-result", "--result-dir", str(folder), "--result-filename", result_file.name]
    with (folder / "vllm_bench.log").open("wb") as log:
        done = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, timeout=options.measure.limit_s * 2,
            check=False,
        )  # fmt: skip
    if done.returncode or not result_file.is_file():
        return {"command": command, "error": f"vllm bench serve failed: {folder}/vllm_bench.log"}
    theirs = json.loads(result_file.read_text())
    burst = workload.model_copy(update={"load": "burst", "kind": "random", "seed": 77})
    ours = run_level(server, burst, level, model, options.measure, options.goal, folder)
    if "figures" not in ours:
        return {"command": command, "error": ours["reason"]}
    pairs = {
        "output_tokens_per_s": (
            ours["figures"]["output_tokens_per_s"]["value"],
            theirs["output_throughput"],
        ),
        "median_ttft_s": (ours["figures"]["ttft_s"]["p50"], theirs["median_ttft_ms"] / 1000),
        "median_tpot_s": (ours["figures"]["tpot_s"]["p50"], theirs["median_tpot_ms"] / 1000),
    }
    figures = {
        name: {"locust": a, "vllm_bench": b, "difference": a / b - 1 if b else None}
        for name, (a, b) in pairs.items()
    }
    agreed = all(abs(f["difference"]) <= WITHIN for f in figures.values() if f["difference"])
    return {
        "workload": workload.name,
        "level": level,
        "command": command,
        "figures": figures,
        "within_5_percent": agreed,
    }


def bench_command(
    server: Running, workload: Workload, level: float, model: dict[str, Any]
) -> list[str]:
    """vLLM's own client, sending ``level`` requests at once."""
    vllm = str(Path(sys.executable).with_name("vllm"))
    command = [vllm, "bench", "serve", "--backend", "openai", "--base-url", server.base_url]
    command += ["--endpoint", "/v1/completions", "--model", model["name"]]
    command += ["--tokenizer", server.command[server.command.index("serve") + 1]]
    command += ["--dataset-name", "random", "--random-input-len", str(workload.prompt_tokens)]
    command += ["--random-output-len", str(workload.output_tokens)]
    command += ["--num-prompts", f"{level:g}", "--request-rate", "inf", "--seed", "77"]
    return [*command, "--ignore-eos", "--temperature", "0", "--disable-tqdm"]
