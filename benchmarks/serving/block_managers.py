"""What the block managers cost the scheduler in a step of decodes, ours against vLLM's own.

    python -m benchmarks.serving.block_managers [--requests 256] [--out FILE]

Plain Python on one core, no model and no device: 36 layers, six of them full, windows of 128,
blocks of 16, that many requests past their window, one token each a step. Separate pages make five
groups of window layers, packed ones one.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from benchmarks.provenance import provenance
from vllm_attnedit.kv_cache.spec import GateSWASpec, register_spec

BLOCK, WINDOW, PROMPT, PACK = 16, 128, 1024, 5


def managers(ours: bool, packed: bool, caching: bool, num_requests: int) -> KVCacheManager:
    """vLLM's manager of all groups, its window groups ours or its own."""
    shared: dict[str, Any] = {
        "block_size": BLOCK,
        "num_kv_heads": 8,
        "head_size": 128,
        "dtype": torch.bfloat16,
    }
    window = (
        GateSWASpec(sliding_window=WINDOW, **shared)
        if ours
        else SlidingWindowSpec(sliding_window=WINDOW, **shared)
    )
    full_block = BLOCK * PACK if packed else BLOCK
    full = KVCacheGroupSpec(["full"], FullAttentionSpec(**shared | {"block_size": full_block}))
    groups = [full, *(KVCacheGroupSpec([f"w{i}"], window) for i in range(1 if packed else PACK))]
    return KVCacheManager(
        KVCacheConfig(
            num_blocks=1000 + 600 * num_requests, kv_cache_tensors=[], kv_cache_groups=groups
        ),
        max_model_len=4096,
        scheduler_block_size=full_block,
        hash_block_size=BLOCK,
        max_num_batched_tokens=8192,
        enable_caching=caching,
        log_stats=False,
    )


def step_time(ours: bool, packed: bool, caching: bool, num_requests: int, steps: int) -> float:
    """Median milliseconds of a step."""
    manager, rng = managers(ours, packed, caching, num_requests), random.Random(0)
    hasher = get_request_block_hasher(BLOCK, sha256) if caching else None
    requests = []
    for i in range(num_requests):
        prompt = [rng.randrange(50_000) for _ in range(PROMPT + i % BLOCK)]
        sampling = SamplingParams(max_tokens=4 * steps, temperature=0)
        request = Request(str(i), prompt, sampling, None, block_hasher=hasher)
        manager.new_step_starts()
        hit, hit_tokens = manager.get_computed_blocks(request)
        if manager.allocate_slots(request, len(prompt), hit_tokens, hit) is None:
            raise RuntimeError("the pool is too small")
        requests.append(request)
    times = []
    for _ in range(steps):
        for request in requests:
            request.num_computed_tokens = request.num_tokens
            request.append_output_token_ids(rng.randrange(50_000))
        start = time.perf_counter()
        manager.new_step_starts()
        for request in requests:
            manager.allocate_slots(request, 1)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def rows(num_requests: int, steps: int) -> list[dict[str, Any]]:
    """Each form of pages, with and without prefix caching; the best of three, in turn."""
    table = []
    for packed in (False, True):
        for caching in (False, True):
            theirs, ours = (
                min(times)
                for times in zip(*(
                    [step_time(own, packed, caching, num_requests, steps) for own in (False, True)]
                    for _ in range(3)
                ), strict=True)
            )  # fmt: skip
            case = (
                f"block managers B{num_requests} {'packed' if packed else 'separate'} pages, "
                f"prefix caching {'on' if caching else 'off'}"
            )
            table.append(
                {
                    "case": case,
                    "metric": "time_a_step",
                    "value": round(ours, 4),
                    "unit": "ms",
                    "control": "vLLM's window manager",
                    "control_value": round(theirs, 4),
                    "ratio": round(ours / theirs, 4),
                }
            )
    return table


def main() -> None:
    """Print the table; with ``--out`` write it with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    register_spec()
    init_none_hash(sha256)
    table = rows(args.requests, args.steps)
    for row in table:
        print(f"{row['case']:<66}{row['value']:8.2f} ms {row['ratio']:8.3f} of {row['control']}")
    if args.out:
        document = {"provenance": provenance(), "rows": table}
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
