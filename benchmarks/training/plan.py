"""The tasks of an experiment, in the order in which they should be done."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.training.layout import Layout
from benchmarks.training.measure import Job, parts_of, settings
from benchmarks.training.models import Models, last_stage
from benchmarks.training.options import CHOSEN, TEACHER, Baseline, Experiment, Run, Student
from benchmarks.training.stage_tasks import pack_task, stage_task, task_name, training_command
from benchmarks.training.students import start_command
from benchmarks.training.task import Task
from training.data.shards import MANIFEST as SHARDS_MANIFEST
from training.files import read_json, write_json

CHOOSE, TOKENIZE = "choose", "tokenize"
UNTRAINED = "@untrained"
"""Ends the name of a student before training, in rows."""


class Plan:
    """All tasks of an experiment.

    Args:
        experiment: checked.
        layout: of its files.

    Raises:
        AttnEditError: if a run that has begun would now be another one.
    """

    def __init__(self, experiment: Experiment, layout: Layout) -> None:
        self.experiment, self.layout = experiment, layout
        self.models = Models(experiment, layout)
        self.tasks: dict[str, Task] = {}
        self._add_tokenize()
        self._add_choice()
        for run in experiment.runs:
            self._add_run(run)
        for baseline in experiment.baselines:
            self._add_baseline(baseline)

    @property
    def label(self) -> str:
        """The model's name in rows."""
        return self.models.measure.evaluate.label

    def names(self) -> list[str]:
        """Runs and baselines."""
        return [*self.models.runs, *(one.name for one in self.experiment.baselines)]

    def missing(self, only: Sequence[str] = ()) -> list[Task]:
        """Undone tasks of some runs and baselines, and the undone ones that they need, in order.

        The teacher is measured for everybody; edits and the like, and the models of runs that
        finished elsewhere, only for who needs them.
        """
        names: set[str] = set()

        def visit(task: Task) -> None:
            if task.name not in names and not task.done():
                names.add(task.name)
                for need in task.needs:
                    visit(self.tasks[need])

        for task in self.tasks.values():
            asked = not only or task.owner in (*only, TEACHER)
            if task.owner and asked and not task.noted():
                visit(task)
        return [task for name, task in self.tasks.items() if name in names]

    def _add(self, task: Task) -> str:
        self.tasks.setdefault(task.name, task)
        return task.name

    def _add_tokenize(self) -> None:
        config = self.models.config(TOKENIZE)
        manifest = Path(str(config.data.shards)) / SHARDS_MANIFEST

        def command() -> list[str]:
            return training_command(TOKENIZE, self.models.write(f"{TOKENIZE}.yaml", config))

        self._add(Task(TOKENIZE, TOKENIZE, "", (), manifest.is_file, command))

    def _add_choice(self) -> None:
        config, path = self.models.config(CHOOSE), self.layout.choice

        def command() -> list[str]:
            job = self.models.write(f"{CHOOSE}.yaml", config)
            return training_command("choose-layers", job)

        def ended(log: Path, _seconds: float) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, json.loads(log.read_text(encoding="utf-8").splitlines()[-1]))

        self._add(Task(CHOOSE, CHOOSE, "", (), path.is_file, command, ended))

    def _add_edit(self, run: Run, folder: Path) -> str:
        def command() -> list[str]:
            return start_command(self.models.teacher, run, self.models.chosen(), folder)

        made = (folder / "config.json").is_file
        chosen = run.student is not None and run.student.full_layers == CHOSEN
        needs = (CHOOSE,) if chosen else ()
        return self._add(Task(f"edit@{folder.name}", "edit", "", needs, made, command))

    def _add_run(self, run: Run) -> None:
        keep = self.experiment.pack.keep
        edit = self.models.edit(run)
        if edit is not None:
            first = self._add_edit(run, edit)
        else:
            parent = self.models.runs[str(run.after)]
            first = task_name(parent.name, last_stage(parent))
        before = first
        for stage in run.stages:
            needs = (TOKENIZE, before)
            before = self._add(stage_task(self.models, run, stage, needs))
            wanted = keep == "all" or (keep == "results" and stage == last_stage(run))
            if wanted and self.models.attention_only(run):
                self._add(pack_task(self.models, run, stage))
        measure = self._measure
        measure(run.name, run.name, run.evaluate, before, lambda: _source(self.models.result(run)))
        if edit is not None:
            untrained = run.name + UNTRAINED
            measure(run.name, untrained, run.untrained, first, lambda: _source(edit))

    def _add_baseline(self, one: Baseline) -> None:
        def about() -> dict[str, Any]:
            student = Student(target="gateswa", full_layers=one.full_layers)
            full = student.layers(self.models.chosen())
            return {"kind": "windows", "window": one.window, "full": full, "sinks": one.sinks}

        needs = CHOOSE if one.full_layers == CHOSEN else None
        self._measure(one.name, one.name, one.evaluate, needs, about)

    def _measure(
        self,
        owner: str,
        name: str,
        kinds: Sequence[str],
        needs: str | None,
        about: Callable[[], dict[str, Any]],
    ) -> None:
        """Measurements of a model, after those of the teacher, which all others stand beside."""
        if name != TEACHER:
            self._measure(TEACHER, TEACHER, kinds, None, lambda: {"kind": TEACHER})
        for part in parts_of(self.models.measure, kinds):
            self._add(self._measurement(owner, name, part, (needs,) if needs else (), about))

    def _measurement(
        self,
        owner: str,
        name: str,
        part: str,
        needs: tuple[str, ...],
        about: Callable[[], dict[str, Any]],
    ) -> Task:
        config, out = self.models.measure, self.layout.measured(name, part)
        stamp = settings(config, part)

        def done() -> bool:
            return out.is_file() and read_json(out, "measurement")["settings"] == stamp

        def command() -> list[str]:
            job = Job(config=asdict(config), name=name, part=part, out=str(out), **about())
            path = self.layout.job(f"measure@{name}@{part}.json")
            write_json(path, asdict(job))
            return [sys.executable, "-m", "benchmarks.training.measure", str(path)]

        kind = part.split("-")[0]
        return Task(f"measure@{name}@{part}", kind, owner, needs, done, command)


def _source(folder: Path) -> dict[str, Any]:
    return {"kind": "model", "source": str(folder)}
