"""What stands beside the figures in the report: memory, arithmetic, profile, the client's cost."""

from __future__ import annotations

from typing import Any

from benchmarks.serving.report.cells import in_bytes, number, system_name, table


def memory_table(report: dict[str, Any]) -> str:
    """KV memory of each level: by formula, as reported, as used."""
    rows = [
        [
            f"{row['workload']} at {row['level']:g}",
            system_name(row),
            f"{row['length']:,}",
            in_bytes(row["formula_bytes_per_request"]),
            in_bytes(row["used_bytes_per_request"]),
            "–"
            if row["reported_concurrency"] is None
            else f"{row['reported_concurrency']:g} of {row['reported_length']:,} tokens",
            f"{in_bytes(row['reported_bytes_per_request'])} / "
            f"{in_bytes(row['formula_bytes_of_reported'])}",
            number(row["peak_running"], 0),
            "–" if row["peak_kv_usage"] is None else f"{row['peak_kv_usage']:.1%}",
            number(row["preemptions"], 0),
            "–" if row["prefix_hit_rate"] is None else f"{row['prefix_hit_rate']:.1%}",
        ]
        for row in report["memory"]
    ]
    header = (
        "level", "system", "tokens a request", "formula, a request and GPU",
        "used by a running one", "reported concurrency",
        "reported / formula, such a request and GPU", "running at once", "KV in use",
        "preemptions", "prefix hits",
    )  # fmt: skip
    return table(header, rows)


def sharding_section(report: dict[str, Any]) -> list[str]:
    """What several devices hold of a cached token; nothing for a single one."""
    rows = [
        [
            row["system"],
            row["spread"],
            f"{row['bytes_per_token_on_one']:,}",
            f"{row['bytes_per_token']:,}",
            f"{row['share']:.0%}",
            in_bytes(row["bytes_per_request"]),
            in_bytes(row["bytes_per_request_total"]),
            "–" if row["ratio"] is None else f"{row['ratio']:.2f}",
        ]
        for row in report["sharding"]
    ]
    if not rows:
        return []
    length = report["options"]["server"]["max_model_len"]
    header = (
        "system", "spread", "bytes a token on one GPU", "here, on each", "share",
        f"a request of {length:,} tokens, on each", "on all together", "ratio",
    )  # fmt: skip
    text = (
        "By formula (`attnedit kv --tp`), bytes a token in the long-context limit. Tensor "
        "parallelism splits KV heads; latents have none, and every GPU of a copy holds all of "
        f"them. Of a copied model a request lies on one copy. Ratios are to `{report['control']}`."
    )
    return ["### On several GPUs", text, table(header, rows)]


def arithmetic_section(report: dict[str, Any]) -> list[str]:
    """Bursts beside what they must take at least; nothing where that is not known."""
    rows = [
        [
            f"{row['workload']} at {row['level']:g}",
            system_name(row),
            number(row["prefill_s"], 1),
            number(row["decode_s"], 1),
            number(row["total_s"], 1),
            number(row["measured_s"], 1),
            f"{row['total_s'] / row['measured_s']:.0%}",
            number(row["running"], 1),
            number(row["step_s"], 1, 1000),
            number(row["measured_step_s"], 1, 1000),
        ]
        for row in report["arithmetic"]
    ]
    if not rows:
        return []
    header = (
        "burst", "system", "prefill, s", "decode, s", "together, s", "measured, s", "share",
        "running, mean", "a decode step, ms", "median TPOT, ms",
    )  # fmt: skip
    text = (
        "What the device's peaks allow: multiply-adds of the prompts, then bytes of weights "
        "and KV cache read by decode steps, with as many requests running as were measured. The "
        "rest is kernels below the peaks, chunks between decode steps, scheduling and sampling."
    )
    return ["## Arithmetic", text, table(header, rows)]


def profile_section(profiles: list[dict[str, Any]]) -> list[str]:
    """Where time goes, of the systems that were profiled."""
    if not profiles:
        return []
    kinds = list(dict.fromkeys(kind for one in profiles for kind in one["shares"]))
    rows = [
        [
            f"{one['workload']} at {one['level']:g}",
            one["system"],
            *(f"{one['shares'].get(kind, 0):.1%}" for kind in kinds),
        ]
        for one in profiles
    ]
    text = "Shares of the device's time in a trace under load, in runs of their own."
    return ["## Profile", text, table(("level", "system", *kinds), rows)]


def client_table(report: dict[str, Any]) -> str:
    """What the load generator took, level by level."""
    rows = [
        [
            f"{level['workload']} at {level['level']:g}",
            level["system"],
            str(client["processes"]),
            f"{client['cpu_cores']:.3f}",
            "–"
            if client["cpu_cores_per_100_streams"] is None
            else f"{client['cpu_cores_per_100_streams']:.3f}",
            f"{1000 * client['lag_p99_s']:.1f}",
        ]
        for level in report["levels"]
        if (client := level.get("client"))
    ]
    header = ("level", "system", "processes", "cores", "cores per 100 streams", "p99 lateness, ms")
    return table(header, rows)
