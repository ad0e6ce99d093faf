"""``python -m benchmarks training``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def training(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="YAML: see benchmarks/training/experiments.")],
    out: Annotated[Path, typer.Option(help="Folder of results; what is there is not done again.")],
    work: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints and logs; <out>/work by default.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds in which this call ends, report included.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this run or baseline now. Repeatable.")
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="Such as 0,1: a worker for each, on different runs.")
    ] = None,
    report_only: Annotated[
        bool, typer.Option(help="Do nothing; write the report of what is there.")
    ] = False,
) -> None:
    """Runs of Stage 1 and 2 with their baselines: the same command again does what is left.

    Any training option can follow, as --teacher FOLDER --data.shards FOLDER.
    """
    from benchmarks.training.command import run_experiment

    summary = run_experiment(
        config,
        out,
        work=work,
        budget_s=budget,
        only=only or (),
        devices=devices,
        overrides=context.args,
        report_only=report_only,
    )
    print(json.dumps(summary))
    if summary["failed"]:
        raise typer.Exit(1)
