"""Where a served step's time goes: a trace of the device under load, by kind of work.

A server with vLLM's profiler on is a slower one, so a profile is a run of its own: its shares are
good, its rates are not. ``idle`` is the time in which the device waits for the scheduler, the
sampler's host side or the API; on a CPU there is no such device, and shares are of operators' own
time.
"""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving.levels import locust_command
from benchmarks.serving.options import Options, Workload
from benchmarks.serving.server import serving
from benchmarks.serving.system import System
from benchmarks.serving.systems import describe, is_dummy, prepare
from examples.quickstart.processes import process_group
from vllm_attnedit.errors import AttnEditError

# The first that matches a kernel's or an operator's name counts.
KINDS: tuple[tuple[str, str], ...] = (
    ("KV writes", r"reshape_and_cache|kv_write|concat_and_cache"),
    ("MoE", r"moe|expert|topkGating|grouped_topk"),
    ("attention", r"attention|attn|flash|fmha|gateswa|mla_|_mla|unified_|paged"),
    ("sampling", r"sampl|argmax|multinomial|top_?k|top_?p|softmax|cumsum|sort|exponential"),
    ("GEMM", r"gemm|gemv|cutlass|nvjet|cublas|xmma|splitK|matmul|addmm|_mm\b|::mm\b|linear"),
    ("copies", r"memcpy|memset|copy_|_to_copy|aten::to\b|index_select|gather"),
    ("norms, RoPE, activations", r"norm|rotary|rope|silu|swiglu|act_and_mul|triton_|elementwise"),
)
_PATTERNS = [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in KINDS]
_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}


def kind_of(name: str) -> str:
    """The kind of work that a kernel or operator does, by its name."""
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), "other")


def shares(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Share of the traced time by kind, the largest first, from Chrome trace events.

    Raises:
        AttnEditError: if the trace holds no work.
    """
    complete = [e for e in events if e.get("ph") == "X" and e.get("dur", 0) > 0]
    kernels = [e for e in complete if e.get("cat") in _DEVICE]
    seconds: dict[str, float] = {}
    if kernels:
        for event in kernels:
            kind = kind_of(event["name"])
            seconds[kind] = seconds.get(kind, 0.0) + event["dur"]
        begin = min(e["ts"] for e in kernels)
        end = max(e["ts"] + e["dur"] for e in kernels)
        seconds["idle"] = max(0.0, end - begin - _covered(kernels))
    else:
        for name, own in _own_times([e for e in complete if e.get("cat") == "cpu_op"]):
            seconds[kind_of(name)] = seconds.get(kind_of(name), 0.0) + own
    total = sum(seconds.values())
    if not total:
        raise AttnEditError("profile", "no work in the trace", "profile later or for longer")
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return {kind: value / total for kind, value in ordered}


def _covered(events: list[dict[str, Any]]) -> float:
    """Time in which at least one of them runs: streams overlap."""
    covered, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e["ts"]):
        end = event["ts"] + event["dur"]
        covered += max(0.0, end - max(reached, event["ts"]))
        reached = max(reached, end)
    return covered


def _own_times(events: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Each operator's time without that of the operators it calls."""
    result: list[list[Any]] = []
    open_: dict[Any, list[tuple[float, int]]] = {}
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        stack = open_.setdefault((event.get("pid"), event.get("tid")), [])
        while stack and stack[-1][0] <= event["ts"]:
            stack.pop()
        if stack:
            result[stack[-1][1]][1] -= event["dur"]
        stack.append((event["ts"] + event["dur"], len(result)))
        result.append([event["name"], event["dur"]])
    return [(name, max(0.0, own)) for name, own in result]


def read_trace_events(folder: Path) -> list[dict[str, Any]]:
    """The events of the first rank's trace below ``folder``.

    Raises:
        AttnEditError: if there is none.
    """
    files = sorted(folder.rglob("*.json.gz")) + sorted(folder.rglob("*.json"))
    for path in files:
        data = path.read_bytes()
        trace = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        events: list[dict[str, Any]] = trace.get("traceEvents", [])
        if any(event.get("cat") in {*_DEVICE, "cpu_op"} for event in events):
            return events
    raise AttnEditError("profile", folder, "the server wrote no trace; see its log")


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
    traces.mkdir(parents=True, exist_ok=True)
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
        "shares": shares(read_trace_events(traces)),
    }
    (out / "profiles" / f"{traces.name}.json").write_text(json.dumps(result, indent=1))
    return result
