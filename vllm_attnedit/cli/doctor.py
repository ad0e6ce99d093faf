"""``attnedit doctor``: whether this installation can serve edited models, and how to mend it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from vllm_attnedit.doctor import ASCEND_CHECKS, CHECKS, DEVICES, Finding, Host
from vllm_attnedit.errors import AttnEditError

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def command(
    device: Annotated[
        str | None,
        typer.Option(help="What you mean to serve on: cpu, cuda or npu; by default vLLM's choice."),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON: ok, and checks with name, status, message, mend."),
    ] = False,
) -> None:
    """Check the installation. Ends with 1 if a check fails; takes up to a minute."""
    if device is not None and device not in DEVICES:
        raise AttnEditError("--device", device, f"use one of {', '.join(DEVICES)}")
    findings = _run(Host(device=device), quiet=as_json)
    failed = any(finding.status == "fail" for finding in findings.values())
    if as_json:
        checks = [{"name": name, **asdict(finding)} for name, finding in findings.items()]
        typer.echo(json.dumps({"ok": not failed, "checks": checks}, indent=2))
    if failed:
        raise typer.Exit(1)


def _run(host: Host, *, quiet: bool) -> dict[str, Finding]:
    console = Console(quiet=quiet, highlight=False)
    findings = {}
    for name, check in CHECKS + (ASCEND_CHECKS if host.device == "npu" else ()):
        with console.status(f"checking {name}"):
            finding = findings[name] = check(host)
        console.print(f"[{_COLOURS[finding.status]}]{finding.status:4}[/]", end="  ")
        console.print(f"{name}: {finding.message}", markup=False, soft_wrap=True)
        if finding.mend is not None:
            console.print(f"      to mend: {finding.mend}", markup=False, soft_wrap=True)
    return findings
