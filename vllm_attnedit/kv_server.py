"""What a running vLLM server says about its KV cache: its ``/metrics`` and ``/v1/models``.

From the host's metrics come the blocks in use and the requests running. How many blocks each window
group holds comes from this project's own gauge (:mod:`vllm_attnedit.kv_cache.gauge`), where the
server exports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from vllm_attnedit.errors import AttnEditError

WINDOW_BLOCKS = "attnedit:kv_window_blocks_in_use"
"""Gauge of the engine's process: blocks that running requests hold, one label set a window group.
Labels: ``group``, its index; ``block_size``, tokens; ``heads``, KV heads in a page."""

_TIMEOUT_S = 10.0
_FIX_URL = "give the address of a running vLLM server, as http://localhost:8000"


@dataclass(frozen=True)
class WindowGroup:
    """One window group's gauge.

    Attributes:
        heads: KV heads in a page: those of all layers that share it.
        blocks: in use, over all engines.
    """

    heads: int
    blocks: int


@dataclass(frozen=True)
class ServerState:
    """One reading of ``/metrics``; counts are sums over the server's engines.

    Attributes:
        num_blocks: usable blocks, the null block of each engine left out.
        blocks_in_use: of these, held by requests; blocks only kept for prefix hits are free.
        block_size: tokens of a window block, which is the smallest.
        cache_dtype: as the server was told, ``auto`` or an fp8 format.
        window_groups: where the engine exports its gauge, else empty.
        bytes_per_block: on one GPU, where the pool's size was given (``--kv-cache-memory-bytes``,
            and always on a CPU), a little above the true one; else ``None``.
    """

    num_blocks: int
    blocks_in_use: int
    block_size: int
    cache_dtype: str
    running: int
    waiting: int
    preemptions: int
    window_groups: tuple[WindowGroup, ...] = ()
    bytes_per_block: float | None = None


def read_state(client: httpx.Client) -> ServerState:
    """Read ``/metrics`` of the client's server.

    Raises:
        AttnEditError: if it cannot be reached or is not a vLLM server.
    """
    response = _get(client, "/metrics")
    state = parse_state(response.text) if response.status_code == httpx.codes.OK else None
    if state is None:
        fix = f"{_FIX_URL}, started without --disable-log-stats"
        raise AttnEditError("--server", client.base_url, f"no vLLM metrics there; {fix}")
    return state


def read_model_root(client: httpx.Client) -> str:
    """The path or hub id that the server loaded its first model from.

    Raises:
        AttnEditError: if it does not say; naming the checkpoint is the way round.
    """
    response = _get(client, "/v1/models")
    try:
        root = response.raise_for_status().json()["data"][0]["root"]
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError):
        root = None
    if not isinstance(root, str):
        fix = "name the checkpoint that it serves: attnedit kv CHECKPOINT --server URL"
        raise AttnEditError("--server", client.base_url, f"/v1/models names no model; {fix}")
    return root


def connect(url: str) -> httpx.Client:
    """A client for ``url``: with or without scheme, with or without the API's ``/v1``.

    Raises:
        AttnEditError: if it is no URL.
    """
    text = url if "://" in url else f"http://{url}"
    try:
        parsed = httpx.URL(text.rstrip("/").removesuffix("/v1"))
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise httpx.InvalidURL("no host")
    except httpx.InvalidURL as error:
        raise AttnEditError("--server", url, _FIX_URL) from error
    return httpx.Client(base_url=parsed, timeout=_TIMEOUT_S)


def _get(client: httpx.Client, path: str) -> httpx.Response:
    try:
        return client.get(path, follow_redirects=True)
    except httpx.HTTPError as error:
        why = f"cannot be reached ({error})"
        raise AttnEditError("--server", client.base_url, f"{why}; {_FIX_URL}") from error


def parse_state(text: str) -> ServerState | None:
    """A reading from Prometheus' text format; ``None`` where vLLM's metrics are not in it."""
    try:
        samples = list(_samples(text))
    except ValueError:  # not the text format: some other server's page
        return None
    info: dict[str, dict[str, str]] = {}
    usage: dict[str, float] = {}
    for sample in samples:
        engine = sample.labels.get("engine", "")
        if sample.name == "vllm:cache_config_info":
            info[engine] = sample.labels
        elif sample.name == "vllm:kv_cache_usage_perc":
            usage[engine] = sample.value
    if not info or usage.keys() != info.keys():
        return None
    blocks = {engine: int(labels["num_gpu_blocks"]) - 1 for engine, labels in info.items()}
    first: Any = next(iter(info.values()))

    def total(name: str) -> int:
        return int(sum(sample.value for sample in samples if sample.name == name))

    return ServerState(
        num_blocks=sum(blocks.values()),
        blocks_in_use=sum(round(usage[engine] * blocks[engine]) for engine in blocks),
        block_size=int(first["block_size"]),
        cache_dtype=first["cache_dtype"],
        running=total("vllm:num_requests_running"),
        waiting=total("vllm:num_requests_waiting"),
        preemptions=total("vllm:num_preemptions_total"),
        window_groups=tuple(
            WindowGroup(int(sample.labels["heads"]), int(sample.value))
            for sample in samples
            if sample.name == WINDOW_BLOCKS
        ),
        bytes_per_block=_bytes_per_block(first),
    )


def _bytes_per_block(labels: dict[str, str]) -> float | None:
    pool = labels.get("kv_cache_memory_bytes", "None")
    if pool == "None" or labels.get("num_gpu_blocks_override", "None") != "None":
        return None
    return int(pool) / int(labels["num_gpu_blocks"])


def _samples(text: str) -> Iterator[Sample]:
    for family in text_string_to_metric_families(text):
        yield from family.samples
