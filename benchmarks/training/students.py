"""Edits by their options: their names, and the command that makes them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.training.options import Student
from training.files import digest
from vllm_attnedit.edit.patterns import option_name


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
    layers = student.plan(chosen).full_layers
    options = asdict(student)
    options["full_layers"] = None if layers is None else ",".join(map(str, layers))
    command = [sys.executable, "-c", "from vllm_attnedit.cli import main; main()"]
    command += ["edit", teacher, str(folder)]
    for name, value in options.items():
        if value is not None:
            command += [option_name(name), str(value)]
    return command
