"""Rows of a result from what was measured, and the table for people."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.kernels.contest import OURS


@dataclass
class Measured:
    """One case: traffic in bytes, operations, and by contestant microseconds and their spread."""

    traffic: int
    operations: int
    us: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    #: Of a kernel that only reads the traffic, where that is what bounds the case.
    floor_us: float | None = None


@dataclass
class Result:
    """A run: its ceilings and its cases."""

    copy_gbps: float = 0.0
    matmul_tflops: float = 0.0
    cases: dict[str, Measured] = field(default_factory=dict)


def rows(result: Result) -> list[dict[str, Any]]:
    """One row for each case and control, best control first; one without control if there is none.

    ``value`` is the bandwidth reached on bytes that must move, so that a ratio above 1 means that
    ours is faster.
    """
    made: list[dict[str, Any]] = [
        _row("copy", "bandwidth", result.copy_gbps, "GB/s"),
        _row("matmul bf16 8192", "rate", result.matmul_tflops, "TFLOP/s"),
    ]
    for case, measured in result.cases.items():
        ours = measured.us.get(OURS)
        if ours is None:
            continue
        rate = measured.traffic / ours / 1e3
        shared = {
            "time_us": round(ours, 3),
            "spread": round(measured.spread[OURS], 4),
            "bytes": measured.traffic,
            "operations": measured.operations,
            "share_of_copy": round(rate / result.copy_gbps, 4) if result.copy_gbps else None,
        }
        if measured.floor_us:
            shared["read_floor_us"] = round(measured.floor_us, 3)
        controls = sorted((us, name) for name, us in measured.us.items() if name != OURS)
        for us, name in controls:
            made.append(
                _row(case, "bandwidth", rate, "GB/s", name, us / ours)
                | shared
                | {"control_time_us": round(us, 3)}
            )
        if not controls:
            made.append(_row(case, "bandwidth", rate, "GB/s") | shared)
        for name, note in measured.notes.items():
            made.append(_row(case, "note", None, "", name) | {"note": note})
    return made + _length_rows(result)


def _row(
    case: str,
    metric: str,
    value: float | None,
    unit: str,
    control: str | None = None,
    ratio: float | None = None,
) -> dict[str, Any]:
    return {
        "case": case,
        "metric": metric,
        "value": None if value is None else round(value, 2),
        "unit": unit,
        "control": control,
        "ratio": None if ratio is None else round(ratio, 4),
    }


def _length_rows(result: Result) -> list[dict[str, Any]]:
    """Window decode at length 131,072 against 1,024: time over time, near 1 when only the window
    is read."""
    made = []
    for case, measured in result.cases.items():
        short = case.replace(" L131072 ", " L1024 ")
        if short == case or short not in result.cases:
            continue
        long_us, short_us = measured.us.get(OURS), result.cases[short].us.get(OURS)
        if long_us and short_us:
            row = _row(case, "time", long_us, "us", "ours at L1024", long_us / short_us)
            made.append(row | {"control_time_us": round(short_us, 3)})
    return made


def table(result: Result) -> Table:
    """The run for people: the best control's ratio last, all controls before it."""
    shown = Table(title=f"copy {result.copy_gbps:.0f} GB/s, bf16 matmul {result.matmul_tflops:.0f}")
    shown.caption = (
        "MB that must move; read: the time of a kernel that only reads as much; "
        "best: the best control's time over ours"
    )
    for column in ("case", "MB", "us", "read us", "GB/s", "of copy", "controls", "best"):
        shown.add_column(column, justify="left" if column in ("case", "controls") else "right")
    for case, measured in result.cases.items():
        ours = measured.us.get(OURS)
        controls = sorted((us, name) for name, us in measured.us.items() if name != OURS)
        listed = [f"{name} {us:.1f} us" for us, name in controls]
        listed += [f"{name}: {note}" for name, note in measured.notes.items()]
        if ours is None:
            shown.add_row(case, f"{measured.traffic / 1e6:.1f}", *"----", "\n".join(listed))
            continue
        rate = measured.traffic / ours / 1e3
        shown.add_row(
            case,
            f"{measured.traffic / 1e6:.1f}",
            f"{ours:.1f}",
            f"{measured.floor_us:.1f}" if measured.floor_us else "-",
            f"{rate:.0f}",
            f"{rate / result.copy_gbps:.0%}" if result.copy_gbps else "-",
            "\n".join(listed),
            f"{controls[0][0] / ours:.2f}x" if controls else "-",
        )
    return shown


def show(result: Result) -> None:
    """Print the table, wide enough for its cases wherever it is printed."""
    Console(width=160).print(table(result))
