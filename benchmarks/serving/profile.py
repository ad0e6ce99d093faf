"""Where a served step's time goes: a trace of the device under load, by kind of work.

A server with vLLM's profiler on is a slower one, so a profile is a run of its own: its shares are
good, its rates are not. ``idle`` is the time in which the device waits for the scheduler, the
sampler's host side or the API.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving.levels import locust_command
from benchmarks.serving.options import Options
from benchmarks.serving.server import serving
from benchmarks.serving.system import System
from benchmarks.serving.systems import describe, is_dummy, prepare
from benchmarks.serving.workload import Workload
from benchmarks.trace import SERVING, read_trace_events, shares
from examples.quickstart.processes import process_group


def profile(
    options: Options,
    system: System,
    workload: Workload,
    level: float,
    out: Path,
    *,
    after_s: float,
    seconds: float,
) -> dict[str, Any]:
    """Serve ``system``, load it, and trace ``seconds`` of it ``after_s`` after the load began.

    Returns:
        What was profiled and the ``shares`` by kind; also written to ``out``.
    """
    model = prepare(options, system, out / "models")
    name = describe(model, system.name, options.server.max_model_len)
    traces = (out / "profiles" / f"{system.name}-{workload.name}-{level:g}").resolve()
    shutil.rmtree(traces, ignore_errors=True)  # an earlier trace is not this one's
    traces.mkdir(parents=True)
    profiler = {
        "profiler": "torch",
        "torch_profiler_dir": str(traces),
        "torch_profiler_with_stack": False,
        "ignore_frontend": True,
    }
    arguments = ["--profiler-config", json.dumps(profiler)]
    arguments += ["--load-format", "dummy"] if is_dummy(options) else []
    server = options.server.model_copy(
        update={"arguments": (*options.server.arguments, *arguments)}
    )
    with serving(system, server, model, name["name"], traces / "server.log") as running:
        load = locust_command(running.base_url, workload, level, name, traces)
        with (
            process_group(load, log=traces / "locust.log", env={"NO_PROXY": "127.0.0.1"}),
            httpx.Client(base_url=running.base_url, timeout=600) as client,
        ):
            time.sleep(after_s)
            client.post("/start_profile").raise_for_status()
            time.sleep(seconds)
            client.post("/stop_profile").raise_for_status()
    result = {
        "system": system.name,
        "workload": workload.name,
        "level": level,
        "after_s": after_s,
        "seconds": seconds,
        "shares": shares(read_trace_events(traces), SERVING),
    }
    (out / "profiles" / f"{traces.name}.json").write_text(json.dumps(result, indent=1))
    return result
