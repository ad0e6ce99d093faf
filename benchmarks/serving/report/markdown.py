"""The report as Markdown."""

from __future__ import annotations

import shlex
from typing import Any

from benchmarks.serving.report.cells import number, ratio, system_name, table
from benchmarks.serving.report.sections import (
    arithmetic_section,
    client_table,
    memory_table,
    profile_section,
    sharding_section,
)


def to_markdown(report: dict[str, Any], figures: dict[str, str]) -> str:
    """The whole document; ``figures`` are titles and file names beside it."""
    parts = [
        f"# Serving benchmark: {report['name']}",
        _origin(report),
        "" if report["complete"] else f"**Partial**: {report['missing']} levels are missing.",
        "## Throughput and latency",
        f"Ratios are to `{report['control']}` at the same load, in the same run; in brackets the "
        "95% interval, or the range of repeated bursts. More is better for rates, less for times.",
        *_results(report),
        *_failures(report),
        "## Control, before and after",
        _drift(report),
        "## Two clients",
        _crosscheck(report["crosscheck"]),
        "## KV memory",
        "By formula, as the server reported when it started, and as it was used while it ran. A "
        "reported request has the server's full length, and with windows room for a prompt that is "
        "being read; a running one had rarely reached its own.",
        memory_table(report),
        *sharding_section(report),
        *arithmetic_section(report),
        *profile_section(report["profiles"]),
        "## The load generator's own cost",
        client_table(report),
        "## Figures",
        *(f"![{title}]({name})" for title, name in figures.items()),
        "## Commands",
        *_commands(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _origin(report: dict[str, Any]) -> str:
    origin = report["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    devices = report["options"]["server"]["devices"]
    each = f"; {devices} devices for every system" if devices > 1 else ""
    others = "".join(
        f"\n\n**Measured in parts**: some levels on {other['machine']}, commit {other['commit']}."
        for other in report["also_measured_by"]
    )
    return (
        f"{origin['machine']}{each}; {versions}; commit {origin['commit']}; {origin['date']}; "
        f"`{origin['command']}`{others}"
    )


def _results(report: dict[str, Any]) -> list[str]:
    tables = []
    for workload in report["options"]["workloads"]:
        rows = [
            _result_row(level)
            for level in sorted(report["levels"], key=lambda level: level["level"])
            if level["workload"] == workload["name"] and "figures" in level
        ]
        if rows:
            tables.append(f"### {workload['name']}: {_describe(workload)}")
            tables.append(table(_HEADER, rows))
    return tables


_HEADER = (
    "load", "system", "output tok/s", "ratio", "median TTFT, s", "ratio", "p99", "median TPOT, ms",
    "ratio", "p99 ITL, ms", "goodput, req/s (share)", "running at once", "KV in use", "status",
)  # fmt: skip


def _result_row(level: dict[str, Any]) -> list[str]:
    figures, ratios, server = level["figures"], level["ratios"], level["server"]
    good = figures["goodput"]
    return [
        f"{level['level']:g}",
        system_name(level),
        number(figures["output_tokens_per_s"]["value"], 1),
        ratio(ratios.get("output_tokens_per_s")),
        number(figures["ttft_s"]["p50"], 3),
        ratio(ratios.get("ttft_s")),
        number(figures["ttft_s"]["p99"], 3),
        number(figures["tpot_s"]["p50"], 2, 1000),
        ratio(ratios.get("tpot_s")),
        number(figures["itl_s"]["p99"], 2, 1000),
        f"{good['requests_per_s']:.2f} ({good['share']:.0%})",
        number(server.get("peak_running"), 0),
        "–" if server.get("peak_kv_usage") is None else f"{server['peak_kv_usage']:.1%}",
        level["status"] + (f", {figures['failed']} failed" if figures["failed"] else ""),
    ]


def _failures(report: dict[str, Any]) -> list[str]:
    rows = [
        [
            f"{level['workload']} at {level['level']:g}",
            level["system"],
            level["status"],
            " ".join(level["reason"].split())[:300],
        ]
        for level in report["levels"]
        if "figures" not in level
    ]
    if not rows:
        return []
    return ["### Levels without figures", table(("level", "system", "status", "reason"), rows)]


def _drift(report: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['workload']} at {row['level']:g}",
            *(
                f"{row[name]:+.1%}" if name in row else "–"
                for name in ("output_tokens_per_s", "ttft_s", "tpot_s")
            ),
        ]
        for row in report["drift"]["rows"]
    ]
    if not rows:
        return "The control ran once only: how much the machine drifted is not known."
    header = ("level", "output tok/s", "median TTFT", "median TPOT")
    return f"`{report['control']}` at the end against its start:\n\n" + table(header, rows)


def _crosscheck(check: dict[str, Any] | None) -> str:
    if check is None:
        return "No level was repeated with `vllm bench serve`."
    if "error" in check:
        return check["error"]
    rows = [
        [name, f"{f['locust']:.4g}", f"{f['vllm_bench']:.4g}", f"{f['difference']:+.1%}"]
        for name, f in check["figures"].items()
    ]
    verdict = "within" if check["within_5_percent"] else "**not within**"
    text = (
        f"A burst of {check['level']:g} requests of `{check['workload']}` to `{check['system']}`, "
        f"sent by either client: {verdict} 5% of each other."
    )
    return text + "\n\n" + table(("figure", "locust", "vllm bench serve", "difference"), rows)


def _commands(report: dict[str, Any]) -> list[str]:
    lines = []
    for name, server in report["servers"].items():
        variables = " ".join(f"{k}={shlex.quote(v)}" for k, v in server["environment"].items())
        lines.append(f"`{name}`:\n\n```bash\n{variables} {shlex.join(server['command'])}\n```")
    return lines


def _describe(workload: dict[str, Any]) -> str:
    lengths = f"{workload['prompt_tokens']:,} tokens in, {workload['output_tokens']:,} out"
    if workload["kind"] == "trace":
        lengths = f"lengths of {workload['path']}"
    elif workload["kind"] == "sessions":
        lengths = f"recorded in {workload['path']}, {workload['output_tokens']:,} tokens out"
    loads = {
        "burst": "all requests at once",
        "closed": "so many users asking",
        "poisson": "so many arrivals a second",
        "trace": "the trace's arrivals, so many times faster",
    }
    return f"{workload['kind']}, {lengths}, {loads[workload['load']]}"
