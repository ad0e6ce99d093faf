"""``python -m benchmarks serving CONFIG.yaml``: one command, one report.

Bad input is one line on stderr and exit code 2; an interrupted run leaves a report of what it has
and exits with 128 plus the signal's number.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from examples.quickstart.processes import stop_on_signals
from vllm_attnedit.errors import AttnEditError

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def _overview() -> None:
    """Benchmarks of this project; the kernels' are ``python -m benchmarks.kernels``."""


@app.command()
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


@app.command()
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
    for option, name, known in (("--system", system, systems), ("--workload", workload, workloads)):
        if name not in known:
            raise AttnEditError(option, name, f"use one of {', '.join(known)}")
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


@app.command(
    "training-scaling", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
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


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
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


@app.command()
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
    for name in only or ():
        if name not in known:
            raise AttnEditError("--only", name, f"use one of {', '.join(known)}")
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


def main() -> None:
    """Entry point."""
    try:
        app(prog_name="python -m benchmarks")
    except AttnEditError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
