"""The report's PNG figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import ScalarFormatter


def draw(report: dict[str, Any], out: Path) -> dict[str, str]:
    """Draw what there are figures for; returns titles and file names."""
    drawn: dict[str, str] = {}
    for workload in report["options"]["workloads"]:
        levels = [
            level
            for level in report["levels"]
            if level["workload"] == workload["name"] and "figures" in level and level["pass"] == 1
        ]
        if not levels:
            continue
        for kind, (title, function) in _FIGURES.items():
            figure, axes = plt.subplots(figsize=(6.4, 4.0), constrained_layout=True)
            function(axes, levels)
            axes.set_title(f"{workload['name']}: {title}")
            axes.grid(alpha=0.3)
            axes.legend(loc="upper left")
            name = f"{workload['name']}-{kind}.png"
            figure.savefig(out / name, dpi=120)
            plt.close(figure)
            drawn[f"{workload['name']}: {title}"] = name
    return drawn


def _by_system(levels: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    systems: dict[str, list[dict[str, Any]]] = {}
    for level in sorted(levels, key=lambda level: level["level"]):
        systems.setdefault(level["system"], []).append(level)
    return systems


def _against_load(axes: Any, levels: list[dict[str, Any]], name: str, key: str) -> None:
    for system, some in _by_system(levels).items():
        figures = [level["figures"][name] for level in some]
        values = [figure[key] for figure in figures]
        errors = [
            [0 if f[side] is None else abs(f[key] - f[side]) for f in figures]
            for side in ("low", "high")
        ]
        axes.errorbar(
            [level["level"] for level in some], values, yerr=errors, marker="o", label=system
        )
    axes.set_xlabel("load (concurrency or rate)")
    if len({level["level"] for level in levels}) > 1:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())


def _throughput(axes: Any, levels: list[dict[str, Any]]) -> None:
    _against_load(axes, levels, "output_tokens_per_s", "value")
    axes.set_ylabel("output tokens a second")
    axes.set_ylim(bottom=0)


def _ttft(axes: Any, levels: list[dict[str, Any]]) -> None:
    _against_load(axes, levels, "ttft_s", "p50")
    axes.set_ylabel("median time to first token, s")
    axes.set_yscale("log")


def _over_time(axes: Any, levels: list[dict[str, Any]], key: str, scale: float) -> None:
    highest = max(level["level"] for level in levels)
    for system, some in _by_system(levels).items():
        samples = [s for level in some if level["level"] == highest
                   for s in level["server"]["samples"]]  # fmt: skip
        axes.plot([s["time_s"] for s in samples], [scale * s[key] for s in samples], label=system)
    axes.set_xlabel(f"seconds, at load {highest:g}")
    axes.set_ylim(bottom=0)


def _kv_use(axes: Any, levels: list[dict[str, Any]]) -> None:
    _over_time(axes, levels, "kv_usage", 100)
    axes.set_ylabel("KV blocks in use, %")


def _running(axes: Any, levels: list[dict[str, Any]]) -> None:
    _over_time(axes, levels, "running", 1)
    axes.set_ylabel("requests running")


def _pareto(axes: Any, levels: list[dict[str, Any]]) -> None:
    for system, some in _by_system(levels).items():
        points = [
            (1 / f["tpot_s"]["p50"], f["output_tokens_per_s"]["value"])
            for f in (level["figures"] for level in some)
            if f["tpot_s"]["p50"]
        ]
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=system)
    axes.set_xlabel("one user's output tokens a second")
    axes.set_ylabel("output tokens a second, all users")
    axes.set_ylim(bottom=0)


_FIGURES: dict[str, tuple[str, Callable[[Any, list[dict[str, Any]]], None]]] = {
    "throughput": ("throughput against load", _throughput),
    "ttft": ("time to first token against load", _ttft),
    "kv": ("KV use against time", _kv_use),
    "running": ("requests running against time", _running),
    "pareto": ("throughput against a user's speed", _pareto),
}
