"""``attnedit kv --server``: a running server's KV memory, once or again and again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vllm_attnedit.checkpoint import load_config
from vllm_attnedit.cli.quantities import format_bytes
from vllm_attnedit.config import AttnEditConfig
from vllm_attnedit.errors import AttnEditError
from vllm_attnedit.kv_live import build_live_report
from vllm_attnedit.kv_server import connect, read_model_root, read_state

_SPLIT = {
    "measured": "blocks of each kind measured by the engine",
    "derived": "blocks of each kind derived from the total; for measured ones start the server "
    "with PROMETHEUS_MULTIPROC_DIR set to an empty folder",
    "one kind": "all layers are of one kind",
}


@dataclass(frozen=True)
class Reading:
    """What a server does not say of itself: see :func:`build_live_report`."""

    tp: int
    kv_dtype: str
    pages: str


def show_server(
    url: str,
    checkpoint: str | None,
    reading: Reading,
    *,
    as_json: bool,
    watch: float | None,
) -> None:
    """Print one reading, or with ``watch`` (seconds) one after the other until interrupted.

    Raises:
        AttnEditError: for a server that cannot be read or does not serve an edited model.
    """
    if watch is not None and watch <= 0:
        raise AttnEditError("--watch", watch, "give seconds > 0")
    with connect(url) as client:
        read_state(client)  # a wrong address is the first thing to say
        config = _edited_config(client, checkpoint)
        if as_json:
            for report in _readings(client, config, reading, watch):
                typer.echo(json.dumps(report, indent=2 if watch is None else None))
        elif watch is None:
            (report,) = _readings(client, config, reading, watch)
            Console().print(_tables(report))
        else:
            with Live(auto_refresh=False) as live:
                for report in _readings(client, config, reading, watch):
                    live.update(_tables(report), refresh=True)


def _edited_config(client: httpx.Client, checkpoint: str | None) -> AttnEditConfig:
    source = read_model_root(client) if checkpoint is None else checkpoint
    try:
        config = load_config(source, "checkpoint")
    except AttnEditError as error:
        if checkpoint is not None or error.field != "checkpoint":
            raise
        fix = "name the checkpoint that it serves: attnedit kv CHECKPOINT --server URL"
        raise AttnEditError("the server's model", source, f"is not to be found here; {fix}") from (
            error
        )
    if not isinstance(config, AttnEditConfig):
        fix = "this is not an edited model: all its layers hold all tokens; serve an edited one"
        raise AttnEditError("the server's model", source, fix)
    return config


def _readings(
    client: httpx.Client, config: AttnEditConfig, reading: Reading, watch: float | None
) -> Iterator[dict[str, Any]]:
    while True:
        state = read_state(client)
        yield {
            "server": str(client.base_url),
            **build_live_report(config, state, **asdict(reading)),
        }
        if watch is None:
            return
        time.sleep(watch)


def _tables(report: dict[str, Any]) -> Group:
    head = (
        f"[bold]{report['server']}[/bold]: {report['running']:,} running, "
        f"{report['waiting']:,} waiting; {report['blocks_in_use']:,} of {report['num_blocks']:,} "
        f"blocks in use, {format_bytes(report['bytes_in_use'])} of "
        f"{format_bytes(report['pool_bytes'])} a GPU"
    )
    tokens = report["tokens_per_request"]
    table = Table()
    table.add_column("kind of layers")
    formula = f"by formula, {_count(tokens)} tokens a request" if any(tokens) else "by formula"
    for name in ("layers", "groups", "blocks in use", "bytes", formula):
        table.add_column(name, justify="right")
    for group in report["groups"]:
        table.add_row(
            group["kind"],
            str(group["layers"]),
            str(group["groups"]),
            _count(group["blocks"]),
            _bytes(group["bytes"]),
            f"{group['formula_blocks']:,} blocks, {format_bytes(group['formula_bytes'])}",
        )
    lines: list[Any] = [head, table]
    if report["formula_reduction"] is not None:
        lines.append(
            f"full attention would hold {_bytes(report['teacher_bytes'])} for the same tokens: "
            f"[green]{_share(report['reduction'])}[/green] saved, "
            f"{report['formula_reduction']:.1%} by formula"
        )
    pages = f"; {report['pages']} pages of window layers" if report["pages"] else ""
    lines.append(_SPLIT[report["split"]] + pages)
    lines += [Text(f"warning: {warning}", style="red") for warning in report["warnings"]]
    return Group(*lines)


def _interval(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _count(interval: list[float]) -> str:
    return _interval(*(f"{value:,.0f}" for value in interval))


def _bytes(interval: list[float]) -> str:
    return _interval(*(format_bytes(round(value)) for value in interval))


def _share(interval: list[float]) -> str:
    return _interval(*(f"{value:.1%}" for value in interval))
