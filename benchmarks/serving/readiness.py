"""A server ready to be measured: warm, and idle."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx

from benchmarks.serving.plan import Plan
from benchmarks.serving.scraping import read_sample
from benchmarks.serving.server import Running
from benchmarks.serving.workload import Workload

_IDLE_S = 60.0


def warm_up(running: Running, workload: Workload, model: dict[str, Any], count: int) -> None:
    """Ask a few requests that no level asks, at once: what is compiled or tuned for the first
    batch must not count. Their figures are thrown away."""
    plan = Plan(workload, model["vocab_size"], model["max_model_len"])

    def send(i: int) -> None:
        ask = plan.ask(1_000_000 + i)
        body = {**ask.body, "model": model["name"], "max_tokens": min(ask.output_tokens, 16)}
        # If something is wrong the level itself will say it.
        with suppress(httpx.HTTPError):
            httpx.post(running.base_url + ask.path, json=body, timeout=600)

    with ThreadPoolExecutor(max(1, count)) as pool:
        list(pool.map(send, range(count)))


def wait_until_idle(running: Running) -> bool:
    """Whether nothing runs or waits any more, so that a level begins with an empty server."""
    deadline = time.monotonic() + _IDLE_S
    with httpx.Client(base_url=running.base_url, timeout=10) as client:
        while time.monotonic() < deadline and running.alive:
            try:
                sample = read_sample(client)
            except (httpx.HTTPError, ValueError):
                return False
            if sample.running == sample.waiting == 0:
                return True
            time.sleep(0.2)
    return False
