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
from benchmarks.serving.run import passes
from benchmarks.serving.spread import spread_of
from benchmarks.serving.stats import ratio
from vllm_attnedit.checkpoint import load_config

if TYPE_CHECKING:
    from benchmarks.serving.run import Benchmark

METRICS: dict[str, tuple[str, str]] = {
    "output_tokens_per_s": ("tok/s", "value"),
    "ttft_s": ("s", "p50"),
    "tpot_s": ("s", "p50"),
    "itl_s": ("s", "p50"),
    "latency_s": ("s", "p50"),
}
"""What is compared: unit, and the key of the figure (the interval is the median's)."""


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
    check = benchmark.out / "crosscheck.json"
    report = {
        "name": options.name,
        "control": control,
        "complete": missing == 0,
        "missing": missing,
        # That of the measurement, which a report written later must not pass off as its own.
        "provenance": next(iter(servers.values()))["provenance"]
        if servers
        else benchmark.provenance,
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
    return {**report, "arithmetic": arithmetic_rows(report), "rows": _rows(report)}


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
    rates = [abs(row["output_tokens_per_s"]) for row in rows if "output_tokens_per_s" in row]
    return {"rows": rows, "worst": max(rates, default=None)}


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


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The committed form: one row a figure, with its ratio to the control."""
    options, rows = report["options"], []
    workloads = {workload["name"]: workload for workload in options["workloads"]}
    for level in report["levels"]:
        workload = workloads[level["workload"]]
        lengths = f"{_short(workload['prompt_tokens'])}/{_short(workload['output_tokens'])}"
        if workload["path"] is not None:
            lengths = workload["kind"]
        again = " again" if level["pass"] > 1 else ""
        spread = f" {level['spread']}" if level["spread"] else ""
        case = (
            f"serving {_model(options)} {level['system']}{spread}{again} {workload['load']} "
            f"C{level['level']:g} {lengths} {level['workload']}"
        )
        if "figures" not in level:
            rows.append({"case": case, "metric": "status", "value": level["status"], "unit": ""})
            continue
        shared = {
            "control": report["control"],
            "peak_running": level["server"].get("peak_running"),
            "peak_kv_usage": level["server"].get("peak_kv_usage"),
            "preemptions": level["server"].get("preemptions"),
            "status": level["status"],
        }
        for name, (unit, key) in METRICS.items():
            figure, own = level["figures"][name], level["ratios"].get(name, {})
            rows.append(
                {
                    "case": case,
                    "metric": name if key == "value" else f"median_{name}",
                    "value": figure[key],
                    "unit": unit,
                    "low": figure["low"],
                    "high": figure["high"],
                    "ratio": own.get("value"),
                    "ratio_low": own.get("low"),
                    "ratio_high": own.get("high"),
                    **{p: figure[p] for p in ("p90", "p99") if p in figure},
                    **shared,
                }
            )
        good = level["figures"]["goodput"]
        rows.append(
            {"case": case, "metric": "goodput", "value": good["requests_per_s"], "unit": "req/s",
             "share": good["share"], "ratio": level["ratios"].get("goodput", {}).get("value"),
             **shared}
        )  # fmt: skip
    for row in report["sharding"]:
        rows.append(
            {
                "case": f"serving {_model(options)} {row['system']} {row['spread']} KV by formula",
                "metric": "kv_bytes_per_token_and_device",
                "value": row["bytes_per_token"],
                "unit": "B",
                "control": "the same model on one device",
                "ratio": row["share"],
                "bytes_per_request_on_all_devices": row["bytes_per_request_total"],
                "length": row["length"],
            }
        )
    for row in report["memory"]:
        if row["spread"] and row["used_bytes_per_request"] and row["formula_bytes_per_request"]:
            rows.append(
                {
                    "case": f"serving {_model(options)} {row['system']} {row['spread']} "
                    f"C{row['level']:g} {row['workload']}",
                    "metric": "kv_bytes_per_running_request_and_device",
                    "value": row["used_bytes_per_request"],
                    "unit": "B",
                    "control": "the formula at the full length",
                    "ratio": row["used_bytes_per_request"] / row["formula_bytes_per_request"],
                }
            )
    return rows


def _model(options: dict[str, Any]) -> str:
    return options["model"] if isinstance(options["model"], str) else options["name"]


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
