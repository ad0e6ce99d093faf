"""The same burst by locust and by ``vllm bench serve``: two clients, one server, one answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.serving.levels import run_level
from benchmarks.serving.options import Options
from benchmarks.serving.server import Running
from benchmarks.serving.workload import Workload
from examples.quickstart.processes import CommandFailed, run, vllm_command

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
    """Send ``level`` random prompts at once: by locust, by vLLM's client, by locust.

    Returns:
        Output rate and median latencies by either, their differences, and whether all are within
        5%; locust's are the means of its two runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = bench_command(server, workload, level, model)
    burst = workload.model_copy(update={"load": "burst", "kind": "random", "api": "completions"})

    def by_locust(seed: int) -> dict[str, Any]:
        again = burst.model_copy(update={"seed": seed})
        return run_level(server, again, level, model, options.measure, options.goal, folder)

    results = [by_locust(78)]
    theirs = _run_bench(command, folder)
    results.append(by_locust(79))
    for result in results:
        if "figures" not in result:
            return {"command": command, "error": f"locust: {result['reason']}"}
    if theirs is None:
        return {"command": command, "error": f"vllm bench serve failed: see {folder}"}
    ours = [result["figures"] for result in results]
    pairs = {
        "output_tokens_per_s": ([f["output_tokens_per_s"]["value"] for f in ours],
                                theirs["output_throughput"]),
        "median_ttft_s": ([f["ttft_s"]["p50"] for f in ours], theirs["median_ttft_ms"] / 1000),
        "median_tpot_s": ([f["tpot_s"]["p50"] for f in ours], theirs["median_tpot_ms"] / 1000),
    }  # fmt: skip
    figures = {
        name: {
            "locust": sum(own) / 2,
            "locust_runs": own,
            "vllm_bench": their,
            "difference": sum(own) / 2 / their - 1 if their else None,
        }
        for name, (own, their) in pairs.items()
    }
    agreed = all(abs(f["difference"]) <= WITHIN for f in figures.values() if f["difference"])
    return {
        "workload": workload.name,
        "level": level,
        "command": command,
        "figures": figures,
        "within_5_percent": agreed,
    }


def _run_bench(command: list[str], folder: Path) -> dict[str, Any] | None:
    """What vLLM's client measured, or ``None`` if it failed."""
    result_file = folder / "vllm_bench.json"
    result_file.unlink(missing_ok=True)
    command = [*command, "--save-result", "--result-dir", str(folder)]
    command += ["--result-filename", result_file.name]
    try:
        run(command, log=folder / "vllm_bench.log", env={"NO_PROXY": "127.0.0.1"})
    except CommandFailed:
        return None
    result: dict[str, Any] = json.loads(result_file.read_text())
    return result


def bench_command(
    server: Running, workload: Workload, level: float, model: dict[str, Any]
) -> list[str]:
    """vLLM's own client, sending ``level`` requests at once."""
    command = [*vllm_command(), "bench", "serve"]
    command += ["--backend", "openai", "--base-url", server.base_url]
    command += ["--endpoint", "/v1/completions", "--model", model["name"]]
    command += ["--tokenizer", server.command[server.command.index("serve") + 1]]
    command += ["--dataset-name", "random", "--random-input-len", str(workload.prompt_tokens)]
    command += ["--random-output-len", str(workload.output_tokens)]
    command += ["--num-prompts", f"{level:g}", "--request-rate", "inf", "--seed", "77"]
    return [*command, "--ignore-eos", "--temperature", "0", "--disable-tqdm"]
