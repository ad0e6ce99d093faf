"""``python -m benchmarks training-scaling``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from examples.quickstart.processes import stop_on_signals


def training_scaling(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Dimensions of benchmarks.models; weights are made up.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Or a configuration of Stage 2: see training/configs.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="To compare with one; all of the machine by default.")
    ] = None,
    target: Annotated[str, typer.Option(help="Of a made-up model: gateswa or mla.")] = "gateswa",
    layers: Annotated[
        int | None, typer.Option(help="Of a made-up model, for a quick try; its own by default.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of a whole run.")] = 200,
    tail: Annotated[
        int | None,
        typer.Option(help="Last steps, taken anew from the other's checkpoint; a tenth of all."),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Of the loss, in nats.")] = 1e-3,
    budget: Annotated[
        float | None, typer.Option(help="Save and stop in time for so many seconds from now.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this run now, as one, on a device of its own. Repeatable."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for runs; what is there is not done again.")
    ] = Path(".cache/benchmarks/training-scaling"),
    result: Annotated[
        Path | None, typer.Option(help="JSON file of the result; <out>/result.json by default.")
    ] = None,
) -> None:
    """Stage 2 on one device and sharded over several: losses, speed, exchanged checkpoints.

    Any training option can follow, as --optim.batch 16 --run.compile true.
    """
    from benchmarks.scaling.command import compare, source_of
    from benchmarks.serving.spread import count_devices
    from examples.quickstart.processes import CommandFailed

    source = source_of(model, config)
    stop_on_signals()
    try:
        summary = compare(
            source,
            context.args,
            target=target,
            layers=layers,
            devices=count_devices("--devices") if devices is None else devices,
            steps=steps,
            tail=max(1, steps // 10) if tail is None else tail,
            tolerance=tolerance,
            out=out,
            result=result or out / "result.json",
            budget_s=budget,
            only=only or (),
        )
    except CommandFailed as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    print(json.dumps(summary))
