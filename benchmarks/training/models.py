"""Which model a stage starts from and where it is: an edit, a stage's result, a packed edit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import yaml

from benchmarks.training.layout import Layout
from benchmarks.training.options import Experiment, Run
from benchmarks.training.packing import MANIFEST, unpack
from benchmarks.training.students import start_of
from training.config import Config
from training.files import read_json


class Models:
    """The models and configurations of an experiment.

    Args:
        experiment: checked.
        layout: of its files.
    """

    def __init__(self, experiment: Experiment, layout: Layout) -> None:
        self.experiment, self.layout = experiment, layout
        self.runs = {run.name: run for run in experiment.runs}
        self.measure = self._shared(experiment.measure_config(layout.work / "measure"))
        self.teacher = self.measure.teacher

    def config(self, name: str) -> Config:
        """The shared configuration, for a command that is no stage."""
        return self._shared(self.experiment.config(self.layout.work / name))

    def stage_config(self, run: Run, stage: str, student: Path | None = None) -> Config:
        """The configuration of a stage; without a student, to compare with what was."""
        output = self.layout.stage(run.name, stage)
        student = student or Path("student")
        return self._shared(self.experiment.stage_config(run, stage, student, output))

    def write(self, name: str, config: Config) -> Path:
        """A configuration as a file that ``python -m training`` takes."""
        path = self.layout.job(name)
        path.write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
        return path

    def chosen(self) -> tuple[int, ...] | None:
        """The layers of the choice, once it was made."""
        if not self.layout.choice.is_file():
            return None
        return tuple(read_json(self.layout.choice, "choice")["full_layers"])

    def origin(self, run: Run) -> str:
        """What a run starts from, in one word."""
        return start_of(run) or f"after {run.after}"

    def edit(self, run: Run) -> Path | None:
        """The untrained edit that a run starts from; ``None`` if it comes after another run."""
        start = start_of(run)
        return None if start is None else self.layout.edit(start)

    def source(self, run: Run, stage: str) -> Path:
        """The folder that a stage starts from; a packed result is unpacked."""
        if stage == "stage2" and run.stage1 is not None:
            return self.result(run, "stage1")
        edit = self.edit(run)
        return self.result(self.runs[str(run.after)]) if edit is None else edit

    def result(self, run: Run, stage: str | None = None) -> Path:
        """The model that a stage made, by default the run's last; a packed one is unpacked."""
        stage = stage or last_stage(run)
        model, packed = self.layout.model(run.name, stage), self.layout.packed(run.name, stage)
        with self.layout.lock(f"unpack@{run.name}@{stage}", wait=True):
            if not model.is_dir() and (packed / MANIFEST).is_file():
                unpack(self.teacher, packed, model)
        return model

    def attention_only(self, run: Run) -> bool:
        """Whether nothing but attention has been trained, so that an edit holds all of it."""
        stages = [self.stage_config(run, stage) for stage in run.stages if stage == "stage2"]
        mine = all(config.stage2.trainable == "attention" for config in stages)
        return mine and (run.after is None or self.attention_only(self.runs[run.after]))

    def _shared(self, config: Config) -> Config:
        # By default every run would tokenise the sources for itself.
        config.data.shards = config.data.shards or str(self.layout.work / "shards")
        return config


def last_stage(run: Run) -> str:
    """The stage whose result is the run's."""
    return list(run.stages)[-1]
