"""Draws the loss of a run: the whole, and in Stage 1 every layer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from training.progress import read_metrics


def draw_curves(folder: Path) -> Path | None:
    """Draw ``curves.png`` from the metrics of a run; ``None`` if there are none yet."""
    rows = read_metrics(folder)
    if not rows:
        return None
    # Slow to import; the object interface needs no display and leaves no state behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layered = [row for row in rows if row.get("layers")]
    figure = Figure(figsize=(12 if layered else 7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, 2 if layered else 1, squeeze=False)[0]
    millions = [row["tokens"] / 1e6 for row in rows]
    axes[0].plot(millions, [row["loss"] for row in rows], linewidth=1)
    axes[0].set(xlabel="million tokens", ylabel="loss", yscale="log", title="loss of a step")
    if layered:
        _draw_layers(figure, axes[1], layered)
    path = folder / "curves.png"
    temporary = path.with_suffix(f".{os.getpid()}.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)
    return path


def _draw_layers(figure: Any, axis: Any, rows: list[dict[str, Any]]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    layers = sorted(int(layer) for layer in rows[0]["layers"])
    colours: Any = ScalarMappable(
        Normalize(layers[0], max(layers[-1], layers[0] + 1)), colormaps["viridis"]
    )
    millions = [row["tokens"] / 1e6 for row in rows]
    for layer in layers:
        values = [row["layers"][str(layer)] for row in rows]
        axis.plot(millions, values, color=colours.to_rgba(layer), linewidth=1)
    figure.colorbar(colours, ax=axis, label="layer")
    axis.set(
        xlabel="million tokens",
        ylabel="‖y′ − y‖² / ‖y‖²",
        yscale="log",
        title="loss of every layer",
    )
