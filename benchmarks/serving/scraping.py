"""A server's metrics against time, read twice a second by a thread while a level runs."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

_COUNTERS = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:generation_tokens_total": "generated",
    "vllm:prompt_tokens_total": "prompted",
    "vllm:request_success_total": "answered",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
}


@dataclass(frozen=True)
class Sample:
    """One reading; counts are totals over the server's engines, ``kv_usage`` is their mean."""

    time_s: float
    running: float = 0
    waiting: float = 0
    kv_usage: float = 0
    preemptions: float = 0
    generated: float = 0
    prompted: float = 0
    answered: float = 0
    prefix_queries: float = 0
    prefix_hits: float = 0


def read_sample(client: httpx.Client) -> Sample:
    """Read ``/metrics`` once.

    Raises:
        httpx.HTTPError: if the server does not answer.
    """
    text = client.get("/metrics").raise_for_status().text
    values: dict[str, float] = {}
    engines = 0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if name := _COUNTERS.get(sample.name):
                values[name] = values.get(name, 0) + sample.value
                engines += name == "kv_usage"
    if engines:
        values["kv_usage"] /= engines  # a share: data-parallel engines have equal pools
    return Sample(time.monotonic(), **values)


class Scraper:
    """Keeps samples while its block runs; a server that stops answering leaves a gap."""

    def __init__(self, base_url: str, period_s: float) -> None:
        self.samples: list[Sample] = []
        self._url, self._period = base_url, period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=10) as client:
            while not self._stop.is_set():
                # Dead or dying: whoever watches the process says so.
                with suppress(httpx.HTTPError, ValueError):
                    self.samples.append(read_sample(client))
                self._stop.wait(self._period)


def use_of_memory(samples: list[Sample], start_s: float, end_s: float) -> dict[str, Any]:
    """Peaks and means within the interval, and the samples around it for figures."""
    inside = [s for s in samples if start_s <= s.time_s <= end_s] or samples[-1:]
    if not inside:
        return {"samples": []}
    first, last = inside[0], inside[-1]
    fullest = max(inside, key=lambda s: s.kv_usage)
    queries = last.prefix_queries - first.prefix_queries
    return {
        "peak_running": max(s.running for s in inside),
        "mean_running": sum(s.running for s in inside) / len(inside),
        "peak_waiting": max(s.waiting for s in inside),
        "peak_kv_usage": fullest.kv_usage,
        "running_at_peak_kv_usage": fullest.running,
        "mean_kv_usage": sum(s.kv_usage for s in inside) / len(inside),
        "preemptions": last.preemptions - first.preemptions,
        "prefix_hit_rate": (last.prefix_hits - first.prefix_hits) / queries if queries else None,
        "samples": [
            {k: round(v, 4) for k, v in asdict(s).items()}
            | {"time_s": round(s.time_s - start_s, 2)}
            for s in samples
        ],
    }
