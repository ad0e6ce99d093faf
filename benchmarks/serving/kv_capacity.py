"""How many long requests really run at once, and what KV memory each of them takes.

    python -m benchmarks.serving.kv_capacity [--model qwen3-8b] [--length 32768] [--out FILE]

Three servings of one model's dimensions with dummy weights, in turn, with the same
``gpu_memory_utilization``: the full-attention teacher, the GateSWA edit on vLLM's own window
allocation, and the edit on this project's. Each gets more requests than fit; what counts is the
number that runs at once without a single preemption, read from vLLM's metrics, not its log line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.models import write_model
from benchmarks.provenance import provenance

CASES = ("full", "stock", "gateswa")
OUTPUT_TOKENS = 2000  # more than any request decodes here: none ends before the count
SETTLED_STEPS = 12


def measure(folder: Path, case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Fill one engine, in this process; returns what its metrics said."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {}
    if case == "stock":
        options["additional_config"] = {"attnedit_window_backend": "stock"}
    llm = LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=args.length + OUTPUT_TOKENS,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_seqs=args.offered,
        gpu_memory_utilization=args.gpu_memory_utilization,
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
        **options,
    )
    engine = llm.llm_engine
    rng = random.Random(0)
    sampling = SamplingParams(
        temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, detokenize=False
    )
    for i in range(args.offered):
        prompt = {"prompt_token_ids": [rng.randrange(1000, 100_000) for _ in range(args.length)]}
        engine.add_request(str(i), prompt, sampling)

    def metric(name: str) -> float:
        return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")

    decoding: set[str] = set()
    best = {"running": 0, "usage": 0.0}
    settled, start = 0, time.perf_counter()
    while settled < SETTLED_STEPS and time.perf_counter() - start < args.limit_s:
        for output in engine.step():
            decoding.add(output.request_id)
        if metric("num_preemptions"):
            break
        running = int(metric("num_requests_running"))
        # Count only when every running request has its whole prompt in the cache.
        if running == len(decoding):
            settled += 1
            best = {"running": running, "usage": metric("kv_cache_usage_perc")}
        else:
            settled = 0
    config = llm.llm_engine.vllm_config.cache_config
    pool = pool_bytes(llm)
    used = best["usage"] * pool
    return {
        "running": best["running"],
        "kv_bytes_in_use": used,
        "kv_bytes_per_request": used / max(1, best["running"]),
        "pool_bytes": pool,
        "num_blocks": config.num_gpu_blocks,
        "preemptions": metric("num_preemptions"),
        "seconds": time.perf_counter() - start,
    }


def pool_bytes(llm: Any) -> int:
    """Bytes of all KV-cache tensors that the engine allocated."""
    core = llm.llm_engine.engine_core.engine_core
    tensors = core.scheduler.kv_cache_config.kv_cache_tensors
    return sum(tensor.size for tensor in tensors)


def run_case(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one case in a process of its own, so that its memory is gone afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        target = "full" if case == "full" else "gateswa"
        folder = write_model(args.model, target, Path(scratch) / "model", args.window)
        result = Path(scratch) / "result.json"
        own = [f"--{k.replace('_', '-')}={v}" for k, v in vars(args).items() if k not in _LOCAL]
        command = [sys.executable, "-m", "benchmarks.serving.kv_capacity", *own]
        command += ["--case", case, "--folder", str(folder), "--out", str(result)]
        env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
        subprocess.run(command, check=True, env=env)
        measured: dict[str, Any] = json.loads(result.read_text())
    return measured


_LOCAL = ("case", "folder", "out")


def rows(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Committed form: each case against the full-attention teacher of the same run."""
    control = results["full"]
    table = []
    for case, result in results.items():
        name = f"kv_capacity {args.model} {case} L{args.length} W{args.window}"
        for metric, unit in (("running", "requests"), ("kv_bytes_per_request", "B")):
            table.append(
                {
                    "case": name,
                    "metric": metric,
                    "value": result[metric],
                    "unit": unit,
                    "control": "full attention",
                    "ratio": round(result[metric] / control[metric], 4),
                    **{k: result[k] for k in ("pool_bytes", "num_blocks", "preemptions")},
                }
            )
    return table


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-8b")
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--offered", type=int, default=48, help="requests offered at once")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.30)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--limit-s", type=float, default=150, help="a case stops after this long")
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("kv_capacity.json"))
    return parser.parse_args()


def main() -> None:
    """All cases, or with ``--case`` the one of this process."""
    args = parse()
    if args.case:
        args.out.write_text(json.dumps(measure(args.folder, args.case, args)))
        return
    results = {case: run_case(case, args) for case in CASES}
    document: dict[str, Any] = {"provenance": provenance(), "rows": rows(results, args)}
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    for row in document["rows"]:
        print(f"{row['case']:<45}{row['metric']:<24}{row['value']:>16,.0f}{row['ratio']:>8.3f}")
    print(json.dumps({case: result["running"] for case, result in results.items()}))


if __name__ == "__main__":
    main()
