"""A level as often as its workload wants it, and one result of all."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any
from zlib import crc32

from benchmarks.serving.levels import run_level
from benchmarks.serving.options import Options
from benchmarks.serving.readiness import wait_until_idle
from benchmarks.serving.server import Running
from benchmarks.serving.workload import Workload


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
        the result of :func:`benchmarks.serving.levels.run_level`; of several, each metric's median
        with the range of all as its interval.
    """
    runs: list[dict[str, Any]] = []
    for repeat in range(workload.repeats if workload.load == "burst" else 1):
        # Prompts of its own, the same for every system: none finds those of another level, another
        # repeat or another workload cached.
        key = f"{workload.seed} {workload.name} {level:g} {repeat}"
        again = workload.model_copy(update={"seed": 1 + crc32(key.encode())})
        if not wait_until_idle(running):
            break
        runs.append(run_level(running, again, level, model, options.measure, options.goal, folder))
        if runs[-1]["status"] not in ("ok", "not steady"):
            break
    if not runs:
        return {"status": "failed", "reason": "the server did not become idle", "level": level}
    return _merged(runs)


def _merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of a burst's repeats: medians, each metric's own, with the ranges as intervals.

    What has no median (samples, goodput, the client's cost) is that of the median run by rate.
    """
    good = [run for run in runs if "figures" in run]
    if len(good) < len(runs) or len(runs) == 1:
        return runs[-1]
    merged = {}
    for name, keys in (
        ("output_tokens_per_s", ("value",)),
        *((name, ("p50", "p90", "p99")) for name in ("ttft_s", "tpot_s", "itl_s", "latency_s")),
    ):
        runs_of = {key: [run["figures"][name][key] for run in good] for key in keys}
        first = runs_of[keys[0]]
        if None not in first:
            medians = {key: median(values) for key, values in runs_of.items()}
            merged[name] = medians | {"low": min(first), "high": max(first)}
    good.sort(key=lambda run: run["figures"]["output_tokens_per_s"]["value"])
    chosen = good[len(good) // 2]
    return {**chosen, "figures": chosen["figures"] | merged, "repeats": len(good)}
