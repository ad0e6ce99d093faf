"""All results of a benchmark in one JSON document: levels, ratios, drift, memory, rows.

Besides ``provenance`` and ``rows``, which every committed result has, it holds ``levels`` (each
with its figures, ratios to the control at the same workload and level, and samples), ``drift`` of
the control between its two passes, ``memory``, ``sharding`` and what is needed to repeat the run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.serving.report.arithmetic import bound, device_of
from benchmarks.serving.report.memory import level_memory, sharding
from benchmarks.serving.report.rows import METRICS, committed_rows
from benchmarks.serving.run import passes
from benchmarks.serving.spread import spread_of
from benchmarks.serving.stats import ratio
from vllm_attnedit.checkpoint import load_config

if TYPE_CHECKING:
    from benchmarks.serving.run import Benchmark


def collect(benchmark: Benchmark) -> dict[str, Any]:
    """Read everything below the output folder."""
    options = benchmark.options
    control = options.systems[0].name
    levels, missing = [], 0
    for one in passes(options):
        for _, _, path in benchmark.levels(one):
            if path.exists():
                levels.append(json.loads(path.read_text()))
            else:
                missing += 1
    first = {
        (level["workload"], level["level"]): level
        for level in levels
        if level["system"] == control and level["pass"] == 1
    }
    spreads = {one.name: spread_of(one, options.server).label for one in options.systems}
    for level in levels:
        level["spread"] = spreads[level["system"]]
        level["ratios"] = _ratios(level, first.get((level["workload"], level["level"])))
    servers = {
        path.stem: json.loads(path.read_text())
        for path in sorted((benchmark.out / "servers").glob("*.json"))
    }
    origins = _origins(levels, servers, control)
    check = benchmark.out / "crosscheck.json"
    report = {
        "name": options.name,
        "control": control,
        "complete": missing == 0,
        "missing": missing,
        "provenance": origins[0] if origins else benchmark.provenance,
        "also_measured_by": origins[1:],
        "options": options.model_dump(mode="json"),
        "servers": servers,
        "drift": _drift(levels, first, control),
        "crosscheck": json.loads(check.read_text()) if check.exists() else None,
        "memory": [level_memory(level, servers, options) for level in levels if "figures" in level],
        "sharding": sharding(servers, options),
        "levels": levels,
        "profiles": [
            json.loads(path.read_text())
            for path in sorted((benchmark.out / "profiles").glob("*.json"))
        ],
    }
    return {**report, "arithmetic": arithmetic_rows(report), "rows": committed_rows(report)}


def _origins(
    levels: list[dict[str, Any]], servers: dict[str, Any], control: str
) -> list[dict[str, Any]]:
    """Where the figures come from, the control's first: who carries a benchmark on may do so on
    another machine or with other code, and a report written later is not the measurement."""
    noted = [*(one for name, one in servers.items() if name == control), *levels, *servers.values()]
    origins: dict[str, dict[str, Any]] = {}
    for origin in (one["provenance"] for one in noted if "provenance" in one):
        same = json.dumps([origin[key] for key in ("machine", "versions", "commit")])
        origins.setdefault(same, origin)
    return list(origins.values())


def _ratios(level: dict[str, Any], control: dict[str, Any] | None) -> dict[str, Any]:
    if control is None or "figures" not in level or "figures" not in control:
        return {}
    ratios = {
        name: ratio(level["figures"][name], control["figures"][name], key)
        for name, (_, key) in METRICS.items()
    }
    for name, (ours, theirs) in {
        "peak_running": [one["server"].get("peak_running") for one in (level, control)],
        "goodput": [one["figures"]["goodput"]["requests_per_s"] for one in (level, control)],
    }.items():
        value = ours / theirs if ours and theirs else None
        ratios[name] = {"value": value, "low": None, "high": None}
    return ratios


def _drift(
    levels: list[dict[str, Any]], first: dict[tuple[str, float], dict[str, Any]], control: str
) -> dict[str, Any]:
    """The control's second pass over its first: what the machine changed by itself."""
    rows = []
    for level in levels:
        if level["system"] != control or level["pass"] == 1 or not level["ratios"]:
            continue
        rows.append(
            {
                "workload": level["workload"],
                "level": level["level"],
                **{
                    name: level["ratios"][name]["value"] - 1
                    for name in ("output_tokens_per_s", "ttft_s", "tpot_s")
                    if level["ratios"][name]["value"]
                },
            }
        )
    worst = {
        name: max((abs(row[name]) for row in rows if name in row), default=None)
        for name in ("output_tokens_per_s", "ttft_s", "tpot_s")
    }
    return {"rows": rows, "worst": worst}


def arithmetic_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Bursts against what they must take at least, where the device's peaks are known."""
    device = device_of(report["provenance"]["machine"])
    loads = {workload["name"]: workload["load"] for workload in report["options"]["workloads"]}
    rows = []
    for level in report["levels"]:
        server = report["servers"].get(level["system"])
        if device is None or server is None or loads[level["workload"]] != "burst":
            continue
        running = level.get("server", {}).get("mean_running")
        if "figures" not in level or not running or not Path(server["model"]).is_dir():
            continue
        figures = level["figures"]
        least = bound(
            load_config(server["model"]),
            device,
            requests=figures["requests"],
            prompt=figures["prompt_tokens"],
            output=figures["output_tokens"],
            running=min(running, figures["requests"]),
            tensor=server.get("tensor_parallel", 1),
            data=server.get("data_parallel", 1),
        )
        rows.append(
            {
                **{key: level[key] for key in ("system", "pass", "workload", "level")},
                **least,
                "running": running,
                "measured_s": figures["seconds"],
                "measured_step_s": figures["tpot_s"]["p50"],
            }
        )
    return rows
