"""One level of one workload on one running server: load, scrapes, and what came of it.

A level's result is JSON-ready. ``status`` is one of

* ``ok``;
* ``not steady``: a closed load whose rate did not settle within its limit; figures are of the last
  windows before it;
* ``failed`` or ``out of memory``: the server died, no request was answered, or one of a burst was
  not. There are no figures then: half a level would flatter or slander;
* ``client too slow``: the load generator could not keep up, so that its lateness would be counted
  as the server's. There are no figures either.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.options import Goal, Measure
from benchmarks.serving.readiness import wait_until_idle
from benchmarks.serving.records import CUT, ClientCost, Record, read_records
from benchmarks.serving.scraping import Sample, Scraper, use_of_memory
from benchmarks.serving.server import Running, ServerFailed
from benchmarks.serving.stats import steady_since, summarise
from benchmarks.serving.workload import Workload
from examples.quickstart.processes import free_port, process_group

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
BUSY_CPU = 0.7
"""Share of a core above which one load-generating process is too busy to be trusted."""
_POLL_S = 0.2
_QUIT_S = 30.0


def run_level(
    server: Running,
    workload: Workload,
    level: float,
    model: dict[str, Any],
    measure: Measure,
    goal: Goal,
    folder: Path,
) -> dict[str, Any]:
    """Measure one level, with more client processes if the first were too busy.

    Args:
        server: it must be idle.
        model: ``name``, ``vocab_size`` and ``max_model_len``.
        folder: for locust's CSV and HTML, and the commands' logs.
    """
    most = int(level) if workload.load in ("burst", "closed") else os.cpu_count() or 1
    processes = min(measure.client_processes, most)  # each needs a user
    while True:
        result = _attempt(server, workload, level, model, measure, goal, folder, processes)
        more = min(processes * 2, max(1, (os.cpu_count() or 2) // 2), most)
        if result["status"] != "client too slow" or more <= processes:
            return result
        processes = more
        # Others, that no cache has seen.
        workload = workload.model_copy(update={"seed": workload.seed + 1})
        if not wait_until_idle(server):
            return result


def _attempt(
    server: Running,
    workload: Workload,
    level: float,
    model: dict[str, Any],
    measure: Measure,
    goal: Goal,
    folder: Path,
    processes: int,
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    command = locust_command(server.base_url, workload, level, model, folder, processes)
    with (
        tempfile.TemporaryDirectory() as scratch,
        Scraper(server.base_url, measure.scrape_s) as scraper,
    ):
        records_folder = Path(scratch)
        command = [*command, "--records", str(records_folder)]
        log = folder / "locust.log"
        with process_group(command, log=log, env={"NO_PROXY": "127.0.0.1"}) as locust:
            since = _watch(server, workload, level, locust, scraper, measure)
        records, costs = read_records(sorted(records_folder.glob("*.jsonl")))
    result = {
        "level": level,
        "command": command[:-2],
        "client": client_figures(costs, len(records)),
        "status": "ok",
        "reason": "",
    }
    if not server.alive:
        failure = ServerFailed(server.log)
        status = "out of memory" if failure.out_of_memory else "failed"
        return result | {"status": status, "reason": str(failure)}
    if workload.load != "closed" and any(record.error == CUT for record in records):
        reason = f"not finished within {measure.limit_s:g} s"
        return result | {"status": "failed", "reason": reason}
    if workload.load == "burst" and 0 < len(records) < level:
        reason = f"the load generator sent {len(records)} of {level:g} requests"
        return result | {"status": "failed", "reason": reason}
    failed = [record for record in records if record.failed]
    if not any(record.whole for record in records) or (workload.load == "burst" and failed):
        errors = sorted({record.error for record in failed}) or [_end_of(log)]
        reason = "; ".join(errors[:3])
        if failed:
            reason = f"{len(failed)} of {len(records)} requests: {reason}"
        return result | {"status": "failed", "reason": reason}
    if too_slow(costs, measure):
        return result | {"status": "client too slow", "reason": json.dumps(result["client"])}
    start_s, end_s, steady = _interval(workload, records, since, scraper, measure)
    if workload.load == "closed" and since is None:
        result |= {"status": "not steady", "reason": f"within {measure.limit_s:g} s"}
    return result | {
        "figures": summarise(
            records, start_s, end_s, goal, steady=steady, closed=workload.load == "closed"
        ),
        "server": use_of_memory(scraper.samples, start_s, end_s),
    }


def locust_command(
    url: str,
    workload: Workload,
    level: float,
    model: dict[str, Any],
    folder: Path,
    processes: int = 1,
) -> list[str]:
    """The load generator's command line, which a person can repeat."""
    closed = workload.load in ("burst", "closed")
    users = int(level) if closed else processes
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", url]
    command += ["--headless", "-u", str(users), "-r", str(max(1, users)), "-L", "WARNING"]
    command += ["--only-summary", "--csv", str(folder / "locust")]
    command += ["--html", str(folder / "locust.html"), "--stop-timeout", "0"]
    if processes > 1:
        # A port of its own: the processes of another benchmark on this machine would join in.
        port = str(free_port())
        command += ["--processes", str(processes), "--master-bind-port", port]
        command += ["--master-port", port]
    options = {
        "model-name": model["name"],
        "vocab-size": model["vocab_size"],
        "max-model-len": model["max_model_len"],
        "kind": workload.kind,
        "api": workload.api,
        "load": workload.load,
        "rate": level,
        "requests": workload.requests,
        "prompt-tokens": workload.prompt_tokens,
        "output-tokens": workload.output_tokens,
        "prefix-tokens": workload.prefix_tokens,
        "turns": workload.turns,
        "seed": workload.seed,
    }
    if workload.path is not None:
        options["trace"] = workload.path
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    return command


