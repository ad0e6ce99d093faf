"""What runs start from, by its options: names of edits, and the commands that make them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.training.options import Run, Student
from training.files import digest, sha256_of
from vllm_attnedit.edit.patterns import option_name

_EDIT = (sys.executable, "-c", "from vllm_attnedit.cli import main; main()", "edit")


def slug_of(student: Student) -> str:
    """A folder's name for an edit: what it is in words, and a digest of all of it."""
    about = asdict(student)
    for name in ("calibration", "calibration_device"):
        about.pop(name)  # where a text is and where it is read do not tell edits apart
    words: list[str] = [student.target, student.init]
    if student.window is not None:
        words.append(f"w{student.window}")
    return "-".join([*words, digest(about)[:8]])


def start_of(run: Run) -> str | None:
    """A folder's name for the edit that a run starts from; ``None`` if it comes after another."""
    if run.edit is not None:
        return f"file-{sha256_of(Path(run.edit))[:8]}"
    return None if run.student is None else slug_of(run.student)


def start_command(teacher: str, run: Run, chosen: Sequence[int] | None, folder: Path) -> list[str]:
    """``attnedit edit`` for the edit that a run starts from, made or applied."""
    if run.student is not None:
        return edit_command(teacher, run.student, chosen, folder)
    return [*_EDIT, teacher, str(folder), "--from-edit", str(run.edit)]


def edit_command(
    teacher: str, student: Student, chosen: Sequence[int] | None, folder: Path
) -> list[str]:
    """``attnedit edit`` for a student; ``chosen`` are the layers that calibration chose."""
    layers = student.plan(chosen).full_layers
    options = asdict(student)
    options["full_layers"] = None if layers is None else ",".join(map(str, layers))
    command = [*_EDIT, teacher, str(folder)]
    for name, value in options.items():
        if value is not None:
            command += [option_name(name), str(value)]
    return command
