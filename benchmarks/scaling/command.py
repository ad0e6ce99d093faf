"""``python -m benchmarks training-scaling``: from options to runs to a result."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.scaling.material import make_material
from benchmarks.scaling.report import rows, table
from benchmarks.scaling.runs import Scaling, run_all
from training.config import Config
from training.options import apply_overrides, config_from_dict, load_config
from vllm_attnedit.errors import AttnEditError

MICRO_BATCH = 4


def make_config(
    source: str | Path,
    overrides: Sequence[str],
    *,
    target: str,
    layers: int | None,
    devices: int,
    steps: int,
    tail: int,
    out: Path,
) -> Config:
    """The configuration that all runs share.

    Args:
        source: a model's name, whose weights and text are made up, or a training configuration.
        overrides: further training options, ``--key value``.
        target, layers: of a made-up model.
        devices: of the sharded runs.
        steps: of a whole run; ``tail`` of them are taken anew.
        out: folder of what is made up.
    """
    if isinstance(source, Path):
        config = load_config(source, overrides)
    else:
        # The text's length is an option like any other, but the text comes before the rest.
        data: dict[str, Any] = {"teacher": "", "output": "", "data": {"sequence_length": 2048}}
        # Gentler than on real weights: rounding must not be amplified by steps that overshoot.
        data["optim"] = {"micro_batch": MICRO_BATCH, "batch": MICRO_BATCH * devices, "warmup": 0.1}
        data["stage2"] = {"lr": 1e-4}
        data["run"] = {"deterministic": False}
        apply_overrides(data, overrides)
        asked = config_from_dict(data)
        length = asked.data.sequence_length
        tokens = steps * asked.optim.batch * length
        made = make_material(
            source, out / "material", target=target, length=length, tokens=tokens, layers=layers
        )
        config = config_from_dict({**data, **made})
    config.output = str(out / "runs" / "by-hand")
    config.optim.tokens = steps * config.optim.batch * config.data.sequence_length
    kept = config.checkpoint
    # Checkpoints that are compared must stay, also beside those of runs that were interrupted.
    kept.every_steps, kept.every_minutes, kept.keep = steps - tail, None, 1000
    kept.weights, kept.optimizer, kept.resume, kept.export = "fp32", "fp32", "auto", "none"
    config.log.tensorboard = config.log.curves = False
    return config


def compare(
    source: str | Path,
    overrides: Sequence[str],
    *,
    target: str,
    layers: int | None,
    devices: int,
    steps: int,
    tail: int,
    tolerance: float,
    out: Path,
    result: Path,
    budget_s: float | None,
    only: Collection[str] = (),
) -> dict[str, Any]:
    """Do what is left of the comparison, and write what there is of its result.

    Returns:
        ``complete``, the number of ``rows`` and where they are.

    Raises:
        AttnEditError: for options that do not fit.
        CommandFailed: if a run fails.
    """
    began = time.monotonic()
    config = make_config(
        source, overrides, target=target, layers=layers, devices=devices, steps=steps, tail=tail,
        out=out,
    )  # fmt: skip
    scaling = Scaling(config, devices, steps, tail, out)
    complete = False
    try:
        # Making up a large model takes a part of it.
        left = None if budget_s is None else budget_s - (time.monotonic() - began)
        complete = run_all(scaling, left, only)
    finally:
        label = f"{source} {target}" if isinstance(source, str) else source.stem
        found = rows(scaling, label, tolerance)
        document = {"provenance": provenance(apart=True), "complete": complete, "rows": found}
        if found:
            result.parent.mkdir(parents=True, exist_ok=True)
            result.write_text(json.dumps(document, indent=1) + "\n")
            print(table(found))
    return {"complete": complete, "rows": len(found), "result": str(result)}


def source_of(model: str | None, config: Path | None) -> str | Path:
    """What is trained: exactly one of the two.

    Raises:
        AttnEditError: otherwise.
    """
    if (model is None) == (config is None):
        fix = "give either a model, whose weights are made up, or a training configuration"
        raise AttnEditError("--model and --config", f"{model}, {config}", fix)
    if config is not None:
        return config
    assert model is not None
    return model
