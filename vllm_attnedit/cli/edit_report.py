"""What ``attnedit edit`` says of the checkpoint it made."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from vllm_attnedit.cli.quantities import format_bytes
from vllm_attnedit.edit import EditReport


def print_report(report: EditReport, console: Console) -> None:
    """What was made: attention by kind, and for MLA the energy each layer keeps."""
    config = report.config
    origin = config.provenance["teacher"]
    console.print(f"[bold]{report.out}[/bold]: {origin} edited, {format_bytes(report.nbytes)}")
    window = config.edit.sliding_window
    counts = Counter(config.edit.layer_types)
    for kind, count in counts.items():
        reach = f", window {window}" if kind == "sliding_attention" else ""
        console.print(f"  {count} {kind} layers{reach}")
    console.print(f"  gate: {config.edit.gate or 'none'}, init: {config.provenance['init']}")
    if not report.energy:
        return
    table = Table("layer", "keys kept", "values kept")
    for layer in report.energy:
        table.add_row(str(layer.layer), f"{layer.key:.2%}", f"{layer.value:.2%}")
    mean = config.provenance["energy_kept"]
    table.add_section()
    table.add_row("mean", f"{mean['key']:.2%}", f"{mean['value']:.2%}")
    for column in table.columns:
        column.justify = "right"
    console.print(table)
    console.print(
        f"  latent {config.edit.kv_lora_rank} + RoPE key {config.edit.qk_rope_head_dim}: share of "
        "the teacher's key and value energy that they can express, rotation lost not counted"
    )
