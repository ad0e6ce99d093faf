"""Cells and tables of the report in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_attnedit.cli.quantities import format_bytes


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of rows as wide as its header."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join(lines)


def number(value: float | None, digits: int, scale: float = 1) -> str:
    """So many times ``scale``, or a dash where it is not known."""
    return "–" if value is None else f"{scale * value:,.{digits}f}"


def in_bytes(value: int | None) -> str:
    """With a unit, or a dash where it is not known."""
    return "–" if value is None else format_bytes(value)


def ratio(figure: dict[str, Any] | None) -> str:
    """To the control, with its interval if there is one."""
    if not figure or figure["value"] is None:
        return "–"
    if figure["low"] is None:
        return f"{figure['value']:.2f}"
    return f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def system_name(row: dict[str, Any]) -> str:
    """Of a system, with how it is spread over several devices, and its pass."""
    spread = f" {row['spread']}" if row.get("spread") else ""
    return row["system"] + spread + (" (again)" if row["pass"] > 1 else "")
