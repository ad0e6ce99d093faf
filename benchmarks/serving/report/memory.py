"""KV memory of a device: by formula, as the server reported at its start, and as it was used.

The formula is that of ``attnedit kv --tp``. A reported request has the server's full length; with
window layers vLLM reserves more for one that is still being read than it holds afterwards. What a
running request used is taken where the use was highest: it had rarely reached its full length.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from benchmarks.serving.options import Options, Server
from benchmarks.serving.spread import spread_of
from vllm_attnedit.accounting import kv_bytes_per_request, kv_bytes_per_token
from vllm_attnedit.checkpoint import load_config

_BLOCK = 16


def kv_dtype_of(server: Server) -> str:
    """Of the KV cache, by the accounting's names."""
    arguments = [part for argument in server.arguments for part in argument.split("=")]
    for name, value in itertools.pairwise(arguments):
        if name == "--kv-cache-dtype" and value.startswith("fp8"):
            return "fp8"
    return "fp32" if server.dtype in ("float32", "float") else "auto"


def level_memory(
    level: dict[str, Any], servers: dict[str, dict[str, Any]], options: Options
) -> dict[str, Any]:
    """One level's row.

    Args:
        level: with figures.
        servers: what each said at its start.
        options: of the benchmark.
    """
    server = servers.get(level["system"], {})
    system = next(one for one in options.systems if one.name == level["system"])
    spread = spread_of(system, options.server)
    figures, used = level["figures"], level["server"]
    length = figures["prompt_tokens"] + figures["output_tokens"]
    row: dict[str, Any] = {
        "system": level["system"],
        "pass": level["pass"],
        "workload": level["workload"],
        "level": level["level"],
        "spread": spread.label,
        "length": length,
        "reported_concurrency": server.get("reported_concurrency"),
        "reported_length": server.get("reported_length"),
        "reported_bytes_per_request": server.get("reported_bytes_per_request"),
        **{k: used.get(k) for k in ("peak_running", "peak_kv_usage", "preemptions")},
        "prefix_hit_rate": used.get("prefix_hit_rate"),
        "formula_bytes_per_request": None,
        "formula_bytes_per_token": None,
        "formula_bytes_of_reported": None,
        "used_bytes_per_request": None,
    }
    pool, running = server.get("reported_bytes"), used.get("running_at_peak_kv_usage")
    if pool and running:
        here = running / spread.data  # of them, on one device
        row["used_bytes_per_request"] = int(used["peak_kv_usage"] * pool / here)
    if server and length and Path(server["model"]).is_dir():
        config, dtype = load_config(server["model"]), kv_dtype_of(options.server)

        def formula(tokens: int) -> int:
            return kv_bytes_per_request(
                config, tokens, kv_dtype=dtype, tp=spread.tensor, block_size=_BLOCK
            )

        row["formula_bytes_per_request"] = formula(length)
        row["formula_bytes_per_token"] = kv_bytes_per_token(
            config, kv_dtype=dtype, tp=spread.tensor
        )
        if row["reported_length"]:
            row["formula_bytes_of_reported"] = formula(row["reported_length"])
    return row


def sharding(servers: dict[str, dict[str, Any]], options: Options) -> list[dict[str, Any]]:
    """What each system's cached tokens take of a device, by formula; nothing on a single device.

    ``share`` is against the same model on one device: ``1 / TP`` where all is split, 1 where every
    device holds all of it, as of latents. With copies a request is on one of them only, so that a
    share of 1 costs the devices of the others nothing: ``bytes_per_request_total`` counts what all
    devices together hold of a request.
    """
    if options.server.devices == 1:
        return []
    rows: list[dict[str, Any]] = []
    for system in options.systems:
        server = servers.get(system.name)
        if server is None or not Path(server["model"]).is_dir():
            continue
        spread, length = spread_of(system, options.server), options.server.max_model_len
        config, dtype = load_config(server["model"]), kv_dtype_of(options.server)
        token, alone = (
            kv_bytes_per_token(config, kv_dtype=dtype, tp=tp) for tp in (spread.tensor, 1)
        )
        request = kv_bytes_per_request(
            config, length, kv_dtype=dtype, tp=spread.tensor, block_size=_BLOCK
        )
        rows.append(
            {
                "system": system.name,
                "spread": spread.label,
                "bytes_per_token": token,
                "bytes_per_token_on_one": alone,
                "share": token / alone,
                "length": length,
                "bytes_per_request": request,
                "bytes_per_request_total": request * spread.tensor,
            }
        )
    control = options.systems[0].name
    first = next((row for row in rows if row["system"] == control), None)
    for row in rows:
        row["ratio"] = first and row["bytes_per_request_total"] / first["bytes_per_request_total"]
    return rows
