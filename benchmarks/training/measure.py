"""Measures one model on one part of an evaluation, so that what is measured stays measured.

A part is texts, passkey retrieval, or tasks at one number of examples. Its values are kept with
those of every question: the teacher's, measured once, pair with everybody's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from training.config import Config, PasskeyConfig
from training.evaluation.intervals import Estimate
from training.evaluation.rows import Measurement, Table
from training.evaluation.suite import Suite
from training.evaluation.variants import Variant, load_with_sinks
from training.files import digest, write_json
from training.layer_choice import window_edit
from training.models import load_student, load_teacher, load_tokenizer, teacher_source
from training.options import config_from_dict
from training.parallel import Devices
from vllm_attnedit.edit.patterns import DEFAULT_WINDOW, default_full_layers
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.hf import AttnEditForCausalLM


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        config: a training configuration, for its teacher and its evaluation.
        kind: ``teacher``, a trained or untrained ``model``, or the teacher under ``windows``.
        name: of the model in rows.
        source: folder of a ``model``.
        window, full, sinks: of ``windows``; ``full`` are layers, by default every sixth.
        part: ``text``, ``passkey`` or ``tasks-N`` with N examples.
        out: JSON file.
    """

    config: dict[str, Any]
    kind: Literal["teacher", "model", "windows"]
    name: str
    part: str
    out: str
    source: str | None = None
    window: int | None = None
    full: tuple[int, ...] | None = None
    sinks: int = 0


def parts_of(config: Config, kinds: Sequence[str]) -> list[str]:
    """The parts of an evaluation that has something to measure."""
    how, found = config.evaluate, []
    if "text" in kinds and how.perplexity:
        found.append("text")
    if "passkey" in kinds and how.passkey.lengths:
        found.append("passkey")
    if "tasks" in kinds and how.tasks:
        found += [f"tasks-{shots}" for shots in how.fewshot]
    return found


def restrict(config: Config, part: str) -> None:
    """Leave nothing but a part in an evaluation."""
    how = config.evaluate
    if part != "text":
        how.perplexity = {}
    if part != "passkey":
        how.passkey = PasskeyConfig()
    how.fewshot = [int(part.removeprefix("tasks-"))] if part.startswith("tasks-") else []
    if not how.fewshot:
        how.tasks = []


def settings(config: Config, part: str) -> str:
    """A digest of what decides a part's numbers, wherever its files are."""
    how = config.evaluate
    about: dict[str, Any] = {"part": part, "precision": config.run.precision}
    if part == "text":
        about |= {"texts": sorted(how.perplexity), "lengths": how.lengths}
        about |= {"agreement": how.agreement_length, "windows": how.max_windows}
    elif part == "passkey":
        about |= asdict(how.passkey)
    else:
        about |= {"tasks": how.tasks, "limit": how.limit, "seed": config.seed}
    return digest(about)


class _Recorder(Table):
    """Keeps measurements themselves; their rows are made when the teacher's are at hand."""

    def __init__(self) -> None:
        super().__init__("")
        self.kept: list[dict[str, Any]] = []

    def add(self, variant: Variant, measurement: Measurement) -> None:
        """Keep a measurement."""
        self.kept.append(asdict(measurement))

    def add_task_mean(
        self, variant: Variant, shots: int, measurements: Sequence[Measurement]
    ) -> None:
        """The mean is made anew from the tasks."""


def restore(kept: dict[str, Any]) -> Measurement:
    """A measurement from its plain form."""
    fields = kept | {"estimate": Estimate(**kept["estimate"]), "samples": tuple(kept["samples"])}
    return Measurement(**fields)


def measure(job: Job) -> None:
    """Measure, and write ``job.out``.

    Raises:
        AttnEditError: for everything a user can mend.
    """
    config = config_from_dict(job.config)
    stamp = settings(config, job.part)
    restrict(config, job.part)
    devices = Devices(config.run, config.seed)
    suite = Suite(config, devices, load_tokenizer(config.teacher))
    suite.check()
    suite.table = recorder = _Recorder()
    dtype, device = devices.compute_dtype, devices.device

    def plain() -> AttnEditForCausalLM:
        return load_teacher(config.teacher, dtype=dtype).to(device)

    def load() -> AttnEditForCausalLM:
        if job.kind == "teacher":
            return plain()
        if job.kind == "model":
            return load_student(str(job.source), dtype=dtype).to(device)
        with teacher_source(config.teacher) as opened:
            layers = int(opened.config.num_hidden_layers)
        full = default_full_layers(layers) if job.full is None else tuple(job.full)
        edit = window_edit(layers, full, job.window or DEFAULT_WINDOW)
        return load_with_sinks(config.teacher, edit, job.sinks, dtype).to(device)

    model = load()
    teacher = plain() if job.part == "text" and job.kind != "teacher" else model
    suite.measure(Variant(job.name, job.name, lambda: model, {}), model, teacher)
    out = Path(job.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"name": job.name, "part": job.part, "settings": stamp, "device": devices.name}
    write_json(out, about | {"measurements": recorder.kept})


def main() -> None:
    """``python -m benchmarks.training.measure JOB.json``."""
    try:
        measure(Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    except AttnEditError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
