"""``attnedit inspect``: what an edited checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_attnedit.cli.quantities import format_bytes
from vllm_attnedit.inspection import inspect_checkpoint

_SHOWN_PROBLEMS = 10


def command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of an edited checkpoint.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: see vllm_attnedit.inspection.")
    ] = False,
) -> None:
    """Show the layers, sizes and origin of an edited checkpoint, without loading a tensor.

    Ends with 1 if tensors are missing, unexpected or misshapen.
    """
    report = inspect_checkpoint(checkpoint)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_report(report, Console(highlight=False))
    if report["problems"]:
        raise typer.Exit(1)


def describe_run(run: dict[str, Any]) -> str:
    """One run of equal layers in words: ``0-4 sliding_attention W128 headwise gate``."""
    first, last = run["first"], run["last"]
    words = [str(first) if first == last else f"{first}-{last}", run["layer_type"]]
    if "sliding_window" in run:
        words.append(f"W{run['sliding_window']}")
    if "kv_lora_rank" in run:
        words.append(f"latent {run['kv_lora_rank']} + RoPE key {run['qk_rope_head_dim']},")
        words.append(f"heads {run['qk_nope_head_dim']} + {run['qk_rope_head_dim']}")
        words.append(f"(value {run['v_head_dim']})")
        if run["q_lora_rank"] is not None:
            words.append(f"query rank {run['q_lora_rank']}")
    words.append("no gate" if run["gate"] is None else f"{run['gate']} gate")
    return " ".join(words)


def _print_report(report: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{report['checkpoint']}[/bold]: edited {report['base_model_type']}")
    console.print("\nLayers")
    for run in report["layers"]:
        console.print(f"  {describe_run(run)}")

    sizes = Table("", "parameters", "bytes")
    for column in sizes.columns[1:]:
        column.justify = "right"
    for part in ("attention", "rest", "total"):
        nbytes = format_bytes(report["bytes"][part])
        sizes.add_row(part, f"{report['parameters'][part]:,}", nbytes)
    console.print()
    console.print(sizes)
    console.print("stored as " + ", ".join(f"{k} ({v:,})" for k, v in report["dtypes"].items()))

    for title in ("added", "removed"):
        console.print(f"\n{title.capitalize()} against the teacher")
        for item in report[title]:
            console.print(
                f"  {item['tensor']} in {item['count']} layers, {item['parameters']:,} parameters"
            )
        if not report[title]:
            console.print("  nothing")

    console.print("\nProvenance")
    for name, value in report["provenance"].items():
        shown = value if isinstance(value, str) else json.dumps(value)
        console.print(f"  {name}: {shown}", markup=False)
    if not report["provenance"]:
        console.print("  none recorded")
    console.print("\nFiles")
    for file in report["files"]:
        console.print(f"  {file['name']}  {format_bytes(file['bytes'])}", markup=False)

    problems = report["problems"]
    for problem in problems[:_SHOWN_PROBLEMS]:
        console.print(f"problem: {problem}", style="red", markup=False)
    if len(problems) > _SHOWN_PROBLEMS:
        console.print(f"problem: and {len(problems) - _SHOWN_PROBLEMS} more", style="red")
