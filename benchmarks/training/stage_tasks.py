"""Tasks of a run: its stages, which can be stopped and go on, and the packing of their results."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.training.loading import naming
from benchmarks.training.models import Models, last_stage
from benchmarks.training.options import Run
from benchmarks.training.packing import MANIFEST
from benchmarks.training.stages import check_same, read_result, record, stage_of
from benchmarks.training.task import Task
from training.files import atomic_folder, read_json
from training.repack import PACKED_FOLDER
from training.resuming import STATE, find_checkpoints

STATE_FOLDER = "state"
"""Of what a stopped run packs."""


def training_command(command: str, config: Path) -> list[str]:
    """``python -m training``."""
    return [sys.executable, "-m", "training", command, str(config)]


def task_name(run: str, stage: str) -> str:
    """Of a stage."""
    return f"{run}@{stage}"


def stage_task(models: Models, run: Run, stage: str, needs: tuple[str, ...]) -> Task:
    """A stage of a run.

    Raises:
        AttnEditError: if it has begun and would now be another one.
    """
    layout, state = models.layout, models.layout.packed(run.name, STATE_FOLDER)
    origin, job = models.origin(run), f"{run.name}@{stage}.yaml"
    with naming(f"runs.{run.name}"):
        check_same(read_result(layout, run.name), origin, stage, models.stage_config(run, stage))

    def finished(which: str) -> bool:
        kept = layout.packed(run.name, which) / MANIFEST
        there = layout.model(run.name, which).is_dir() or kept.is_file()
        return there and _noted(models, run, which)

    def done() -> bool:
        stages = list(run.stages)
        return any(finished(which) for which in stages[stages.index(stage) :])

    def command() -> list[str]:
        config = models.stage_config(run, stage, models.source(run, stage))
        own = find_checkpoints(Path(config.output) / "checkpoints")
        packed = read_json(state / STATE, "state") if (state / STATE).is_file() else {}
        if not own and packed.get("stage") == stage:
            config.checkpoint.resume = str(state)
        return training_command(stage, models.write(job, config))

    def ended(_log: Path, seconds: float) -> None:
        config = models.stage_config(run, stage, models.source(run, stage))
        record(layout, run.name, stage, origin, config, seconds)
        if done():
            shutil.rmtree(state, ignore_errors=True)

    def carry() -> list[str]:
        limit = str(models.experiment.pack.parts_mb)
        options = ["--checkpoint.weights", "bf16", "--checkpoint.optimizer", "none"]
        options += ["--checkpoint.parts_mb", limit, "--checkpoint.resume", "auto"]
        return [*training_command("repack", layout.job(job)), *options]

    def carried() -> None:
        packed = layout.stage(run.name, stage) / PACKED_FOLDER
        with atomic_folder(state, STATE) as folder:
            shutil.copytree(packed, folder, dirs_exist_ok=True)

    name = task_name(run.name, stage)
    task = Task(
        name, "stage", run.name, needs, done, command, ended,
        noted=lambda: _noted(models, run, stage),
    )  # fmt: skip
    if models.experiment.pack.keep != "all":
        return task
    return Task(**{**vars(task), "carry": carry, "carried": carried})


def _noted(models: Models, run: Run, stage: str) -> bool:
    """Whether a stage finished, here or elsewhere."""
    return stage_of(read_result(models.layout, run.name), stage).get("state") == "finished"


def pack_task(models: Models, run: Run, stage: str) -> Task:
    """The result of a stage in small files."""
    out, limit = models.layout.packed(run.name, stage), models.experiment.pack.parts_mb

    def done() -> bool:
        # Once the run's own result is packed, nobody needs that of its first stage.
        last = models.layout.packed(run.name, last_stage(run))
        return any((folder / MANIFEST).is_file() for folder in (out, last))

    def command() -> list[str]:
        model = str(models.layout.model(run.name, stage))
        start = [sys.executable, "-m", "benchmarks.training.packing", "pack"]
        return [*start, models.teacher, model, str(out), "--parts-mb", str(limit)]

    def ended(_log: Path, _seconds: float) -> None:
        stages = list(run.stages)
        for earlier in stages[: stages.index(stage)]:
            shutil.rmtree(models.layout.packed(run.name, earlier), ignore_errors=True)

    def lost() -> bool:
        return _noted(models, run, stage) and not models.layout.model(run.name, stage).is_dir()

    name = task_name(run.name, stage)
    return Task(f"{name}@pack", "pack", run.name, (name,), done, command, ended, noted=lost)
