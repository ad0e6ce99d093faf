"""Decode rate and time to first token of an edited model against its teacher, engine only.

    python -m benchmarks.serving.decode_rate [--cases full stock gateswa] [--points 1x8192 64x8192]

Each case is one engine with dummy weights, compiled and with CUDA graphs, in a process of its own.
For every point, ``BATCHxLENGTH``, so many prompts of that length are put in at once; what counts is
the steady state in which all of them decode and none prefills. The model runner is the same for all
cases: vLLM's default depends on the architecture's name.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.models import write_model
from benchmarks.provenance import provenance

CONTROLS = ("full", "stock")
# case -> the case that differs from it in one thing only
SIBLINGS = {"gateswa-separate": "gateswa", "mla-attnedit": "mla", "mla-narrow": "mla"}


@dataclass(frozen=True)
class Case:
    """What is served: the edit, and how."""

    target: str
    additional_config: dict[str, str] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {
    "full": Case("full"),
    "stock": Case("gateswa", {"attnedit_window_backend": "stock"}),
    "gateswa": Case("gateswa"),
    "gateswa-separate": Case("gateswa", {"attnedit_window_pages": "separate"}),
    "mla": Case("mla"),
    # Queries and keys as wide as the teacher's 128, a half of them without position.
    "mla-narrow": Case("mla", choices={"qk_nope_head_dim": 64}),
    "mla-attnedit": Case("mla", {"attnedit_latent_backend": "attnedit"}),
}
WARM_STEPS = 16


@dataclass(frozen=True)
class Point:
    """So many requests of so many prompt tokens at once."""

    batch: int
    length: int

    @classmethod
    def parse(cls, text: str) -> Point:
        try:
            batch, length = (int(part) for part in text.split("x"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: write BATCHxLENGTH, 64x8192 say") from None
        return cls(batch, length)

    def __str__(self) -> str:
        return f"B{self.batch} L{self.length}"

    def most_tokens(self, args: argparse.Namespace) -> int:
        """Tokens the first request may produce until the last one has been measured."""
        prefill_steps = 2 + 5 * self.batch * self.length // (4 * args.max_num_batched_tokens)
        return prefill_steps + WARM_STEPS + 2 * args.steps


def measure(folder: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All points of one case, in this process."""
    from vllm import LLM

    first = Point(1, 256)
    llm = LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=max(p.length + p.most_tokens(args) for p in (*args.points, first)),
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_seqs=max(point.batch for point in args.points),
        gpu_memory_utilization=args.gpu_memory_utilization,
        compilation_config={"cudagraph_capture_sizes": sorted({p.batch for p in args.points})},
        enable_prefix_caching=False,
        additional_config=CASES[args.case].additional_config,
        seed=0,
    )
    run_point(llm, first, args)  # what the first request compiles is nobody's time
    return {str(point): run_point(llm, point, args) for point in args.points}


def run_point(llm: Any, point: Point, args: argparse.Namespace) -> dict[str, float]:
    """Seconds to the first token of all, and of a decode step."""
    from vllm import SamplingParams

    engine, rng = llm.llm_engine, random.Random(point.length)
    sampling = SamplingParams(
        temperature=0, max_tokens=point.most_tokens(args), ignore_eos=True, detokenize=False
    )
    prompts = [
        {"prompt_token_ids": [rng.randrange(1000, 100_000) for _ in range(point.length)]}
        for _ in range(point.batch)
    ]
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, sampling)
    produced = dict.fromkeys(map(str, range(point.batch)), 0)
    first_token = warm = warm_tokens = 0.0
    while True:
        for output in engine.step():
            produced[output.request_id] = len(output.outputs[0].token_ids)
        now, least = time.perf_counter(), min(produced.values())
        if least and not first_token:
            first_token = now - start
            decoding_from = dict(produced)
        if first_token and not warm:
            grown = min(produced[name] - decoding_from[name] for name in produced)
            if grown >= WARM_STEPS:
                warm, warm_tokens = now, sum(produced.values())
        elif warm and sum(produced.values()) - warm_tokens >= args.steps * point.batch:
            break
        if not engine.has_unfinished_requests():
            raise RuntimeError(f"{point}: requests ended before the measurement did")
    rate = (sum(produced.values()) - warm_tokens) / (now - warm)
    engine.abort_request(list(produced))
    while engine.has_unfinished_requests():
        engine.step()
    return {"ttft_s": first_token, "decode_tokens_per_s": rate}


def run_case(case: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure one case in a process of its own, so that its memory is gone afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        target, choices = CASES[case].target, CASES[case].choices
        folder = write_model(args.model, target, Path(scratch) / "model", args.window, **choices)
        result = Path(scratch) / "result.json"
        command = [sys.executable, "-m", "benchmarks.serving.decode_rate", *sys.argv[1:]]
        command += ["--case", case, "--folder", str(folder), "--out", str(result)]
        env = os.environ | {"VLLM_USE_V2_MODEL_RUNNER": str(args.runner - 1)}
        subprocess.run(command, check=True, env=env)
        measured: dict[str, dict[str, float]] = json.loads(result.read_text())
    return measured


def rows(
    results: dict[str, dict[str, dict[str, float]]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Committed form: each case against each control of the same run, if there is one."""
    table = []
    for case, points in results.items():
        controls: list[str | None] = [c for c in (*CONTROLS, SIBLINGS.get(case)) if c in results]
        for control in controls or [None]:
            for point, values in points.items():
                for metric, value in values.items():
                    base = None if control is None else results[control][point][metric]
                    table.append(
                        {
                            "case": f"decode_rate {args.model} {case} {point} W{args.window}",
                            "metric": metric,
                            "value": round(value, 5),
                            "unit": "s" if metric == "ttft_s" else "tokens/s",
                            "control": control,
                            "ratio": None if base is None else round(value / base, 4),
                            "runner": f"V{args.runner}",
                        }
                    )
    return table


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-8b")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["full", "stock", "gateswa"])
    parser.add_argument(
        "--points", nargs="+", type=Point.parse,
        default=[Point(1, 8192), Point(64, 8192), Point(256, 2048)],
    )  # fmt: skip
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64, help="decode steps that are timed")
    parser.add_argument("--runner", type=int, choices=(1, 2), default=1, help="vLLM model runner")
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("decode_rate.json"))
    return parser.parse_args()


def main() -> None:
    """All cases, or with ``--case`` the one of this process."""
    args = parse()
    if args.case:
        args.out.write_text(json.dumps(measure(args.folder, args)))
        return
    results: dict[str, dict[str, dict[str, float]]] = {}
    for case in args.cases:
        results[case] = run_case(case, args)
        document: dict[str, Any] = {"provenance": provenance(), "rows": rows(results, args)}
        args.out.write_text(json.dumps(document, indent=1) + "\n")  # kept if a later case fails
    for row in document["rows"]:
        against = "" if row["ratio"] is None else f"{row['ratio']:>8.3f} of {row['control']}"
        print(f"{row['case']:<58}{row['metric']:<22}{row['value']:>12,.3f}{against}")


if __name__ == "__main__":
    main()
