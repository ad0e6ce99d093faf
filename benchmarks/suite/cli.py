"""``python -m benchmarks suite``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.names import check_known
from examples.quickstart.processes import stop_on_signals
from vllm_attnedit.errors import AttnEditError


def suite(
    file: Annotated[Path, typer.Argument(help="YAML: see benchmarks/suite/configs.")],
    out: Annotated[Path, typer.Option(help="Folder of results; what is done is not done again.")],
    budget: Annotated[
        float | None, typer.Option(help="Seconds in which this call ends; what is left waits.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this job now. Repeatable.")] = None,
    devices: Annotated[
        str | None, typer.Option(help="Such as 0,1; all GPUs of the machine by default.")
    ] = None,
) -> None:
    """Many measurements at once: each job on devices of its own, in the time there is."""
    from benchmarks.serving.spread import count_devices
    from benchmarks.suite.options import load_suite
    from benchmarks.suite.runner import Runner

    jobs = load_suite(file)
    known = [job.name for job in jobs.jobs]
    check_known("--only", only or (), known)
    if devices is None:
        names = [str(number) for number in range(count_devices("--devices"))]
    else:
        names = devices.split(",")
        if not all(name.strip() for name in names) or len(set(names)) < len(names):
            raise AttnEditError("--devices", devices, "give indices such as 0,1")
    stop_on_signals()
    runner = Runner(jobs, out, names, budget, _say)
    runner.run(only or ())
    for name in known:
        entry = runner.states.get(name, {})
        seconds = f"{entry['seconds']:8.0f} s" if "seconds" in entry else ""
        print(f"{name:<32}{entry.get('state', 'not begun'):<10}{seconds}")
    if any(entry["state"] == "failed" for entry in runner.states.values()):
        raise typer.Exit(1)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
