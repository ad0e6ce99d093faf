"""The committed form of a serving benchmark's results: rows."""

from __future__ import annotations

from typing import Any

METRICS: dict[str, tuple[str, str]] = {
    "output_tokens_per_s": ("tok/s", "value"),
    "ttft_s": ("s", "p50"),
    "tpot_s": ("s", "p50"),
    "itl_s": ("s", "p50"),
    "latency_s": ("s", "p50"),
}
"""What is compared: unit, and the key of the figure (the interval is the median's)."""


def committed_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a figure, with its ratio to the control.

    Args:
        report: the document of :func:`benchmarks.serving.report.collect.collect`, without them.
    """
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
            "failed": level["figures"]["failed"],
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
