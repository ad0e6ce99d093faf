"""``attnedit verify``: whether vLLM computes what the reference model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_attnedit.verification import ServingError
from vllm_attnedit.verification.run import verify_checkpoint


def command(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file, a prompt a line; by default prose around the window."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, on both sides.")] = "float32",
    logprob_tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest difference of log-probabilities that passes; by default 0.001 in "
            "float32, and 0.25 in bfloat16, where right models round differently."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: see vllm_attnedit.verification.run.")
    ] = False,
) -> None:
    """Compare a checkpoint in the reference model and in vLLM, on this machine.

    Greedy tokens must be equal and log-probabilities within the tolerance, for prompts shorter
    than, equal to and several times longer than the window, which vLLM reads in chunks. Two tokens
    that the reference itself holds to be closer than the tolerance are a tie and no failure. Ends
    with 1 if the two disagree or vLLM fails.
    """
    progress = Console(stderr=True, quiet=as_json)
    try:
        report = verify_checkpoint(
            checkpoint,
            prompts=prompts,
            tokens=tokens,
            dtype=dtype,
            logprob_tolerance=logprob_tolerance,
            stage=progress.status,
        )
    except ServingError as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_report(report, Console(highlight=False, soft_wrap=True))
    if not report["ok"]:
        raise typer.Exit(1)


def _print_report(report: dict[str, Any], console: Console) -> None:
    window = report["sliding_window"]
    console.print(
        f"[bold]{report['checkpoint']}[/bold] in {report['dtype']}, "
        + (f"window {window}, " if window else "no window, ")
        + f"read in chunks of {report['max_num_batched_tokens']} tokens"
    )
    table = Table("prompt", "greedy tokens equal", "Δ logprob decoding", "Δ logprob reading", "")
    for prompt in report["prompts"]:
        table.add_row(
            _length(prompt["prompt_tokens"], window),
            f"{prompt['equal_steps']} of {prompt['steps']}"
            + (", then a tie" if prompt["tie"] else ""),
            f"{prompt['decode_error']:.1e}",
            f"{prompt['read_error']:.1e}",
            "[green]ok[/green]" if prompt["ok"] else "[red]differs[/red]",
        )
    console.print(table)
    for prompt in report["prompts"]:
        name = f"prompt of {prompt['prompt_tokens']} tokens"
        if prompt["tie"]:
            console.print(
                f"{name}: greedy tokens part at {prompt['equal_steps']}, a near-tie: the reference "
                f"holds the two to be closer than {report['logprob_tolerance']:g}"
            )
        for failure in prompt["failures"]:
            console.print(f"{name}: {failure}", style="red", markup=False)


def _length(tokens: int, window: int | None) -> str:
    if window is None:
        return str(tokens)
    relation = "<" if tokens < window else "=" if tokens == window else ">"
    return f"{tokens} {relation} W"
