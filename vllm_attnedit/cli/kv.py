"""``attnedit kv``: what the KV cache of a checkpoint takes, against its teacher."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_attnedit.cli.given import refuse_others
from vllm_attnedit.cli.kv_live import Reading, show_server
from vllm_attnedit.cli.quantities import format_bytes, parse_bytes, parse_counts
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.kv_report import build_report

_ARGUMENTS_OF_ACCOUNTING = ("tp", "pp", "kv_dtype", "block_size")


def command(
    context: typer.Context,
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint folder, config.json or hub id, of an edited model or a teacher. "
            "With --server, the one that it serves; by default where the server loaded it from."
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(help="Read a running vLLM server, as http://localhost:8000."),
    ] = None,
    watch: Annotated[
        float | None, typer.Option(help="With --server: read again every so many seconds.")
    ] = None,
    pages: Annotated[
        str | None,
        typer.Option(
            help="With --server: its pages of window layers, packed or separate, where neither "
            "its gauge nor the size of its pool tells them."
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Compare with this one instead of the model that was edited."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="For a teacher: preview an edit, gateswa or mla. Repeatable."),
    ] = None,
    length: Annotated[
        list[str] | None,
        typer.Option(help="Tokens of a request, as 8192 or 8K. Repeatable; 8192 by default."),
    ] = None,
    tp: Annotated[
        list[str] | None,
        typer.Option(help="Tensor-parallel GPUs, as 4 or 1,2,4. Repeatable; 1 by default."),
    ] = None,
    pp: Annotated[int, typer.Option(help="Pipeline stages; the fullest one is shown.")] = 1,
    memory: Annotated[
        str | None,
        typer.Option(help="KV memory of a GPU, as 40GiB: show how many requests fit."),
    ] = None,
    kv_dtype: Annotated[
        str, typer.Option(help="auto (that of the model, 16 bits), bf16, fp16, fp32 or fp8.")
    ] = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens a KV block.")] = 16,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: see vllm_attnedit.kv_report.")
    ] = False,
) -> None:
    """Show KV-cache memory per token, per request and per GPU, by formula.

    Window layers hold a bounded number of tokens: they are left out of the bytes per token and
    counted in the bytes per request. With --server, show what a running server holds right now
    beside the formula.
    """
    tps = parse_counts("--tp", tp or ["1"])
    with _options_named():
        if server is not None:
            taken = ("--watch", "--pages", "--tp", "--kv-dtype", "--json")
            refuse_others(context, "--server", taken)
            if len(tps) > 1:
                raise AttnEditError("--tp", ",".join(tp or ()), "give the server's own, one number")
            reading = Reading(tp=tps[0], kv_dtype=kv_dtype, pages=pages or "auto")
            show_server(server, checkpoint, reading, as_json=as_json, watch=watch)
            return
        for name, value in (("--watch", watch), ("--pages", pages)):
            if value is not None:
                raise AttnEditError(name, value, "give it with --server")
        if checkpoint is None:
            raise AttnEditError("CHECKPOINT", "missing", "name one, or a server: --server URL")
        report = build_report(
            checkpoint,
            teacher=teacher,
            targets=target or [],
            lengths=parse_counts("--length", length or ["8192"]),
            tps=tps,
            pp=pp,
            memory=None if memory is None else parse_bytes("--memory", memory),
            kv_dtype=kv_dtype,
            block_size=block_size,
        )
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_report(report, Console())


@contextmanager
def _options_named() -> Iterator[None]:
    """Bad input to the accounting is an option here: name it as the user typed it."""
    try:
        yield
    except AttnEditError as error:
        if error.field not in _ARGUMENTS_OF_ACCOUNTING:
            raise
        option = "--" + error.field.replace("_", "-")
        raise AttnEditError(option, error.value, error.fix) from error


def _print_report(report: dict[str, Any], console: Console) -> None:
    models = report["models"]
    for model in models:
        counts = ", ".join(f"{count} {kind}" for kind, count in model["layers"].items())
        window = f", window {model['sliding_window']}" if model["sliding_window"] else ""
        console.print(f"[bold]{model['name']}[/bold]: {counts}{window}", highlight=False)

    console.print(
        "\nKV bytes per token and GPU, long-context limit (+ full windows, once a request)"
    )
    console.print(_per_token(models))
    console.print(f"\nKV memory per request and GPU, in blocks of {report['block_size']} tokens")
    console.print(_per_request(models, _memory_cell))
    if report["memory_bytes"] is not None:
        memory = format_bytes(report["memory_bytes"])
        console.print(f"\nRequests that fit in {memory} of KV memory on each GPU")
        console.print(_per_request(models, lambda request: f"{request['fit']:,}"))
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="red", highlight=False, soft_wrap=True)


def _per_token(models: list[dict[str, Any]]) -> Table:
    table = _table(["TP"], models)
    for row in zip(*(model["per_gpu"] for model in models), strict=True):
        table.add_row(str(row[0]["tp"]), *(_token_cell(gpu) for gpu in row))
    return table


def _per_request(models: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> Table:
    table = _table(["tokens", "TP"], models)
    for gpus in zip(*(model["per_gpu"] for model in models), strict=True):
        for row in zip(*(gpu["requests"] for gpu in gpus), strict=True):
            length = f"{row[0]['length']:,}"
            table.add_row(length, str(gpus[0]["tp"]), *(cell(request) for request in row))
    return table


def _table(keys: list[str], models: list[dict[str, Any]]) -> Table:
    table = Table()
    for name in (*keys, *(model["name"] for model in models)):
        table.add_column(name, justify="right")
    return table


def _token_cell(gpu: dict[str, Any]) -> str:
    windows = f" + {format_bytes(gpu['window_bytes'])}" if gpu["window_bytes"] else ""
    return f"{gpu['bytes_per_token']:,} B{windows}{_change(gpu['reduction'])}"


def _memory_cell(request: dict[str, Any]) -> str:
    return f"{format_bytes(request['block_bytes'])}{_change(request['reduction'])}"


def _change(reduction: float | None) -> str:
    """The change against the teacher: what is saved is a minus, as in published tables."""
    if reduction is None:
        return ""
    colour = "red" if reduction < 0 else "green"
    return f" [{colour}]{-100 * reduction:+.1f}%[/{colour}]"
