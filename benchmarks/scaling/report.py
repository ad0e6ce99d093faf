"""What the runs came to: speed, distance of their loss curves, resumed runs beside whole ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.scaling.runs import RUNS, Scaling
from training.progress import read_metrics

_TELLING = 10
"""Times the tolerance that a loss must be, for its differences to say something."""


def losses(folder: Path) -> dict[int, float]:
    """Loss by step, counted from 1."""
    return {row["step"]: row["loss"] for row in read_metrics(folder)}


def distance(a: dict[int, float], b: dict[int, float]) -> dict[str, Any] | None:
    """The largest difference of two curves where both have a step, and where it is."""
    both = sorted(a.keys() & b.keys())
    if not both:
        return None
    worst = max(both, key=lambda step: abs(a[step] - b[step]))
    return {
        "value": abs(a[worst] - b[worst]),
        "at_step": worst,
        "mean": sum(abs(a[step] - b[step]) for step in both) / len(both),
        "relative": max((abs(a[step] - b[step]) / a[step] for step in both if a[step]), default=0),
        "steps": len(both),
        "first_loss": a[both[0]],
        "last_loss": a[both[-1]],
    }


def speed_of(folder: Path) -> dict[str, Any] | None:
    """The longest part of a run: its ``speed.json``."""
    parts = [json.loads(path.read_text()) for path in sorted(folder.glob("speed-*.json"))]
    parts = [part for part in parts if "step_seconds" in part]
    return max(parts, key=lambda part: part["steps"], default=None)


def rows(scaling: Scaling, label: str, tolerance: float) -> list[dict[str, Any]]:
    """The committed form.

    Args:
        scaling: the comparison, as far as it was run.
        label: of the model, in cases.
        tolerance: of a loss, in nats.
    """
    config, found = scaling.config, []
    case = (
        f"training {label} stage2 B{config.optim.batch} L{config.data.sequence_length} "
        f"{config.run.precision}"
    )
    names = {one.name: scaling.devices if one.several else 1 for one in RUNS}
    control = speed_of(scaling.folder("one"))
    for name in ("one", "several"):
        speed = speed_of(scaling.folder(name))
        if speed is not None:
            found.append(_speed_row(scaling, f"{case} x{names[name]}", speed, control))
    curves = {one.name: losses(scaling.folder(one.name)) for one in RUNS}
    pairs = [("several", "one"), *((one.name, one.origin) for one in RUNS if one.origin)]
    for name, other in pairs:
        apart = distance(curves[other], curves[name])
        if apart is not None:
            what = "" if name == "several" else f" from a checkpoint of x{names[other]}"
            found.append(
                {
                    "case": f"{case} x{names[name]}{what}",
                    "metric": "largest difference of the loss",
                    "value": apart.pop("value"),
                    "unit": "nat",
                    "control": f"x{names[other]}, the same steps",
                    "ratio": None,
                    "tolerance": tolerance,
                    **apart,
                }
            )
            # Losses near the tolerance would pass whatever happened to them.
            telling = apart["first_loss"] >= _TELLING * tolerance
            found[-1]["within"] = found[-1]["value"] <= tolerance if telling else None
    return found


def _speed_row(
    scaling: Scaling, case: str, speed: dict[str, Any], control: dict[str, Any] | None
) -> dict[str, Any]:
    """Tokens a second by the median step; the interval is that of the middle half of the steps."""
    tokens = scaling.config.optim.batch * scaling.config.data.sequence_length
    seconds = speed["step_seconds"]
    row = {
        "case": case,
        "metric": "tokens per second",
        "value": tokens / seconds["median"],
        "unit": "tok/s",
        "low": tokens / seconds["p75"],
        "high": tokens / seconds["p25"],
        "control": "x1, not sharded",
        "ratio": control and control["step_seconds"]["median"] / seconds["median"],
        "steps": speed["steps"],
    }
    if "mfu" in speed:
        row["mfu"] = speed["mfu"]
    return row


def table(found: list[dict[str, Any]]) -> str:
    """The rows for people."""
    lines = []
    for row in found:
        if row["unit"] == "nat":
            verdict = {True: "within", False: "NOT within", None: "of losses too small for"}
            said = f"{row['value']:.2e} nat at step {row['at_step']} "
            said += f"({row['relative']:.1e} of the loss at most), "
            said += f"{verdict[row['within']]} {row['tolerance']:g} over {row['steps']} steps"
        else:
            ratio = "" if row["ratio"] is None else f", {row['ratio']:.2f} times one device's"
            said = f"{row['value']:,.0f} tok/s ({row['low']:,.0f} to {row['high']:,.0f}){ratio}"
        lines.append(f"{row['case']}: {row['metric']}: {said}")
    return "\n".join(lines)
