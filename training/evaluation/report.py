"""Writes a report: JSON for programs, Markdown for people, plots for both."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from training.evaluation.rows import Table
from training.evaluation.variants import Variant
from training.files import disk_errors, write_json
from vllm_attnedit.edit.provenance import git_commit, package_versions

JSON_FILE, MARKDOWN_FILE = "report.json", "report.md"


def write_report(
    folder: Path, table: Table, variants: Sequence[Variant], settings: dict[str, Any]
) -> None:
    """Write ``report.json``, ``report.md`` and the plots into a folder.

    Args:
        folder: made if needed.
        table: what was measured.
        variants: that were measured, in order.
        settings: of the evaluation, for provenance.
    """
    cuda = torch.cuda.is_available()
    provenance = {
        "machine": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "versions": package_versions(),
        "commit": git_commit(),
        "command": " ".join(["python -m training", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": settings,
        "variants": {v.name: {"words": v.words, **v.about} for v in variants},
    }
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / JSON_FILE, {"provenance": provenance, "rows": table.rows})
        plots = draw_plots(folder, table.rows)
        text = markdown(table.label, table.rows, [v.name for v in variants], plots)
        (folder / MARKDOWN_FILE).write_text(text, encoding="utf-8")


def markdown(
    label: str, rows: list[dict[str, Any]], names: Sequence[str], plots: Sequence[str]
) -> str:
    """One line per measurement, one column per model."""
    lines = [f"# Quality of {label}", ""]
    lines += [
        "Value ± half of the 95% interval; below it, the difference from the teacher with its"
    ]
    lines += ["interval over the same questions, where there is one.", ""]
    lines.append("| measurement | metric | " + " | ".join(names) + " |")
    lines.append("|---|---|" + "---|" * len(names))
    keys = list(dict.fromkeys((row["what"], row["metric"]) for row in rows))
    by_key = {(row["what"], row["metric"], row["variant"]): row for row in rows}
    for what, metric in keys:
        cells = [cell(by_key.get((what, metric, name))) for name in names]
        lines.append(f"| {what} | {metric} | " + " | ".join(cells) + " |")
    lines += ["", *(f"![{plot}]({plot})" for plot in plots)]
    return "\n".join(lines).rstrip() + "\n"


def cell(row: dict[str, Any] | None) -> str:
    """A row's value with half of its interval, and its difference from the teacher."""
    if row is None:
        return ""
    scale, digits = (100, 2) if row["unit"] == "share" else (1, 3)
    if row["unit"] == "B":
        return f"{row['value']:,}"
    text = f"{scale * row['value']:.{digits}f}"
    if row["low"] is not None:
        text += f" ± {scale * (row['high'] - row['low']) / 2:.{digits}f}"
    if row.get("difference_low") is not None:
        low, high = scale * row["difference_low"], scale * row["difference_high"]
        text += (
            f"<br>{scale * row['difference']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
        )
    return text


def draw_plots(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Perplexity against length, accuracy by task, passkey maps; returns the files drawn."""
    made = []
    for name, draw in (
        ("perplexity.png", _draw_perplexity),
        ("tasks.png", _draw_tasks),
        ("passkey.png", _draw_passkey),
    ):
        figure = draw(rows)
        if figure is not None:
            figure.savefig(folder / name, dpi=120)
            made.append(name)
    return made


def _figure(width: float, height: float) -> Any:
    # Slow to import; the object interface needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["variant"] for row in rows))


def _errors(row: dict[str, Any]) -> tuple[float, float]:
    if row["low"] is None:
        return 0.0, 0.0
    return row["value"] - row["low"], row["high"] - row["value"]


def _draw_perplexity(rows: list[dict[str, Any]]) -> Any:
    found = [(re.fullmatch(r"perplexity (\S+) L(\d+)", row["what"]), row) for row in rows]
    points = [(m[1], int(m[2]), row) for m, row in found if m]
    texts = list(dict.fromkeys(text for text, _, _ in points))
    if not texts:
        return None
    figure = _figure(6 * len(texts), 4.5)
    for axis, text in zip(figure.subplots(1, len(texts), squeeze=False)[0], texts):
        for name in _names([row for _, _, row in points]):
            line = sorted(
                (
                    (length, row)
                    for t, length, row in points
                    if t == text and row["variant"] == name
                ),
                key=lambda point: point[0],
            )
            axis.errorbar(
                [length for length, _ in line],
                [row["value"] for _, row in line],
                yerr=list(zip(*[_errors(row) for _, row in line])),
                marker="o", capsize=3, label=name,
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set(xlabel="context length", ylabel="perplexity", yscale="log", title=text)
        axis.legend()
    return figure


def _draw_tasks(rows: list[dict[str, Any]]) -> Any:
    scored = [row for row in rows if row["metric"] == "acc"]
    if not scored:
        return None
    tasks, names = list(dict.fromkeys(row["what"] for row in scored)), _names(scored)
    figure = _figure(2 + 1.3 * len(tasks), 4.5)
    axis = figure.subplots()
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        mine = {row["what"]: row for row in scored if row["variant"] == name}
        at = [i + (place - (len(names) - 1) / 2) * width for i, t in enumerate(tasks) if t in mine]
        chosen = [mine[task] for task in tasks if task in mine]
        errors = [tuple(100 * e for e in _errors(row)) for row in chosen]
        heights = [100 * row["value"] for row in chosen]
        axis.bar(at, heights, width, yerr=list(zip(*errors)), capsize=2, label=name)
    axis.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axis.set(ylabel="accuracy, %")
    axis.legend()
    return figure


def _draw_passkey(rows: list[dict[str, Any]]) -> Any:
    found = [(re.fullmatch(r"passkey L(\d+) depth(\d+)%", row["what"]), row) for row in rows]
    cells = [(int(m[1]), int(m[2]), row) for m, row in found if m]
    if not cells:
        return None
    names = _names([row for _, _, row in cells])
    lengths = sorted({length for length, _, _ in cells})
    depths = sorted({depth for _, depth, _ in cells})
    figure = _figure(1.5 + 3 * len(names), 3.5)
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        grid = [[float("nan")] * len(lengths) for _ in depths]
        for length, depth, row in cells:
            if row["variant"] == name:
                grid[depths.index(depth)][lengths.index(length)] = row["value"]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(lengths)), lengths)
        axis.set_yticks(range(len(depths)), [f"{depth}%" for depth in depths])
        axis.set(title=name, xlabel="length", ylabel="depth")
    figure.colorbar(image, ax=figure.axes, label="found")
    return figure
