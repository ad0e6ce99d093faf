"""Edits by their options: their names, and the command that makes them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.training.options import Student
from training.files import digest


def slug_of(student: Student) -> str:
    """A folder's name for an edit: what it is in words, and a digest of all of it."""
    about = asdict(student)
    for name in ("calibration", "calibration_device"):
        about.pop(name)  # where a text is and where it is read do not tell edits apart
    words: list[str] = [student.target, student.init]
    if student.window is not None:
        words.append(f"w{student.window}")
    return "-".join([*words, digest(about)[:8]])


def edit_command(
    teacher: str, student: Student, chosen: Sequence[int] | None, folder: Path
) -> list[str]:
    """``attnedit edit`` for a student; ``chosen`` are the layers that calibration chose."""
    plan = student.plan(chosen)
    options = {
        "target": plan.target,
        "init": plan.init,
        "window": plan.window,
        "gate": plan.gate,
        "kv-lora-rank": plan.kv_lora_rank,
        "qk-rope-head-dim": plan.qk_rope_head_dim,
        "qk-nope-head-dim": plan.qk_nope_head_dim,
        "seed": plan.seed,
        "calibration": student.calibration,
        "calibration-tokens": student.calibration_tokens,
        "calibration-device": student.calibration_device,
    }
    if plan.full_layers is not None:
        options["full-layers"] = ",".join(map(str, plan.full_layers))
    command = [sys.executable, "-c", "from vllm_attnedit.cli import main; main()"]
    command += ["edit", teacher, str(folder)]
    for name, value in options.items():
        if value is not None:
            command += [f"--{name}", str(value)]
    return command
