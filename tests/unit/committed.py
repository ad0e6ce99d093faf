"""What this repository keeps of its measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Measured = dict[tuple[str, str], dict[str, Any]]
"""Rows of one model by what was measured and its metric."""


def rows_of(result: str) -> list[dict[str, Any]]:
    """The rows of a file in ``benchmarks/results``."""
    path = ROOT / "benchmarks" / "results" / result
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def models_of(result: str) -> dict[str, Measured]:
    """Scores by model."""
    models: dict[str, Measured] = {}
    for row in rows_of(result):
        if "variant" in row:
            models.setdefault(row["variant"], {})[row["what"], row["metric"]] = row
    return models
