"""``python -m benchmarks.kernels.roofline RESULT.json PLOT.png``: all operators under one roof.

The roof is what the same run measured: copy bandwidth and the rate of a bfloat16 product.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


def points(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float, str]]]:
    """By operator: operations a byte, GB/s reached, and the case's name."""
    found: dict[str, dict[str, tuple[float, float, str]]] = defaultdict(dict)
    for row in rows:
        if row["metric"] == "bandwidth" and "bytes" in row:
            intensity = row["operations"] / row["bytes"]
            found[row["case"].split()[0]][row["case"]] = (intensity, row["value"], row["case"])
    return {operator: list(cases.values()) for operator, cases in found.items()}


def ceiling(rows: list[dict[str, Any]], case: str) -> float:
    """A ceiling of the run by the name of its row."""
    return next(float(row["value"]) for row in rows if row["case"] == case)


def draw(result: dict[str, Any], target: Path) -> None:
    """Write the plot: bandwidth over intensity, so that element-wise operators fit beside matrix
    ones, which do a thousand times more operations a byte."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["rows"]
    copy, matmul = ceiling(rows, "copy"), ceiling(rows, "matmul bf16 8192")
    figure, axes = plt.subplots(figsize=(9, 5.5))
    # Element-wise operators count no operations; they are drawn at the left edge.
    least = 0.5
    intensities = [least, matmul * 1e3 / copy, 4096.0]
    axes.plot(intensities, [min(copy, matmul * 1e3 / x) for x in intensities], color="black", lw=1)
    axes.annotate(f"copy {copy:.0f} GB/s", (least, copy), xytext=(0, 5), textcoords="offset points")
    markers = "osD^vP*"
    for marker, (operator, cases) in zip(markers, points(rows).items()):
        axes.scatter(
            [max(x, least) for x, _, _ in cases],
            [y for _, y, _ in cases],
            marker=marker,
            s=36,
            alpha=0.8,
            label=operator,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("GB/s reached")
    axes.set_title(result["provenance"]["machine"])
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(loc="lower left", fontsize="small")
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)


def main(argv: list[str] | None = None) -> None:
    """Read a result, write its plot."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 2 or not Path(arguments[0]).is_file():
        print(f"error: arguments: {arguments}: pass RESULT.json PLOT.png", file=sys.stderr)
        raise SystemExit(2)
    draw(json.loads(Path(arguments[0]).read_text()), Path(arguments[1]))
    print(arguments[1])


if __name__ == "__main__":
    main()
