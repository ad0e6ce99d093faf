"""``python -m benchmarks serving`` and ``profile``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.names import check_known
from examples.quickstart.processes import stop_on_signals


def serving(
    config: Annotated[Path, typer.Argument(help="YAML file: see benchmarks/serving/configs.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results; what is there already is not measured again."),
    ] = None,
    system: Annotated[
        list[str] | None, typer.Option(help="Only this system now. Repeatable.")
    ] = None,
    workload: Annotated[
        list[str] | None, typer.Option(help="Only this workload now. Repeatable.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Begin no level later than so many seconds from now.")
    ] = None,
    report_only: Annotated[
        bool, typer.Option(help="Measure nothing; write the report of what is there.")
    ] = False,
    devices: Annotated[
        int | None, typer.Option(help="That every system takes, instead of server.devices.")
    ] = None,
) -> None:
    """Throughput and latency of served models against their teacher's, under concurrency."""
    from benchmarks.serving.options import load_options

    options = load_options(config, devices)
    from benchmarks.serving.report import write_report
    from benchmarks.serving.run import Benchmark

    folder = out or Path(".cache") / "benchmarks" / options.name
    benchmark = Benchmark(options, folder, system, workload, budget)
    stop_on_signals()
    try:
        if not report_only:
            benchmark.run()
    finally:
        # Also when interrupted: what was measured is reported, as far as it goes.
        line = write_report(benchmark)
    print(line)


def profile(
    config: Annotated[Path, typer.Argument(help="YAML file of a serving benchmark.")],
    system: Annotated[str, typer.Option(help="One of its systems.")],
    workload: Annotated[str, typer.Option(help="One of its workloads.")],
    level: Annotated[
        float | None, typer.Option(help="Load; the workload's last by default.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The benchmark's folder for results.")] = None,
    after: Annotated[float, typer.Option(help="Seconds of load before the trace.")] = 10.0,
    seconds: Annotated[float, typer.Option(help="Length of the trace.")] = 2.0,
    devices: Annotated[
        int | None, typer.Option(help="That every system takes, instead of server.devices.")
    ] = None,
) -> None:
    """Where a served step's time goes: shares of GEMM, attention, MoE, sampling, idleness."""
    import httpx

    from benchmarks.serving import profile as profiling
    from benchmarks.serving.options import load_options
    from benchmarks.serving.server import ServerFailed

    options = load_options(config, devices)
    systems = {one.name: one for one in options.systems}
    workloads = {one.name: one for one in options.workloads}
    check_known("--system", [system], systems)
    check_known("--workload", [workload], workloads)
    chosen = workloads[workload]
    folder = out or Path(".cache") / "benchmarks" / options.name
    stop_on_signals()
    try:
        result = profiling.profile(
            options,
            systems[system],
            chosen,
            chosen.levels[-1] if level is None else level,
            folder,
            after_s=after,
            seconds=seconds,
        )
    except (ServerFailed, httpx.HTTPError) as error:
        print(f"benchmarks: the server could not be profiled: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    for kind, share in result["shares"].items():
        print(f"{kind:<28}{share:7.1%}")
    print(json.dumps(result))
