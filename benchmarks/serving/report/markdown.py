"""The report as Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from vllm_attnedit.cli.quantities import format_bytes


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
        _memory(report),
        *sharding_section(report),
        *arithmetic_section(report),
        *profile_section(report["profiles"]),
        "## The load generator's own cost",
        _client(report),
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
    return (
        f"{origin['machine']}{each}; {versions}; commit {origin['commit']}; {origin['date']}; "
        f"`{origin['command']}`"
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
            tables.append(_table(_HEADER, rows))
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
        _name(level),
        _number(figures["output_tokens_per_s"]["value"], 1),
        _ratio(ratios.get("output_tokens_per_s")),
        _number(figures["ttft_s"]["p50"], 3),
        _ratio(ratios.get("ttft_s")),
        _number(figures["ttft_s"]["p99"], 3),
        _number(figures["tpot_s"]["p50"], 2, 1000),
        _ratio(ratios.get("tpot_s")),
        _number(figures["itl_s"]["p99"], 2, 1000),
        f"{good['requests_per_s']:.2f} ({good['share']:.0%})",
        _number(server.get("peak_running"), 0),
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
    return ["### Levels without figures", _table(("level", "system", "status", "reason"), rows)]


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
    return f"`{report['control']}` at the end against its start:\n\n" + _table(header, rows)


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
    return text + "\n\n" + _table(("figure", "locust", "vllm bench serve", "difference"), rows)


def _memory(report: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['workload']} at {row['level']:g}",
            _name(row),
            f"{row['length']:,}",
            _bytes(row["formula_bytes_per_request"]),
            _bytes(row["used_bytes_per_request"]),
            "–"
            if row["reported_concurrency"] is None
            else f"{row['reported_concurrency']:g} of {row['reported_length']:,} tokens",
            f"{_bytes(row['reported_bytes_per_request'])} / "
            f"{_bytes(row['formula_bytes_of_reported'])}",
            _number(row["peak_running"], 0),
            "–" if row["peak_kv_usage"] is None else f"{row['peak_kv_usage']:.1%}",
            _number(row["preemptions"], 0),
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
    return _table(header, rows)


def sharding_section(report: dict[str, Any]) -> list[str]:
    """What several devices hold of a cached token; nothing for a single one."""
    rows = [
        [
            row["system"],
            row["spread"],
            f"{row['bytes_per_token_on_one']:,}",
            f"{row['bytes_per_token']:,}",
            f"{row['share']:.0%}",
            _bytes(row["bytes_per_request"]),
            _bytes(row["bytes_per_request_total"]),
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
    return ["### On several GPUs", text, _table(header, rows)]


def arithmetic_section(report: dict[str, Any]) -> list[str]:
    """Bursts beside what they must take at least; nothing where that is not known."""
    rows = [
        [
            f"{row['workload']} at {row['level']:g}",
            _name(row),
            _number(row["prefill_s"], 1),
            _number(row["decode_s"], 1),
            _number(row["total_s"], 1),
            _number(row["measured_s"], 1),
            f"{row['total_s'] / row['measured_s']:.0%}",
            _number(row["running"], 1),
            _number(row["step_s"], 1, 1000),
            _number(row["measured_step_s"], 1, 1000),
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
    return ["## Arithmetic", text, _table(header, rows)]


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
    return ["## Profile", text, _table(("level", "system", *kinds), rows)]


def _client(report: dict[str, Any]) -> str:
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
    return _table(header, rows)


def _commands(report: dict[str, Any]) -> list[str]:
    lines = []
    for name, server in report["servers"].items():
        variables = " ".join(f"{k}={shlex.quote(v)}" for k, v in server["environment"].items())
        lines.append(f"`{name}`:\n\n```bash\n{variables} {shlex.join(server['command'])}\n```")
    return lines


def _name(row: dict[str, Any]) -> str:
    """Of a system, with how it is spread over several devices, and its pass."""
    spread = f" {row['spread']}" if row.get("spread") else ""
    return row["system"] + spread + (" (again)" if row["pass"] > 1 else "")


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


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _number(value: float | None, digits: int, scale: float = 1) -> str:
    return "–" if value is None else f"{scale * value:,.{digits}f}"


def _bytes(value: int | None) -> str:
    return "–" if value is None else format_bytes(value)


def _ratio(figure: dict[str, Any] | None) -> str:
    if not figure or figure["value"] is None:
        return "–"
    if figure["low"] is None:
        return f"{figure['value']:.2f}"
    return f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"
