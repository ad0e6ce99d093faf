"""What a training experiment is: the schema of its YAML file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from training.config import Config, option
from training.options import config_from_dict, set_option
from vllm_attnedit.edit import EditPlan, parse_full_layers

TEACHER = "teacher"
DEFAULT, CHOSEN = "default", "chosen"


@dataclass(kw_only=True)
class Student:
    """How the edited model is made before it trains: options of ``attnedit edit``."""

    target: Literal["gateswa", "mla"] = option("of the edit")
    init: Literal["inherit", "random"] = option("of the edited attention", "inherit")
    window: int | None = option("GateSWA: tokens a window layer sees; default 128", None)
    full_layers: str = option(
        "GateSWA: default (every 6th), chosen (by calibration NLL, see options.choose) or indices "
        "such as 5,11,17",
        DEFAULT,
    )
    gate: Literal["headwise", "elementwise", "none"] | None = option("default by target", None)
    kv_lora_rank: int | None = option("MLA: width of the latent", None)
    qk_rope_head_dim: int | None = option("MLA: width of the RoPE key", None)
    qk_nope_head_dim: int | None = option("MLA: a head's width without position", None)
    calibration: str | None = option("MLA, inherit: text file; default: built in", None)
    calibration_tokens: int | None = option("of that text", None)
    calibration_device: str | None = option("where the teacher reads it; default cpu", None)
    seed: int = option("of random weights", 0)

    def layers(self, chosen: Sequence[int] | None) -> tuple[int, ...] | None:
        """Full layers by index; ``None`` for the default ones."""
        if self.full_layers == DEFAULT:
            return None
        if self.full_layers == CHOSEN:
            return tuple(chosen or (0,))
        return parse_full_layers(self.full_layers)

    def plan(self, chosen: Sequence[int] | None = None) -> EditPlan:
        """The edit.

        Raises:
            AttnEditError: for options that do not go together.
        """
        values = asdict(self)
        for name in ("calibration", "calibration_tokens", "calibration_device"):
            values.pop(name)
        values["full_layers"] = self.layers(chosen)
        return EditPlan(**values)


@dataclass(kw_only=True)
class Stage1:
    """Layer-wise stage of a run."""

    tokens: float = option("of the stage")
    lr: float = option("peak learning rate")
    options: dict[str, Any] = option("further training options by dotted name", dict)


@dataclass(kw_only=True)
class Stage2:
    """Model-level stage of a run."""

    tokens: float = option("of the stage")
    lr: float = option("peak learning rate")
    cosine_weight: float = option("of the hidden states' term", 0.0)
    options: dict[str, Any] = option("further training options by dotted name", dict)


@dataclass(kw_only=True)
class Run:
    """One training run: an edit or another run's result, Stage 1, Stage 2, a measurement.

    It starts from one of ``student``, ``edit`` and ``after``.
    """

    name: str = option("of the run, its folders and its rows")
    student: Student | None = option("the edit to make and start from", None)
    edit: str | None = option("the file of an edit to start from instead", None)
    after: str | None = option("an earlier run to start from instead", None)
    stage1: Stage1 | None = option("default: none", None)
    stage2: Stage2 | None = option("default: none", None)
    evaluate: list[Literal["text", "passkey", "tasks"]] = option(
        "what is measured of it, by options.evaluate", lambda: ["text", "passkey", "tasks"]
    )
    untrained: list[Literal["text", "passkey", "tasks"]] = option(
        "what is measured of its student before training", list
    )

    @property
    def stages(self) -> dict[str, Stage1 | Stage2]:
        """The stages it has, in order."""
        found = {"stage1": self.stage1, "stage2": self.stage2}
        return {name: stage for name, stage in found.items() if stage is not None}


@dataclass(kw_only=True)
class Baseline:
    """A rival that needs no training: the teacher under windows."""

    name: str = option("of its rows")
    window: int = option("tokens a window layer sees", 128)
    full_layers: str = option("as of a student", DEFAULT)
    sinks: int = option("first tokens that window layers always see", 0)
    evaluate: list[Literal["text", "passkey", "tasks"]] = option(
        "what is measured of it", lambda: ["text", "passkey", "tasks"]
    )


@dataclass(kw_only=True)
class Pack:
    """Results in small files, to be carried away."""

    keep: Literal["results", "all", "none"] = option(
        "results: the edit of every finished run; all: also the result of Stage 1, and the state "
        "of a run that ran out of time (without AdamW's moments); none",
        "results",
    )
    parts_mb: float = option("MiB that no file exceeds", 15.5)


@dataclass(kw_only=True)
class Seconds:
    """What a budget sets aside until better is known: longer times that were seen replace them."""

    start: float = option("for a stage to load its models and take its first steps", 90.0)
    save: float = option("for a stage to save", 25.0)
    tokenize: float = option("for tokenising the sources, unless the shards are there", 300.0)
    edit: float = option("for an edit", 90.0)
    choose: float = option("for the choice of full layers", 180.0)
    pack: float = option("for packing", 45.0)
    text: float = option("for measuring texts of one model", 120.0)
    passkey: float = option("for passkey retrieval of one model", 60.0)
    tasks: float = option("for tasks of one model at one number of examples", 240.0)
    report: float = option("for the report", 20.0)


@dataclass(kw_only=True)
class Experiment:
    """Several training runs that are compared."""

    options: dict[str, Any] = option("a training configuration for all runs; see training/configs")
    runs: list[Run] = option("in the order in which they are done")
    baselines: list[Baseline] = option("training-free rivals", list)
    measure_in: Literal["fp32", "tf32", "bf16"] = option("numbers of measurements", "fp32")
    pack: Pack = option("what can be carried away", Pack)
    seconds: Seconds = option("set aside of a budget", Seconds)

    def config(self, output: Path, *sections: dict[str, Any]) -> Config:
        """The shared configuration with sections on top, for an output folder."""
        data = copy.deepcopy(self.options) | {"output": str(output)}
        for section in sections:
            for name, value in section.items():
                set_option(data, name, value)
        return config_from_dict(data)

    def stage_config(self, run: Run, stage: str, student: Path, output: Path) -> Config:
        """The configuration of a run's stage."""
        spec = run.stages[stage]
        values = {"optim.tokens": spec.tokens, f"{stage}.lr": spec.lr, "student": str(student)}
        if isinstance(spec, Stage2):
            values["stage2.cosine_weight"] = spec.cosine_weight
        return self.config(output, values, spec.options, {"checkpoint.export": "checkpoint"})

    def measure_config(self, output: Path) -> Config:
        """The configuration of measurements."""
        return self.config(output, {"run.precision": self.measure_in, "evaluate.models": {}})