def _watch(
    server: Running,
    workload: Workload,
    level: float,
    locust: subprocess.Popen[bytes],
    scraper: Scraper,
    measure: Measure,
) -> float | None:
    """Wait for the level's end, and bring a closed load to it: once it was steady for long enough,
    answered a request a user and began another, without which there were no latencies and no times
    to first token. Returns where it became steady."""
    begun, since = time.monotonic(), None
    while locust.poll() is None and server.alive:
        time.sleep(_POLL_S)
        now = time.monotonic()
        if workload.load == "closed":
            samples = list(scraper.samples)
            if since is None:
                rates = [(s.time_s, s.generated) for s in samples if s.running]
                since = steady_since(rates, measure, begun)
            answered = samples[-1].answered - samples[0].answered if samples else 0
            if (
                since is not None
                and now - since >= measure.goal_s
                and answered >= level
                and prompts_read(samples, since)
            ):
                break
        if now - begun > measure.limit_s:
            break
    if locust.poll() is None:
        os.kill(locust.pid, signal.SIGTERM)  # locust's own way to stop: it writes its records
        try:
            locust.wait(_QUIT_S)
        except subprocess.TimeoutExpired:
            return since
    return since


def prompts_read(samples: Sequence[Sample], since: float) -> bool:
    """Whether a prompt's last token was read after ``since``, which is when its answer begins."""
    inside = [sample.prompted for sample in samples if sample.time_s >= since]
    return bool(inside) and inside[-1] > inside[0]


def _interval(
    workload: Workload,
    records: Sequence[Record],
    since: float | None,
    scraper: Scraper,
    measure: Measure,
) -> tuple[float, float, bool]:
    """What is measured: the steady state of a closed load, all of the others."""
    first = min(record.sent_s for record in records)
    last = max(record.end_s for record in records)
    if workload.load != "closed":
        return first, last, workload.load == "poisson"
    if since is None:
        since = max(first, last - measure.windows * measure.window_s)
    return since, last, True


def client_figures(costs: Sequence[ClientCost], requests: int) -> dict[str, Any]:
    """What the load generator took. Its cost per hundred streams is to be below 0.05 cores."""
    cpu, streams = sum(c.cpu for c in costs), sum(c.streams for c in costs)
    return {
        "processes": len(costs),
        "requests": requests,
        "cpu_cores": round(cpu, 4),
        "cpu_cores_per_100_streams": round(100 * cpu / streams, 4) if streams else None,
        "lag_p99_s": round(max((c.lag_p99_s for c in costs), default=0.0), 5),
        "lag_max_s": round(max((c.lag_max_s for c in costs), default=0.0), 5),
    }


def too_slow(costs: Sequence[ClientCost], measure: Measure) -> bool:
    """Whether a process of the load generator could not keep up."""
    return any(cost.cpu > BUSY_CPU or cost.lag_p99_s > measure.client_late_s for cost in costs)


def _end_of(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return " ".join(lines[-3:]) or "the load generator said nothing"
