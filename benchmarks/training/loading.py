"""Reads a training experiment's YAML file, and checks all of it before anything runs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.training.options import TEACHER, Experiment, Student
from benchmarks.yaml_file import read_yaml
from training.options import apply_overrides, build
from vllm_attnedit.errors import AttnEditError

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment's YAML file.

    Args:
        path: of the file; relative paths in it are relative to the working folder.
        overrides: ``--key value`` pairs on top of its ``options``.

    Raises:
        AttnEditError: naming the field, the value and the fix.
    """
    data = read_yaml(path)
    if isinstance(data, dict):
        data.pop("shared", None)  # a place for YAML anchors
        if isinstance(data.get("options"), dict):
            apply_overrides(data["options"], overrides)
    experiment: Experiment = build(Experiment, data)
    _check(experiment)
    return experiment


def _check(experiment: Experiment) -> None:
    with naming("options"):
        experiment.measure_config(Path("output"))
    names: list[str] = []
    for run in experiment.runs:
        field = f"runs.{run.name}"
        starts = [name for name in ("student", "edit", "after") if getattr(run, name) is not None]
        if len(starts) != 1:
            fix = "give it one of student, edit and after"
            raise AttnEditError(field, " and ".join(starts) or "no start", fix)
        if run.edit is not None and not Path(run.edit).is_file():
            raise AttnEditError(f"{field}.edit", run.edit, "give the file of an edit")
        if run.after is not None:
            check_names(f"{field}.after", [run.after], names, "an earlier run")
        if not run.stages:
            raise AttnEditError(field, "no stage", "give it stage1, stage2 or both")
        with naming(field):
            if run.student is not None:
                run.student.plan()
            for stage in run.stages:
                experiment.stage_config(run, stage, Path("student"), Path("output"))
        names.append(run.name)
    everything = [*names, *(one.name for one in experiment.baselines)]
    for name in everything:
        if not _NAME.fullmatch(name) or name == TEACHER or everything.count(name) > 1:
            fix = "give each run and baseline a name of its own: a-z, 0-9, _ . - (not teacher)"
            raise AttnEditError("name", name, fix)
    for one in experiment.baselines:
        with naming(f"baselines.{one.name}"):
            rival = Student(target="gateswa", window=one.window, full_layers=one.full_layers)
            rival.plan()


def check_names(
    field: str, names: Iterable[str], known: Sequence[str], what: str = "a name of the experiment"
) -> None:
    """Refuse a name that is not known, with the nearest one that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = (
                f"the nearest is {near[0]}" if near else f"there are {', '.join(known) or 'none'}"
            )
            raise AttnEditError(field, name, f"name {what}; {hint}")


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Says in which run or section an option was wrong."""
    try:
        yield
    except AttnEditError as error:
        raise AttnEditError(f"{field}: {error.field}", error.value, error.fix) from error
