"""A level as often as its workload wants it, and one result of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.serving.levels import run_level
from benchmarks.serving.options import Options, Workload
from benchmarks.serving.readiness import wait_until_idle
from benchmarks.serving.server import Running


def run_repeats(
    running: Running,
    workload: Workload,
    level: float,
    model: dict[str, Any],
    options: Options,
    folder: Path,
) -> dict[str, Any]:
    """Run a level, a burst ``repeats`` times; ends with the first one without figures.

    Returns:
        the result of :func:`benchmarks.serving.levels.run_level`; of several, that of the median
        run by rate, with the ranges of all as intervals.
    """
    runs: list[dict[str, Any]] = []
    for repeat in range(workload.repeats if workload.load == "burst" else 1):
        # Prompts of its own, the same for every system: none finds another level's cached.
        seed = workload.seed + 1000 * repeat + 7919 * workload.levels.index(level)
        again = workload.model_copy(update={"seed": seed})
        if not wait_until_idle(running):
            break
        runs.append(run_level(running, again, level, model, options.measure, options.goal, folder))
        if runs[-1]["status"] not in ("ok", "not steady"):
            break
    if not runs:
        return {"status": "failed", "reason": "the server did not become idle", "level": level}
    return _merged(runs)


def _merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of a burst's repeats: the median run by rate, with the ranges as intervals."""
    good = [run for run in runs if "figures" in run]
    if len(good) < len(runs) or len(runs) == 1:
        return runs[-1]
    ranges = {}
    for name, key in (
        ("output_tokens_per_s", "value"), ("ttft_s", "p50"), ("tpot_s", "p50"), ("latency_s", "p50")
    ):  # fmt: skip
        values = [run["figures"][name][key] for run in good]
        if None not in values:
            ranges[name] = {"low": min(values), "high": max(values)}
    good.sort(key=lambda run: run["figures"]["output_tokens_per_s"]["value"])
    chosen = good[len(good) // 2]
    for name, low_and_high in ranges.items():
        chosen["figures"][name] |= low_and_high
    return {**chosen, "repeats": len(good)}
