"""Loss against tokens: Stage 1 and Stage 2 of all runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def draw(path: Path, results: list[dict[str, Any]]) -> bool:
    """Draw what runs noted of their losses; whether there was anything.

    Args:
        path: of the PNG.
        results: of runs, as they are kept.
    """
    # Slow to import; the object interface needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = [
        stage for stage in ("stage1", "stage2")
        if any(result.get("stages", {}).get(stage) for result in results)
    ]  # fmt: skip
    if not stages:
        return False
    figure = Figure(figsize=(7 * len(stages), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(stages), squeeze=False)[0]
    for axis, stage in zip(axes, stages):
        name = "loss" if stage == "stage1" else "kl"
        for result in results:
            curve = result.get("stages", {}).get(stage, {}).get("curve", [])
            points = [(point["tokens"] / 1e6, point[name]) for point in curve if name in point]
            if points:
                axis.plot(*zip(*points), linewidth=1, label=result["run"])
        meaning = "‖y′ − y‖² / ‖y‖², mean of layers" if stage == "stage1" else "KL to teacher, nats"
        axis.set(xlabel="million tokens", ylabel=meaning, yscale="log", title=stage)
        axis.legend(fontsize="small")
    temporary = path.with_suffix(f".{os.getpid()}.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)
    return True
